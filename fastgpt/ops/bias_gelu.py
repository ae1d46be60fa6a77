"""Bias and GELU in its tanh form (Hendrycks and Gimpel 2016, arXiv:1606.08415), as in GPT-2's MLP.

With u = x + bias, k = sqrt(2 / pi) and c = 0.044715:

    y = u / 2 * (1 + tanh(k * (u + c * u^3))) = u * s        where s = sigmoid(z), z = 2 * k * (u + c * u^3)

and backwards:

    dx = dy * (s + u * s * (1 - s) * 2 * k * (1 + 3 * c * u^2))          dbias = sum over rows of dx

Apart, the addition and the GELU write u and read it back. Saved for backward: x and bias; u and s are computed again.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops import registry
from fastgpt.ops.registry import DTYPES

torch.library.define("fastgpt::bias_gelu", "(Tensor x, Tensor bias) -> Tensor")
torch.library.define("fastgpt::bias_gelu_backward", "(Tensor dy, Tensor x, Tensor bias) -> (Tensor, Tensor)")


def bias_gelu_reference(x: Tensor, bias: Tensor) -> Tensor:
    """The definition, in plain torch; also what runs where there is no kernel."""
    return F.gelu(x + bias, approximate="tanh").to(x.dtype)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Adds `bias` to each row of `x` and applies GELU in its tanh form.

    Args:
        x: (..., C), float32, float64, bfloat16 or float16; any strides; no rows is allowed, no columns is not.
        bias: (C,), of x's dtype, or float32 where x has 16 bits.

    Returns:
        (..., C), contiguous, of x's dtype; x + bias is not rounded on the way. Differentiable once in x and bias; sums
        are in fp32 (fp64 for float64) and bitwise the same from run to run for a given number of threads.

    Raises:
        TypeError: an argument is no tensor or its dtype is not one of the above.
        ValueError: a shape or device does not fit.
    """
    _check(x, bias)
    if not registry.takes_kernel("bias_gelu", x):
        return bias_gelu_reference(x, bias)
    return _call(x, bias)


def _check(x: Tensor, bias: Tensor) -> None:
    for name, t in (("x", x), ("bias", bias)):
        if not isinstance(t, Tensor):
            raise TypeError(f"bias_gelu: {name} must be a tensor, got {type(t).__name__}")
        if t.dtype not in DTYPES:
            raise TypeError(f"bias_gelu: {name} must be float32, float64, bfloat16 or float16, got {t.dtype}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"bias_gelu: x must have a last dimension of at least 1, got shape {tuple(x.shape)}")
    if bias.dtype != x.dtype and not (bias.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)):
        raise TypeError(f"bias_gelu: bias must have x's dtype {x.dtype} (or float32 for a 16-bit x), got {bias.dtype}")
    if bias.shape != x.shape[-1:]:
        raise ValueError(
            f"bias_gelu: bias must have shape ({x.shape[-1]},) as x's last dimension, got {tuple(bias.shape)}"
        )
    if bias.device != x.device:
        raise ValueError(f"bias_gelu: bias is on {bias.device} but x is on {x.device}: move one of them")


@torch.library.register_fake("fastgpt::bias_gelu")
def _fake(x: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("fastgpt::bias_gelu_backward")
def _fake_backward(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), bias.new_empty(bias.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    return registry.call_below_autograd("bias_gelu_backward", dy, *ctx.saved_tensors)


_call = registry.differentiable("bias_gelu", save=_save, backward=_backward)
registry.register("bias_gelu", cpu="C++", cuda="CUDA C++")
