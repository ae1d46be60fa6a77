"""The norm of all gradients and the factor that clips it (Pascanu, Mikolov, Bengio 2013, arXiv:1211.5063).

    norm   = sqrt(sum over all elements of g^2)
    factor = min(1, max_norm / (norm + 1e-6)), NaN where the norm is not finite

The gradients are read once and not written: `adamw_step(grad_scale=factor)` applies the factor where it reads them
anyway, and does nothing where it is NaN. torch.nn.utils.clip_grad_norm_ reads them twice and writes them once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgpt.ops import registry
from fastgpt.ops.registry import DTYPES

torch.library.define("fastgpt::clip_grad_norm", "(Tensor[] grads, float max_norm) -> (Tensor, Tensor)")


@torch.no_grad()
def clip_grad_norm_reference(grads: Sequence[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    """The definition, in plain torch; also what runs where there is no kernel."""
    norms = torch._foreach_norm(list(grads), 2, dtype=torch.float64)
    norm = torch.linalg.vector_norm(torch.stack(norms))
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    norm = norm.to(_dtype(grads))
    return norm, torch.where(norm.isfinite(), factor, torch.nan).to(norm.dtype)


@torch.no_grad()
def clip_grad_norm(grads: Sequence[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    """The 2-norm over all gradients, and the factor by which they are to be scaled so that it is at most `max_norm`.

    Args:
        grads: dense tensors of any shapes on one device; float32, float64, bfloat16, float16, mixed or not. They are
            not modified.
        max_norm: at least 0; infinity for the norm alone.

    Returns:
        (norm, factor): 0-dim tensors on the gradients' device, so that nothing waits for them; float64 if any gradient
        is, else float32. Both are bitwise the same from run to run. A NaN or infinity in a gradient makes the norm NaN
        or infinity, and the factor NaN; so does a norm too large for its dtype. Not differentiable.

    Raises:
        TypeError: a gradient is no dense tensor of these dtypes.
        ValueError: the gradients are not on one device, or max_norm is negative or NaN.
    """
    grads = list(grads)
    _check(grads, max_norm)
    if not grads:
        return torch.zeros(()), torch.ones(())
    if not registry.takes_kernel("clip_grad_norm", grads[0]):
        return clip_grad_norm_reference(grads, max_norm)
    return torch.ops.fastgpt.clip_grad_norm.default(grads, float(max_norm))


def _check(grads: list[Tensor], max_norm: float) -> None:
    for i, g in enumerate(grads):
        if not isinstance(g, Tensor):
            raise TypeError(f"clip_grad_norm: grads[{i}] must be a tensor, got {type(g).__name__}")
        if g.dtype not in DTYPES or g.layout != torch.strided:
            raise TypeError(
                f"clip_grad_norm: grads[{i}] must be dense and float32, float64, bfloat16 or float16, "
                f"got {g.dtype} {g.layout}"
            )
        if g.device != grads[0].device:
            raise ValueError(f"clip_grad_norm: grads[{i}] is on {g.device} but grads[0] is on {grads[0].device}")
    if not max_norm >= 0:
        raise ValueError(f"clip_grad_norm: max_norm must be at least 0, got {max_norm}")


def _dtype(grads: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32


@torch.library.register_fake("fastgpt::clip_grad_norm")
def _fake(grads: list[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    return grads[0].new_empty((), dtype=_dtype(grads)), grads[0].new_empty((), dtype=_dtype(grads))


registry.register("clip_grad_norm", cpu="C++", cuda="CUDA C++")
