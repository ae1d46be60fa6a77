"""AdamW with decay on matrices only and the gradient's norm clipped in the same call."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class AdamW(torch.optim.AdamW):
    """torch's AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), whose step() clips the whole gradient's norm first.

    After a step, `grad_norm` is the norm before clipping: a tensor on the parameters' device, so that reading it late
    costs no synchronization.
    """

    def __init__(self, params: Iterable[Any], *, grad_clip: float = 0.0, **options: Any) -> None:
        super().__init__(params, **options)
        self.grad_clip = grad_clip
        self.grad_norm: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        limit = self.grad_clip if self.grad_clip > 0 else float("inf")
        self.grad_norm = nn.utils.clip_grad_norm_(params, limit)
        return super().step(closure)


def build_optimizer(
    model: nn.Module,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    grad_clip: float = 1.0,
) -> AdamW:
    """AdamW over the model's trainable parameters; matrices and embeddings decay, vectors (biases, norms) do not.

    Args:
        lr: learning rate; a trainer sets `group["lr"]` at each step.
        weight_decay: decoupled decay of parameters with at least two dimensions.
        grad_clip: largest norm of the whole gradient, 0 for none.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    # One pass over all parameters where torch has it; on a CPU it is the faster one too.
    fused = all(p.device.type in ("cpu", "cuda") for p in params)
    return AdamW(groups, grad_clip=grad_clip, lr=lr, betas=betas, fused=fused)
