"""Layer normalization (Ba, Kiros, Hinton 2016, arXiv:1607.06450).

For each row x of width C, with weight and bias of width C:

    mean = sum(x) / C          rstd = 1 / sqrt(sum((x - mean)^2) / C + eps)
    xhat = (x - mean) * rstd
    y    = xhat * weight + bias

and backwards, with g = dy * weight:

    dx      = rstd * (g - sum(g) / C - xhat * sum(g * xhat) / C)
    dweight = sum over rows of dy * xhat          dbias = sum over rows of dy

Saved for backward: x, and mean and rstd in fp32. In bf16 they would carry a relative error of 2^-9 into every gradient.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops import registry
from fastgpt.ops.registry import DTYPES

# The schemas live here and not in C++, so that the op exists, and says what is missing, where no extension was built.
torch.library.define(
    "fastgpt::layer_norm", "(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)"
)
torch.library.define(
    "fastgpt::layer_norm_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor)",
)


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """The definition, in plain torch; also what runs where there is no kernel."""
    if x.dtype != weight.dtype:  # 16-bit x with fp32 parameters: torch's own CUDA kernel refuses the mixture
        return F.layer_norm(x.to(weight.dtype), (x.shape[-1],), weight, bias, eps).to(x.dtype)
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalizes each row of `x` to mean 0 and variance 1, then scales by `weight` and shifts by `bias`.

    Args:
        x: (..., C), float32, float64, bfloat16 or float16; any strides; no rows is allowed, no columns is not.
        weight: (C,), of x's dtype, or float32 where x has 16 bits.
        bias: (C,), of weight's dtype.
        eps: added to the variance; at least 0.

    Returns:
        (..., C), contiguous, of x's dtype. Differentiable once in x, weight and bias; sums are in fp32 (fp64 for
        float64) and bitwise the same from run to run for a given number of threads.

    Raises:
        TypeError: an argument is no tensor or its dtype is not one of the above.
        ValueError: a shape or device does not fit, or eps is negative.
    """
    check_norm("layer_norm", x, weight, bias, eps)
    if not registry.takes_kernel("layer_norm", x):
        return layer_norm_reference(x, weight, bias, eps)
    return _call(x, weight, bias, eps)


def check_norm(op: str, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    """Refuses what layer_norm and add_layer_norm cannot take, in the name of `op`."""
    for name, t in (("x", x), ("weight", weight), ("bias", bias)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(t).__name__}")
        if t.dtype not in DTYPES:
            raise TypeError(f"{op}: {name} must be float32, float64, bfloat16 or float16, got {t.dtype}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x must have a last dimension of at least 1, got shape {tuple(x.shape)}")
    if weight.dtype != x.dtype and not (weight.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)):
        raise TypeError(f"{op}: weight must have x's dtype {x.dtype} (or float32 for a 16-bit x), got {weight.dtype}")
    if bias.dtype != weight.dtype:
        raise TypeError(f"{op}: bias must have weight's dtype {weight.dtype}, got {bias.dtype}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t.shape != x.shape[-1:]:
            raise ValueError(
                f"{op}: {name} must have shape ({x.shape[-1]},) as x's last dimension, got {tuple(t.shape)}"
            )
        if t.device != x.device:
            raise ValueError(f"{op}: {name} is on {t.device} but x is on {x.device}: move one of them")
    if not eps >= 0:
        raise ValueError(f"{op}: eps must be at least 0, got {eps}")


@torch.library.register_fake("fastgpt::layer_norm")
def _fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    stats = x.new_empty(x.shape[:-1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return x.new_empty(x.shape), stats, torch.empty_like(stats)


@torch.library.register_fake("fastgpt::layer_norm_backward")
def _fake_backward(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, _, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, mean, rstd)


def _backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    dx, dweight, dbias = registry.call_below_autograd("layer_norm_backward", dy, *ctx.saved_tensors)
    return dx, dweight, dbias, None


_call = registry.differentiable("layer_norm", save=_save, backward=_backward)
registry.register("layer_norm", cpu="C++", cuda="CUDA C++")
