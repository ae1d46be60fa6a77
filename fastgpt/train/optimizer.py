"""AdamW with decay on matrices only and the gradient's norm clipped in the same call."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.ops import registry


class AdamW(torch.optim.AdamW):
    """torch's AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), whose step() clips the whole gradient's norm first.

    Where `ops.adamw_step` and `ops.clip_grad_norm` have kernels, they do it: the gradients are then left as they are,
    because the factor goes into the update. Elsewhere (no kernel, 16-bit or sharded parameters, amsgrad and the like)
    torch's own do it, and scale the gradients. The state is torch's: either side goes on with the other's.

    After a step, `grad_norm` is the norm before clipping: a tensor on the parameters' device, so that reading it late
    costs no synchronization.
    """

    def __init__(self, params: Iterable[Any], *, grad_clip: float = 0.0, **options: Any) -> None:
        super().__init__(params, **options)
        self.grad_clip = grad_clip
        self.grad_norm: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        limit = self.grad_clip if self.grad_clip > 0 else float("inf")
        if self._has_kernel(params):
            self.grad_norm, factor = ops.clip_grad_norm([p.grad for p in params], limit)
            for group in self.param_groups:
                self._update(group, factor)
        else:
            self.grad_norm = nn.utils.clip_grad_norm_(params, limit)
            for group in self.param_groups:
                if group["fused"]:
                    self._move_steps(group, None)
            super().step()
        return loss

    def _has_kernel(self, params: list[Tensor]) -> bool:
        scaler = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))  # set by torch.amp.GradScaler.step
        return (
            all(s is None for s in scaler)
            and all(registry.takes_kernel(op, p) for op in ("adamw_step", "clip_grad_norm") for p in params[:1])
            and all(_is_plain(p) and p.device == params[0].device for p in params)
            and not any(
                g[o] for g in self.param_groups for o in ("amsgrad", "maximize", "capturable", "differentiable")
            )
        )

    def _update(self, group: dict[str, Any], factor: Tensor) -> None:
        self._move_steps(group, "cpu")  # a number that is known here: nothing waits for it
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        if params:
            torch._foreach_add_([self.state[p]["step"] for p in params], 1)
        alike = defaultdict(list)  # one call takes one step and one dtype; usually all parameters have the same
        for p in params:
            alike[self.state[p]["step"].item(), p.dtype].append(p)
        for (step, _), params in alike.items():
            ops.adamw_step(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                step=step,
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                grad_scale=factor,
            )

    def _move_steps(self, group: dict[str, Any], device: str | None) -> None:
        """To `device`, or to each one's parameter: torch's fused update wants them there, and so loads them there."""
        for p in group["params"]:
            state = self.state.get(p)
            if state and state["step"].device != (wanted := torch.device(device) if device else p.device):
                state["step"] = state["step"].to(wanted)


def _is_plain(p: Tensor) -> bool:
    """Whether the kernels take this parameter with what torch keeps for it: its moments, of its own dtype."""
    grad = p.grad
    return (
        type(p) in (Tensor, nn.Parameter)
        and type(grad) is Tensor
        and p.dtype in (torch.float32, torch.float64)
        and grad.dtype == p.dtype
        and grad.layout == p.layout == torch.strided
    )


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
