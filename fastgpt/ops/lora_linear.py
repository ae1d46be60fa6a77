"""A linear layer with a low-rank adapter (Hu et al. 2021, arXiv:2106.09685), W frozen or not.

With x of N rows, W (out, in), A (r, in), B (out, r), and s the adapter's scaling:

    u = drop(x) A^T                                 (N, r)
    y = x W^T + b + s u B^T

and backwards, with d = s dy B (N, r):

    dx = dy W + drop'(d A)      dA = d^T drop(x)      dB = s dy^T u      dW = dy^T x      db = sum over rows of dy

Matmuls are all of it, so the library's are used, and what matters is how often y and dx cross the bus. Written as torch
would be, y is made by the frozen layer, u B^T in a second (N, out) tensor, and a third pass adds them. Here the small
product is made first, the bias in it as one more column, [u | 1] [s B | b]^T: that is the matrix C in the one large
matmul, which adds x W^T to it (beta = 1). The frozen layer alone also fills y with its bias before its matmul, so on a
CPU the adapter costs 1 to 4% of the forward. The alternative, [x | u] [W | s B]^T in one matmul, copies x and W each
time: 10 to 35% there, measured beside it. dx is made the same way.

Saved for backward: x, W, A, B and u; drop(x) is made again from the mask, which takes a byte an element. W may be held
in 4 bits (QLoRA: Dettmers et al. 2023, arXiv:2305.14314; nf4.py): then it is made whole for each of its two matmuls,
and let go after it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops import registry
from fastgpt.ops.nf4 import NF4Weight, dequantize_nf4_reference, expand
from fastgpt.ops.registry import DTYPES

# With absmax, scale and mean, `weight` is the codes of an NF4Weight, and these are its other tensors.
torch.library.define(
    "fastgpt::lora_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, float scaling, Tensor? keep, "
    "float keep_scale, Tensor? absmax, Tensor? scale, Tensor? mean) -> (Tensor, Tensor)",
)
# `needs` says which of dx, dweight, dbias, dlora_a, dlora_b are wanted; the others come back empty.
torch.library.define(
    "fastgpt::lora_linear_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor u, float scaling, Tensor? keep, "
    "float keep_scale, bool[] needs, Tensor? absmax, Tensor? scale, Tensor? mean) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)

_KINDS: dict[str, tuple[type, ...]] = {"weight": (Tensor, NF4Weight), "bias": (Tensor, type(None))}


def lora_linear_reference(
    x: Tensor,
    weight: Tensor | NF4Weight,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """The definition, in plain torch; also what runs where there is no kernel."""
    if isinstance(weight, NF4Weight):
        weight = dequantize_nf4_reference(weight, x.dtype)
    low = x if dropout_p == 0 else x * _keep_mask(x, dropout_p) / (1 - dropout_p)
    return F.linear(x, weight, bias) + scaling * F.linear(F.linear(low, lora_a), lora_b)


def lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """x W^T + b + scaling * (drop(x) A^T) B^T, without a second pass over the result.

    Args:
        x: (..., in), float32, float64, bfloat16 or float16; any strides. Under autocast all is cast to its dtype.
        weight: (out, in), of x's dtype. Its gradient is made only where it requires one. Or an NF4Weight of that shape,
            which has none; what is saved for backward are its 4 bits.
        bias: (out,), or None.
        lora_a: (r, in).
        lora_b: (out, r).
        scaling: alpha / r, or alpha / sqrt(r) for rsLoRA.
        dropout_p: the probability that an element of the adapter's input is dropped, in [0, 1); 0 outside of training.
            The mask is drawn from torch's generator.

    Returns:
        (..., out), of x's dtype. Differentiable once in x, weight, bias, lora_a and lora_b.

    Raises:
        TypeError: an argument is no tensor (nor, if weight, an NF4Weight), or its dtype is not x's.
        ValueError: a shape or device does not fit, r is 0, or dropout_p is not in [0, 1).
    """
    tensors = {"x": x, "weight": weight, "bias": bias, "lora_a": lora_a, "lora_b": lora_b}
    for name, t in tensors.items():
        if not isinstance(t, _KINDS.get(name, (Tensor,))):
            wanted = "a tensor or an NF4Weight" if name == "weight" else "a tensor"
            raise TypeError(f"lora_linear: {name} must be {wanted}, got {type(t).__name__}")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, lora_a, lora_b = x.to(dtype), lora_a.to(dtype), lora_b.to(dtype)
        weight = weight.to(dtype) if isinstance(weight, Tensor) else weight
        bias = None if bias is None else bias.to(dtype)
    _check(x, weight, bias, lora_a, lora_b, dropout_p)
    if not registry.takes_kernel("lora_linear", x):
        return lora_linear_reference(x, weight, bias, lora_a, lora_b, scaling, dropout_p)
    keep = _keep_mask(x, dropout_p) if dropout_p > 0 else None
    frozen, *nf4 = weight.tensors() if isinstance(weight, NF4Weight) else (weight, None, None, None)
    return _call(x, frozen, bias, lora_a, lora_b, float(scaling), keep, 1 / (1 - dropout_p), *nf4)


def _keep_mask(x: Tensor, p: float) -> Tensor:
    return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p)


def _check(
    x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, dropout_p: float
) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"lora_linear: x must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.dim() == 0 or len(weight.shape) != 2 or x.shape[-1] != weight.shape[1] or x.shape[-1] == 0:
        raise ValueError(
            "lora_linear: x must have shape (..., in), in of at least 1, and weight (out, in), got "
            f"{tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if lora_a.dim() != 2 or lora_a.shape[0] == 0:
        raise ValueError(f"lora_linear: lora_a must have shape (r, in) with r of at least 1, got {tuple(lora_a.shape)}")
    (out, width), rank = weight.shape, lora_a.shape[0]
    wanted: list[tuple[str, Tensor | NF4Weight, tuple[int, ...]]] = [
        ("weight", weight, weight.shape),
        ("lora_a", lora_a, (rank, width)),
        ("lora_b", lora_b, (out, rank)),
    ]
    if bias is not None:
        wanted.append(("bias", bias, (out,)))
    for name, t, shape in wanted:
        if t.shape != shape:
            raise ValueError(f"lora_linear: {name} must have shape {tuple(shape)}, got {tuple(t.shape)}")
        if isinstance(t, Tensor) and t.dtype != x.dtype:
            raise TypeError(f"lora_linear: {name} must have x's dtype {x.dtype}, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"lora_linear: {name} is on {t.device} but x is on {x.device}: move one of them")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"lora_linear: dropout_p must be in [0, 1), got {dropout_p}")


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    keep: Tensor | None,
    keep_scale: float,
    *nf4: Tensor | None,
) -> tuple[Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1])  # (N, in)
    low = _dropped(rows, keep, keep_scale)
    right = lora_b * scaling  # (out, r)
    if bias is None:
        u = low @ lora_a.t()  # (N, r)
        left = u
    else:
        u = low.new_empty(len(rows), len(lora_a) + 1)
        u[:, :-1] = low @ lora_a.t()
        u[:, -1] = 1
        left, right = u, torch.cat([right, bias[:, None]], 1)
    y = left @ right.t()
    y.addmm_(rows, _whole(weight, lora_a, lora_b, *nf4).t())
    return y.view(*x.shape[:-1], len(lora_b)), u


def _backward_kernel(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    u: Tensor,
    scaling: float,
    keep: Tensor | None,
    keep_scale: float,
    needs: list[bool],
    *nf4: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    none = x.new_empty(0)
    dx = dweight = dbias = da = db = none
    rank = len(lora_a)
    if needs[0] or needs[3]:
        d = dy @ (lora_b * scaling)  # (N, r)
    if needs[0]:
        dx = d @ lora_a
        if keep is not None:
            dx.mul_(keep.view(dx.shape)).mul_(keep_scale)
        dx.addmm_(dy, _whole(weight, lora_a, lora_b, *nf4))
        dx = dx.view(x.shape)
    if needs[1]:
        dweight = dy.t() @ rows
    if needs[2] or needs[4]:
        # (r, out), and the bias's gradient, where u's last column is 1. As dy^T u it took 3 to 5 times as long.
        both = u.t() @ dy
        if needs[2]:
            dbias = both[rank].clone()
        if needs[4]:
            db = (both[:rank].t() * scaling).contiguous()
    if needs[3]:
        da = d.t() @ _dropped(rows, keep, keep_scale)
    return dx, dweight, dbias, da, db


def _whole(weight: Tensor, lora_a: Tensor, lora_b: Tensor, *nf4: Tensor | None) -> Tensor:
    absmax, scale, mean = nf4
    if absmax is None or scale is None or mean is None:
        return weight
    return expand((weight, absmax, scale, mean), (len(lora_b), lora_a.shape[1]), lora_a.dtype)


def _dropped(rows: Tensor, keep: Tensor | None, keep_scale: float) -> Tensor:
    return rows if keep is None else (rows * keep.view(rows.shape)).mul_(keep_scale)


@torch.library.register_fake("fastgpt::lora_linear")
def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    columns = lora_a.shape[0] + (bias is not None)
    return x.new_empty(*x.shape[:-1], lora_b.shape[0]), x.new_empty(x.numel() // x.shape[-1], columns)


@torch.library.register_fake("fastgpt::lora_linear_backward")
def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    needs = others[4]
    shapes = (x.shape, weight.shape, lora_b.shape[:1], lora_a.shape, lora_b.shape)
    return tuple(x.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, lora_a, lora_b, ctx.scaling, keep, ctx.keep_scale, *nf4 = inputs
    ctx.save_for_backward(x, weight, lora_a, lora_b, output[1], keep, *nf4)


def _backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, lora_a, lora_b, u, keep, *nf4 = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:5])
    grads = registry.call_below_autograd(
        "lora_linear_backward", dy, x, weight, lora_a, lora_b, u, ctx.scaling, keep, ctx.keep_scale, needs, *nf4
    )
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *[None] * 6)


torch.library.impl("fastgpt::lora_linear", ("cpu", "cuda"), _forward)
torch.library.impl("fastgpt::lora_linear_backward", ("cpu", "cuda"), _backward_kernel)
_call = registry.differentiable("lora_linear", save=_save, backward=_backward, launcher=_forward)
registry.register(
    "lora_linear",
    cpu="matmul",
    cuda="matmul",
    because="the library's matmuls, the adapter's product being what the large one adds to",
)
