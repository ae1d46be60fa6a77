"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum made orthogonal, for matrices inside a model.

For a matrix of r rows and c columns, g its clipped gradient:

    m = m + (1 - 0.95) * (g - m)              u = g + 0.95 * (m - g)                      (Nesterov)
    X = u / |u|_F, then five times:           A = X X^T,  X = 3.4445 X + (-4.7750 A + 2.0315 A A) X
    p = p * (1 - lr * weight_decay) - lr * 0.2 * sqrt(max(r, c)) * X

The iteration is a polynomial in each singular value that sends all of (0, 1] to about 0.7 to 1.2, so that X is near to
U V^T of u = U S V^T; its coefficients are the published ones, chosen to lift small values fast rather than to reach 1.
The factor makes the entries' root mean square 0.2, which is about AdamW's: both can share lr and decay (Liu et al.
2025, arXiv:2502.16982). A fused c_attn is three matrices, q, k and v, each made orthogonal by itself, as Jordan
recommends.

A step costs about 25 C FLOPs per parameter at width C, as much as forward and backward on 4 C tokens: little beside the
large batches of a GPU, much beside the small ones of a CPU.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastgpt.train.optimizer import AdamW

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
RMS = 0.2


def orthogonalize(u: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Matrices (n, r, c) with the singular vectors of `u` and all singular values near 1; zero stays zero.

    Args:
        dtype: to multiply in. bfloat16 is enough, and the faster one where the hardware has it.
    """
    a, b, c = COEFFICIENTS
    tall = u.size(-2) > u.size(-1)
    x = (u.mT if tall else u).to(dtype)  # so that A is the smaller one
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(AdamW):
    """Muon for the groups whose "muon_parts" is not 0, into so many matrices of equal height; AdamW for the others.

    The clipping, `grad_norm`, the masters and what happens to gradients that are not finite are AdamW's, over all
    groups. A Muon parameter keeps one moment, `state["momentum_buffer"]`.

    Args:
        dtype: to orthogonalize in.
    """

    def __init__(self, params: Iterable[Any], *, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        super().__init__(params, **options)
        self.dtype = dtype

    def _is_ours(self, params: list[Tensor]) -> bool:
        return True

    def _update(self, group: dict[str, Any], factor: Tensor) -> None:
        if not group["muon_parts"]:
            super()._update(group, factor)
            return
        lr, finite = group["lr"], factor.isfinite()
        for p in (p for p in group["params"] if p.grad is not None):
            self._make_state(p, "momentum_buffer")
            state = self.state[p]
            state["step"] += 1
            moment = state["momentum_buffer"]
            grad = p.grad.to(moment.dtype) * factor
            mean = moment.lerp(grad, 1 - MOMENTUM)
            parts = grad.lerp(mean, MOMENTUM).unflatten(0, (group["muon_parts"], -1))  # (parts, r, c)
            update = orthogonalize(parts, self.dtype).flatten(0, 1)
            value = state.get("master", p)
            size = lr * RMS * math.sqrt(max(parts.shape[1:]))
            after = (value * (1 - lr * group["weight_decay"])).sub_(update, alpha=size)
            moment.copy_(torch.where(finite, mean, moment))
            value.copy_(torch.where(finite, after, value))
            if value is not p:
                p.copy_(value)
