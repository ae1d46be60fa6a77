import math

import pytest
import torch
from torch import nn

from fastgpt import GPT, GPTConfig, ops
from fastgpt.data import PackedDataset, TokenDataset
from fastgpt.train import build_optimizer
from fastgpt.train.muon import Muon, orthogonalize


def micro(width=32, seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab_size=64, n_positions=16, n_embd=width, n_layer=2, n_head=2))


def backward(model, seed=0):
    ids = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(seed))
    loss = model.loss(ids[:, :-1], ids[:, 1:])
    loss.backward()
    return loss.item()


def train(model, optimizer, steps, start=0):
    losses = []
    for step in range(start, start + steps):
        losses.append(backward(model, step % 4))
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("shape", [(1, 32, 32), (1, 48, 16), (2, 16, 64), (3, 24, 40), (1, 1, 7)])
def test_singular_values_are_near_one_and_vectors_are_kept(shape):
    u = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = orthogonalize(u)
    assert x.shape == u.shape
    left, _, right = torch.linalg.svd(u, full_matrices=False)
    within = left.mT @ x @ right.mT  # diagonal where x has the singular vectors of u
    values = within.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.65
    assert values.max() < 1.25
    torch.testing.assert_close(within, values.diag_embed(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_does_not_depend_on_the_size(scale):
    u = torch.randn(1, 12, 20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(orthogonalize(u * scale), orthogonalize(u), rtol=1e-4, atol=1e-5)
    assert torch.equal(orthogonalize(u * 0), torch.zeros(1, 12, 20))


def test_who_updates_what():
    model = micro()
    optimizer = build_optimizer(model, name="muon")
    assert isinstance(optimizer, Muon)
    parts = {p: g["muon_parts"] for g in optimizer.param_groups for p in g["params"]}
    assert len(parts) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        in_block = ".h." in name and p.dim() == 2
        assert parts[p] == (0 if not in_block else 3 if "c_attn" in name else 1), name
    train(model, optimizer, 1)
    assert set(optimizer.state[model.transformer.h[0].attn.c_attn.weight]) == {"step", "momentum_buffer"}
    assert set(optimizer.state[model.transformer.wte.weight]) == {"step", "exp_avg", "exp_avg_sq"}


def test_equals_torchs_muon_with_moonshots_scale():
    """torch multiplies in bf16 everywhere, and does not divide a fused matrix."""
    ours, theirs = micro(), micro()
    options = {"lr": 1e-2, "weight_decay": 0.1}
    optimizer = build_optimizer(ours, name="muon", grad_clip=0, muon_dtype=torch.bfloat16, **options)
    for group in optimizer.param_groups:
        group["muon_parts"] = min(1, group["muon_parts"])
    named = list(theirs.named_parameters())
    matrices = [p for n, p in named if ".h." in n and p.dim() == 2]
    rest = [p for n, p in named if ".h." not in n or p.dim() < 2]
    plain = [
        torch.optim.Muon(matrices, momentum=0.95, adjust_lr_fn="match_rms_adamw", **options),
        torch.optim.AdamW([p for p in rest if p.dim() == 2], betas=(0.9, 0.95), **options),
        torch.optim.AdamW([p for p in rest if p.dim() < 2], betas=(0.9, 0.95), lr=1e-2, weight_decay=0.0),
    ]
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        optimizer.step()
        for other in plain:
            other.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)


def test_q_k_and_v_are_each_orthogonal():
    model = micro()
    weight = model.transformer.h[0].attn.c_attn.weight
    optimizer = build_optimizer(model, lr=1.0, weight_decay=0.0, name="muon")
    before = weight.detach().clone()
    train(model, optimizer, 1)
    for part in (before - weight.detach()).unflatten(0, (3, -1)):
        values = torch.linalg.svdvals(part / (0.2 * math.sqrt(32)))
        assert values.max() < 1.25
        assert values[:16].min() > 0.6  # the gradient of a few tokens leaves the small ones small


@pytest.mark.parametrize("masters", [False, True])
def test_a_saved_state_goes_on_bit_for_bit(masters):
    whole, cut = micro(), micro()
    options = {"lr": 3e-3, "name": "muon", "masters": masters}
    optimizer = build_optimizer(whole, **options)
    want = train(whole, optimizer, 6)
    optimizer = build_optimizer(cut, **options)
    losses = train(cut, optimizer, 3)
    state, weights = optimizer.state_dict(), {k: v.clone() for k, v in cut.state_dict().items()}
    again = micro(seed=1)
    optimizer = build_optimizer(again, **options)
    again.load_state_dict(weights)
    optimizer.load_state_dict(state)
    losses += train(again, optimizer, 3, start=3)
    assert losses == want
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("masters", [False, True])
def test_a_gradient_that_is_not_finite_changes_nothing(masters, mode):
    model = micro()
    optimizer = build_optimizer(model, lr=1e-2, name="muon", masters=masters)
    train(model, optimizer, 2)
    held = [*model.parameters(), *(t for s in optimizer.state.values() for k, t in s.items() if k != "step")]
    before = [t.detach().clone() for t in held]
    for value in (math.nan, math.inf):
        backward(model)
        model.transformer.h[1].mlp.c_fc.bias.grad[3] = value
        with ops.using(mode):
            optimizer.step()
        optimizer.zero_grad()
        assert not optimizer.grad_norm.isfinite()
    assert all(torch.equal(t, b) for t, b in zip(held, before, strict=True))


def test_gets_further_than_adamw_in_as_many_steps(shards):
    """Each at the best of the same three rates; of 30 steps, the mean loss of the last five."""
    ends = {}
    for name in ("adamw", "muon"):
        for lr in (2e-3, 4e-3, 8e-3):
            torch.manual_seed(0)
            model = GPT(GPTConfig.preset("micro", vocab_size=290))
            optimizer = build_optimizer(model, lr=lr, name=name)
            data = PackedDataset(TokenDataset.open(shards, "train"), 32, seed=0)
            losses = []
            for _ in range(30):
                loss = model.loss(*data.next_batch(8))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            ends[name, lr] = sum(losses[-5:]) / 5
    best = {name: min(end for (n, _), end in ends.items() if n == name) for name in ("adamw", "muon")}
    assert best["muon"] < best["adamw"] - 0.1, ends


def test_models_without_blocks_have_adamw_alone():
    model = nn.Linear(4, 4)
    optimizer = build_optimizer(model, lr=0.1, name="muon")
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert "exp_avg" in optimizer.state[model.weight]
