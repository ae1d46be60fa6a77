import pytest
import torch
from torch import nn

from fastgpt.train import build_optimizer


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 11))


def backward(model, seed, scale=1.0):
    ids = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(seed))
    (scale * nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.roll(-1, 1).flatten())).backward()


def test_matches_torchs_clipping_and_adamw_over_20_steps():
    ours, theirs = small_model(), small_model()
    opt = build_optimizer(ours, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), grad_clip=0.5)
    matrices = [p for p in theirs.parameters() if p.dim() >= 2]
    vectors = [p for p in theirs.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    plain = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for step in range(20):
        backward(ours, step)
        backward(theirs, step)
        opt.step()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        plain.step()
        torch.testing.assert_close(opt.grad_norm, norm)
        opt.zero_grad()
        plain.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_only_matrices_decay():
    model = small_model()
    opt = build_optimizer(model, lr=0.1, weight_decay=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = [p.detach().clone() for p in model.parameters()]
    opt.step()
    for old, new in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), old * (0.95 if new.dim() >= 2 else 1.0))


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_clipping(clip):
    model = small_model()
    opt = build_optimizer(model, lr=0.0, grad_clip=clip)
    backward(model, 0, scale=100)
    opt.step()
    after = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters()]))
    assert opt.grad_norm > 1
    torch.testing.assert_close(after, torch.tensor(clip) if clip else opt.grad_norm, rtol=1e-4, atol=0)


def test_frozen_parameters_stay():
    model = small_model()
    model[0].weight.requires_grad_(False)
    frozen = model[0].weight.clone()
    opt = build_optimizer(model, lr=0.1)
    backward(model, 0)
    opt.step()
    assert torch.equal(model[0].weight, frozen)
