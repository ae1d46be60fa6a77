"""Residual addition and layer normalization in one pass over memory.

For each row, with weight and bias of width C:

    sum = residual + x, rounded to x's dtype          norm = layer_norm(sum, weight, bias, eps)

and backwards, with dsum the gradient that reaches `sum` by other ways than `norm`:

    dx = dresidual = dsum + layer_norm's gradient for dnorm          dweight, dbias as layer_norm's

Apart, the two ops read the sum back after writing it, forward, and write and read layer_norm's gradient to add dsum to
it, backward: 5 and 6 passes over a tensor, where together they take 4 and 4.
Saved for backward: sum, and mean and rstd in fp32.
"""

from typing import Any

import torch
from torch import Tensor

from fastgpt.ops import registry
from fastgpt.ops.layer_norm import check_norm, layer_norm_reference

torch.library.define(
    "fastgpt::add_layer_norm",
    "(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "fastgpt::add_layer_norm_backward",
    "(Tensor dnorm, Tensor? dsum, Tensor sum, Tensor weight, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor)",
)


def add_layer_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """The definition, in plain torch; also what runs where there is no kernel."""
    total = residual + x
    return total, layer_norm_reference(total, weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Adds `x` to the residual stream and normalizes the sum, as between the blocks of a pre-norm transformer.

    Args:
        x: (..., C), float32, float64, bfloat16 or float16; any strides; no rows is allowed, no columns is not.
        residual: of x's shape and dtype; any strides.
        weight: (C,), of x's dtype, or float32 where x has 16 bits.
        bias: (C,), of weight's dtype.
        eps: added to the variance; at least 0.

    Returns:
        (residual + x, layer_norm(residual + x, weight, bias, eps)), both (..., C), contiguous, of x's dtype. The norm
        is of the sum as it was rounded. Differentiable once in x, residual, weight and bias; sums are in fp32 (fp64
        for float64) and bitwise the same from run to run for a given number of threads.

    Raises:
        TypeError: an argument is no tensor or its dtype is not one of the above.
        ValueError: a shape or device does not fit, or eps is negative.
    """
    check_norm("add_layer_norm", x, weight, bias, eps)
    if not isinstance(residual, Tensor):
        raise TypeError(f"add_layer_norm: residual must be a tensor, got {type(residual).__name__}")
    if residual.dtype != x.dtype:
        raise TypeError(f"add_layer_norm: residual must have x's dtype {x.dtype}, got {residual.dtype}")
    if residual.shape != x.shape:
        raise ValueError(f"add_layer_norm: residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    if residual.device != x.device:
        raise ValueError(f"add_layer_norm: residual is on {residual.device} but x is on {x.device}: move one of them")
    if not registry.takes_kernel("add_layer_norm", x):
        return add_layer_norm_reference(x, residual, weight, bias, eps)
    return _call(x, residual, weight, bias, eps)


@torch.library.register_fake("fastgpt::add_layer_norm")
def _fake(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stats = x.new_empty(x.shape[:-1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape), stats, torch.empty_like(stats)


@torch.library.register_fake("fastgpt::add_layer_norm_backward")
def _fake_backward(
    dnorm: Tensor, dsum: Tensor | None, sum: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return sum.new_empty(sum.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    total, _, mean, rstd = output
    ctx.set_materialize_grads(False)  # a sum or norm that nothing depends on has a gradient of None, not one of zeros
    ctx.save_for_backward(total, inputs[2], mean, rstd)


def _backward(
    ctx: Any, dsum: Tensor | None, dnorm: Tensor | None, *_: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, None]:
    if dnorm is None:
        return dsum, dsum, None, None, None
    dx, dweight, dbias = registry.call_below_autograd("add_layer_norm_backward", dnorm, dsum, *ctx.saved_tensors)
    return dx, dx, dweight, dbias, None


_call = registry.differentiable("add_layer_norm", save=_save, backward=_backward, visible=2)
registry.register("add_layer_norm", cpu="C++", cuda="CUDA C++")
