import math

import pytest
import torch
from torch import nn

from fastgpt import GPT, GPTConfig, ops
from fastgpt.model import fused_block, gpt, tied

pytestmark = pytest.mark.skipif(
    not ops.registry.takes_kernel("bias_gelu", torch.zeros(1)), reason="the extension is not built"
)


@pytest.fixture
def calls(monkeypatch):
    """How often the fused block and the tied loss ran."""
    counts = {"block": 0, "loss": 0}

    def counted(name, cls):
        forward = cls.forward

        def run(*args):
            counts[name] += 1
            return forward(*args)

        monkeypatch.setattr(cls, "forward", staticmethod(run))

    counted("block", fused_block.FusedBlock)
    counted("loss", tied._Loss)
    return counts


def model_of(dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50, n_positions=40, n_embd=32, n_layer=2, n_head=2, **options)).to(dtype)
    for p in model.parameters():  # biases that are not zero, norms that are not one
        p.data += torch.randn_like(p) * 0.1
    return model


def batch(B=3, T=40):
    ids = torch.randint(50, (B, T + 1), generator=torch.Generator().manual_seed(1))
    targets = ids[:, 1:].clone()
    targets[0, :5] = -100
    return ids[:, :-1], targets


def gradients(model, *args, factor=1.0, **options):
    model.zero_grad()
    loss = model.loss(*args, **options) * factor
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("documents", [False, True])
def test_gradients_are_those_of_the_parts(calls, documents, reduction):
    model, (ids, targets) = model_of(), batch()
    cu_seqlens = torch.tensor([0, 7, 40, 100, 120], dtype=torch.int32) if documents else None
    options = {"reduction": reduction, "cu_seqlens": cu_seqlens, "factor": 0.5}
    got = [t.clone() for t in gradients(model, ids, targets, **options)]
    assert calls == {"block": 2, "loss": 0 if documents else 1}
    with ops.using("reference"):
        want = gradients(model.double(), ids, targets, **options)
        plain = gradients(model.float(), ids, targets, **options)
    assert calls["block"] == 2
    for g, w, p in zip(got, want, plain, strict=True):
        assert (g - w).abs().max() <= 2 * (p - w).abs().max() + 1e-6 * w.abs().max()


def test_padding_learns_nothing_and_steps_repeat_bit_for_bit():
    model, (ids, targets) = model_of(), batch()
    first = [t.clone() for t in gradients(model, ids, targets)]
    assert torch.equal(model.transformer.wte.weight.grad[50:], torch.zeros(14, 32))
    for a, b in zip(first, gradients(model, ids, targets), strict=True):
        assert torch.equal(a, b)


def test_a_graph_can_be_run_twice():
    model, (ids, targets) = model_of(), batch()
    loss = model.loss(ids, targets)
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    for p, g in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * g)


def test_no_target_counts_is_nan_with_gradients_of_zero():
    model, (ids, targets) = model_of(), batch()
    loss, *grads = gradients(model, ids, torch.full_like(targets, -100))
    assert math.isnan(loss)
    assert all(not g.any() for g in grads)


def changed(change):
    model = model_of()
    change(model)
    return model


@pytest.mark.parametrize(
    ("change", "blocks", "losses"),
    [
        (lambda m: m.set_dropout(0.1), 0, 1),
        (lambda m: m.eval().set_dropout(0.1), 2, 1),
        (lambda m: m.transformer.h[0].mlp.requires_grad_(False), 1, 1),
        (lambda m: m.transformer.wpe.requires_grad_(False), 2, 0),
        (lambda m: m.transformer.h[1].mlp.c_fc.register_forward_hook(lambda *_: None), 1, 1),
        (lambda m: setattr(m.transformer.h[1].attn, "c_proj", nn.Linear(32, 32)), 1, 1),
    ],
)
def test_what_is_not_plain_takes_the_parts(calls, change, blocks, losses):
    gradients(changed(change), *batch())
    assert calls == {"block": blocks, "loss": losses}


def test_less_is_saved_than_by_the_parts(monkeypatch):
    model, (ids, _) = model_of(), batch()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def saved():
        storages = {}

        def keep(t):
            if t.untyped_storage().data_ptr() not in parameters:
                storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            hidden = model.hidden(ids)
        return sum(storages.values()) / (ids.numel() * 32 * 4 * 2), hidden

    fused, _ = saved()
    monkeypatch.setattr(gpt.Block, "_fuses", lambda *_: False)
    parts, _ = saved()
    assert 10 <= fused < 12
    assert parts > fused + 5
