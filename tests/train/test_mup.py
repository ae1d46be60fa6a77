import math

import pytest
import torch
import torch.nn.functional as F

from fastgpt import GPT, GPTConfig
from fastgpt.model import gpt
from fastgpt.train import build_optimizer, mup

IDS = torch.randint(128, (8, 33), generator=torch.Generator().manual_seed(1))


def make(width, mup_base=None, n_head=4, optimizer="adamw", lr=1e-2, **options):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=128, n_positions=32, n_embd=width, n_layer=2, n_head=n_head, **options))
    scales = None
    if mup_base:
        mup.scale_weights(model, mup_base)
        scales = mup.lr_scales(model, mup_base, optimizer)
    return model, build_optimizer(model, lr=lr, weight_decay=0.1, name=optimizer, lr_scales=scales)


def sizes_after(model, optimizer, steps=4):
    """Mean |x| of each layer's output in the last step, and of what the steps have changed in the logits."""
    ids, targets = IDS[:4, :16], IDS[:4, 1:17]
    sizes = {}

    def note(name):
        def hook(module, inputs, output):
            whole = output[0] + output[1] if isinstance(output, tuple) else output
            sizes[name] = whole.detach().abs().mean().item()

        return hook

    for i, block in enumerate(model.transformer.h):
        for name, module in {"attention": block.attn, "mlp": block.mlp, "block": block}.items():
            module.register_forward_hook(note(f"{name} {i}"))
    with torch.no_grad():
        before = model(ids)
    for _ in range(steps):
        model.loss(ids, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        sizes["logits"] = (model(ids) - before).abs().mean().item()
    return sizes


@pytest.mark.parametrize(
    ("optimizer", "lr", "heads"), [("adamw", 2e-3, "as many"), ("adamw", 2e-3, "as wide"), ("muon", 3e-3, "as wide")]
)
def test_coordinate_check(optimizer, lr, heads):
    """Over widths, the sizes of activations after some steps stay what they are with muP, and grow without."""

    def over_widths(base):
        found = []
        for width in (64, 128, 256):
            n_head = 4 if heads == "as many" else width // 32
            found.append(sizes_after(*make(width, base, n_head, optimizer, lr)))
        return {name: [f[name] for f in found] for name in found[0]}

    for name, sizes in over_widths(base=64).items():
        assert max(sizes) < (1.6 if name == "logits" else 1.3) * min(sizes), (name, sizes)
    for name, sizes in over_widths(base=None).items():
        assert sizes[2] > 1.25 * sizes[1] > 1.25**2 * sizes[0], (name, sizes)


@pytest.mark.parametrize("tied", [True, False])
def test_equals_the_paper_written_with_factors_on_scores_and_logits(tied, monkeypatch):
    """Table 8 as it stands: scores by 8/D, logits by 1/m, plain norms. No GPT-2 folder could say that."""
    width, base, n_head = 96, 32, 2
    m, D = width / base, width // n_head
    ours, optimizer = make(width, base, n_head, tie_word_embeddings=tied)
    torch.manual_seed(0)
    theirs = GPT(ours.config)
    for block in theirs.transformer.h:
        block._fuses = lambda x: False  # it is to call the attention that is put in below
    matrices = [p for p in theirs.transformer.h.parameters() if p.dim() == 2]
    with torch.no_grad():
        for p in matrices:
            p.mul_(m**-0.5)
    others = [p for p in theirs.parameters() if not any(p is q for q in matrices)]
    plain = torch.optim.AdamW(
        [
            {"params": matrices, "lr": 1e-2 / m, "weight_decay": 0.1 * m},
            {"params": [p for p in others if p.dim() == 2], "weight_decay": 0.1},
            {"params": [p for p in others if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-20,
    )
    for group in optimizer.param_groups:
        group["eps"] = 1e-20
    optimizer.grad_clip = 0
    plain_attention = gpt.ops.attention
    for _ in range(5):
        loss = ours.loss(IDS[:, :-1], IDS[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with monkeypatch.context() as patch:
            patch.setattr(gpt.ops, "attention", lambda q, k, v, **o: plain_attention(q, k, v, scale=8 / D, **o))
            logits = F.linear(theirs.hidden(IDS[:, :-1]) / m, theirs.classifier[:128])
        want = F.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())
        want.backward()
        plain.step()
        plain.zero_grad()
        torch.testing.assert_close(loss, want, rtol=1e-4, atol=0)
    assert loss < math.log(128)


def test_changes_nothing_at_the_base_width_with_gpt2s_head_size():
    model, _ = make(128, 128, n_head=2)
    plain, _ = make(128, None, n_head=2)
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert set(mup.lr_scales(model, 128, "adamw").values()) == {1.0}


def test_learning_rates_scale_and_decay_does_not():
    model, optimizer = make(256, 64, n_head=4, lr=1e-2)
    scale = {p: g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    assert scale[model.transformer.h[0].mlp.c_fc.weight] == 1 / 4
    assert scale[model.transformer.wte.weight] == 1
    assert scale[model.transformer.ln_f.weight] == 1 / 4
    for group in optimizer.param_groups:
        assert group["lr"] == 1e-2 * group["lr_scale"]
        assert group["weight_decay"] * group["lr"] in (0, pytest.approx(1e-3))
