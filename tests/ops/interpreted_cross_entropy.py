"""The Triton pass over rows of logits without a GPU, under Triton's interpreter, against plain torch in float64.

test_triton_cross_entropy.py runs this file.
"""

import itertools
import os
import sys

import torch
import torch.nn.functional as F

from fastgpt import ops
from fastgpt.ops.triton import cross_entropy

assert os.environ.get("TRITON_INTERPRET"), "run test_triton_cross_entropy.py"


def run(x, targets, factor=None, ignore_index=-100, z_loss=0.0, gradient=True, pad=0):
    N, V = x.shape
    wide = F.pad(x, (0, pad), value=torch.nan)
    logits = wide[:, :V]
    loss = torch.full((N,), torch.nan, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    cross_entropy.cross_entropy_(logits, targets, loss, factor, ignore_index, z_loss, gradient)
    assert wide[:, V:].isnan().all()
    return loss, logits


def exact(x, targets, factor=None, ignore_index=-100, z_loss=0.0):
    x = x.double().requires_grad_()
    loss = F.cross_entropy(x, targets, ignore_index=ignore_index, reduction="none")
    loss = loss + z_loss * x.logsumexp(-1).square() * (targets != ignore_index)
    (dx,) = torch.autograd.grad(loss, x, torch.ones(len(x)).double() if factor is None else factor.double())
    return loss.detach(), dx


def test_losses_and_gradients():
    """Widths below, at and above a block and around a second one; a factor or none; z-loss; rows that are ignored."""
    torch.manual_seed(0)
    for dtype, V, with_factor, z_loss in itertools.product(
        (torch.float32, torch.float16, torch.float64), (1, 100, 128, 129, 8192, 8193, 20000), (False, True), (0.0, 0.01)
    ):
        N = 3
        x = (torch.randn(N, V) * 3).to(dtype)
        targets = torch.randint(0, V, (N,))
        targets[0] = V - 1
        targets[1] = -100
        factor = torch.rand(N).to(torch.float64 if dtype == torch.float64 else torch.float32) if with_factor else None
        loss, dx = run(x, targets, factor, z_loss=z_loss, pad=5)
        want_loss, want_dx = exact(x, targets, factor, z_loss=z_loss)
        close = {torch.float32: 1e-6, torch.float16: 1e-3, torch.float64: 1e-12}[dtype]
        torch.testing.assert_close(loss.double(), want_loss, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(dx.double(), want_dx, rtol=20 * close, atol=close)
        alone, _ = run(x, targets, factor, z_loss=z_loss, gradient=False)
        assert torch.equal(alone, loss)


def test_strange_rows():
    inf, nan = torch.inf, torch.nan
    V = 20000  # three blocks
    targets = torch.tensor([0, 19999, 5, 7, 3, 2])
    x = torch.randn(6, V, generator=torch.Generator().manual_seed(0))
    x[0], x[0, 0] = -inf, 1e4  # certain
    x[1, :8192], x[1, -1] = -inf, -inf  # a first block of nothing, and an impossible target
    x[2], x[2, 5] = -1e4, 1e4
    x[3] = 1e4
    x[4, 100] = nan
    x[5, 9000] = inf
    loss, dx = run(x.clone(), targets)
    want_loss, want_dx = exact(x, targets)
    torch.testing.assert_close(loss.double(), want_loss, rtol=1e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(dx[:4].double(), want_dx[:4], rtol=1e-5, atol=1e-7)
    assert dx[4:].isnan().any(1).all()
    loss, dx = run(x[3:].clone(), torch.tensor([V, -1, 9]), ignore_index=9)
    assert loss[:2].isnan().all()
    assert dx[:2].isnan().all()
    assert loss[2] == 0
    assert (dx[2] == 0).all()
    run(torch.empty(0, 5), torch.empty(0).long())


def test_the_targets_gradient_where_its_probability_nears_1():
    for logit in (5.0, 9.0, 12.0, 30.0):
        x = torch.zeros(1, 101)
        x[0, 4] = logit
        loss, dx = run(x.clone(), torch.tensor([4]))
        others = 100 * torch.tensor(-logit).double().exp()
        torch.testing.assert_close(dx[0, 4].double(), -others / (1 + others), rtol=1e-6, atol=0)
        torch.testing.assert_close(loss[0].double(), others.log1p(), rtol=1e-4, atol=0)


def test_the_op_on_its_pass(monkeypatch):
    """linear_cross_entropy's own loop over chunks, with this pass in the place of the C++ one."""
    loop = sys.modules["fastgpt.ops.linear_cross_entropy"]
    library = torch.library.Library("fastgpt", "IMPL", "CPU")
    library.impl("cross_entropy_", loop._cross_entropy_triton, allow_override=True)
    monkeypatch.setitem(loop.CHUNK_ROWS, "cpu", 64)
    for reduction in ("mean", "sum", "none"):
        hidden, weight = torch.randn(150, 16, requires_grad=True), torch.randn(300, 16, requires_grad=True)
        targets = torch.randint(300, (150,))
        targets[::7] = -100
        losses = [
            f(hidden, weight, targets, reduction=reduction, z_loss=0.01)
            for f in (ops.linear_cross_entropy, ops.linear_cross_entropy_reference)
        ]
        found, want = ((y, *torch.autograd.grad(y.sum(), [hidden, weight])) for y in losses)
        torch.testing.assert_close(found, want)
