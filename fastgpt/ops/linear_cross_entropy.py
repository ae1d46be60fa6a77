"""Cross-entropy of a linear classifier from its inputs, without the logits ever being whole in memory.

For each row h of width C, with the classifier's weight W (V, C) and a target t:

    x = h W^T        lse = log(sum over j of exp(x_j))        loss = lse - x_t + z lse^2

and backwards, with p = exp(x - lse) and e_t the target's unit vector:

    dx = (1 + 2 z lse) p - e_t        dh = dx W        dW = sum over rows of dx^T h

The logits of GPT-2's vocabulary are 50,257 numbers a row against 768 of h, and plain torch holds three such tensors:
logits or their logarithms, and two gradients. Here a chunk of rows goes through all of it at once. A library matmul
makes its logits in a buffer that is used again by every chunk; one pass over the buffer gives the losses and writes
the gradient over the logits (csrc/cpu/cross_entropy.cpp, triton/cross_entropy.py); two more matmuls turn that into the
chunk's dh and its part of dW, which is summed in fp32. These are the three matmuls that there must be: nothing is made
twice. What it takes is that the gradient is made in the forward, for a sum of the rows' losses, before it is known
what the loss is multiplied by. Backward multiplies: by that, and for a mean by 1/count, which comes last so that 16-bit
logits' gradients do not underflow by it.

With reduction "none" each row's loss has a gradient of its own, which only backward knows. Then forward gives the
losses alone, and backward makes the logits again, each row of their gradient multiplied before it enters the matmuls:
four of them. Without a gradient to make there is one matmul.

z is the z-loss of PaLM (Chowdhery et al. 2022, arXiv:2204.02311), which keeps lse near 0.
"""

import functools
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops import registry
from fastgpt.ops.registry import DTYPES

REDUCTIONS = ("mean", "sum", "none")

# Rows of 4-byte logits at a time; of 2 bytes, twice as many. Measured in processor time against plain torch's, on two
# cores at 4096 x 768 x 50,257: fp32 by 512 rows 1.18 times as fast, by 1024 1.16; bf16 by 512 1.21, by 1024 1.38, by
# 2048 1.35.
CHUNK_ROWS = {"cpu": 512, "cuda": 2048}
# Rows of dW at a time where it is summed from 16-bit products on a CPU.
WEIGHT_ROWS = 8192

# `needs`: whether hidden's gradient is wanted, and weight's. Returns the loss, what a mean was divided by, and the
# gradients of the sum of the rows' losses, which are empty where they are not wanted or the reduction is "none".
torch.library.define(
    "fastgpt::linear_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor targets, int ignore_index, str reduction, float z_loss, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "fastgpt::linear_cross_entropy_backward",
    "(Tensor dloss, Tensor hidden, Tensor weight, Tensor targets, Tensor count, Tensor dhidden, Tensor dweight, "
    "int ignore_index, float z_loss, bool[] needs) -> (Tensor, Tensor)",
)
# The pass over a chunk: fills `loss`, one a row, and with `gradient` writes over the logits the gradient of the sum of
# factor * loss; without, what is left of the logits is of no use. A target that is neither in [0, V) nor ignore_index
# makes its row NaN.
torch.library.define(
    "fastgpt::cross_entropy_",
    "(Tensor(a!) logits, Tensor targets, Tensor(b!) loss, Tensor? factor, int ignore_index, float z_loss, "
    "bool gradient) -> ()",
)


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    z_loss: float = 0.0,
) -> Tensor:
    """The definition, in plain torch; also what runs where there is no kernel."""
    logits = F.linear(hidden, weight.to(hidden.dtype)).flatten(0, -2)  # (N, V)
    if logits.dtype != torch.float64:
        logits = logits.float()
    flat = targets.flatten()
    if z_loss == 0:
        loss = F.cross_entropy(logits, flat, ignore_index=ignore_index, reduction=reduction)
        return loss.view(targets.shape) if reduction == "none" else loss
    loss = F.cross_entropy(logits, flat, ignore_index=ignore_index, reduction="none")
    keep = flat != ignore_index
    loss = loss + z_loss * logits.logsumexp(-1).square() * keep
    if reduction == "none":
        return loss.view(targets.shape)
    return loss.sum() / keep.sum() if reduction == "mean" else loss.sum()


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    z_loss: float = 0.0,
) -> Tensor:
    """`F.cross_entropy(F.linear(hidden, weight), targets)`, in a fraction of the memory.

    With gradients wanted and reduction "mean" or "sum", forward makes them too and backward takes next to no time; with
    "none", backward makes the logits once more. Of a vocabulary that is padded pass `weight[:vocab_size]`: a view costs
    nothing, and the padding is then not seen.

    Args:
        hidden: (..., C), float32, float64, bfloat16 or float16; any strides. Under autocast it is cast to its dtype.
        weight: (V, C), of hidden's dtype, or float32 where hidden has 16 bits: then it is cast for the matmuls, and its
            gradient is summed and returned in float32.
        targets: (...), int64, each in [0, V) or ignore_index. On a GPU looking at them would stall it: there a target
            that is neither makes its row's loss and gradient NaN.
        ignore_index: targets of this value count for nothing.
        reduction: "mean" over the targets that count (NaN if none does), "sum", or "none".
        z_loss: adds z_loss * logsumexp(logits)^2 to the loss of each row.

    Returns:
        the loss in nats, a scalar or with reduction "none" of targets' shape; float32 (float64 for float64).
        Differentiable once in hidden and weight.

    Raises:
        TypeError: an argument is no tensor or its dtype is not one of the above.
        ValueError: a shape, device or reduction does not fit, or on a CPU a target is neither in [0, V) nor
            ignore_index.
    """
    for name, t in (("hidden", hidden), ("weight", weight), ("targets", targets)):
        if not isinstance(t, Tensor):
            raise TypeError(f"linear_cross_entropy: {name} must be a tensor, got {type(t).__name__}")
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    check(hidden, weight, targets, ignore_index, reduction)
    if not registry.takes_kernel("linear_cross_entropy", hidden):
        return linear_cross_entropy_reference(
            hidden, weight, targets, ignore_index=ignore_index, reduction=reduction, z_loss=z_loss
        )
    needs = [torch.is_grad_enabled() and t.requires_grad for t in (hidden, weight)]
    rows = hidden.reshape(-1, hidden.shape[-1])
    loss = _call(rows, weight, targets.reshape(-1), ignore_index, reduction, float(z_loss), needs)
    return loss.view(targets.shape) if reduction == "none" else loss


def check(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> None:
    if hidden.dtype not in DTYPES:
        raise TypeError(
            f"linear_cross_entropy: hidden must be float32, float64, bfloat16 or float16, got {hidden.dtype}"
        )
    if weight.dtype != hidden.dtype and not (weight.dtype == torch.float32 and hidden.dtype.itemsize == 2):
        raise TypeError(
            f"linear_cross_entropy: weight must have hidden's dtype {hidden.dtype} (or float32 for a 16-bit hidden), "
            f"got {weight.dtype}"
        )
    if targets.dtype != torch.int64:
        raise TypeError(f"linear_cross_entropy: targets must be int64, got {targets.dtype}")
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(
            f"linear_cross_entropy: hidden must have a last dimension of at least 1, got shape {tuple(hidden.shape)}"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"linear_cross_entropy: weight must have shape (V, {hidden.shape[-1]}), V of at least 1, got "
            f"{tuple(weight.shape)}"
        )
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"linear_cross_entropy: targets must have shape {tuple(hidden.shape[:-1])} as hidden without its last "
            f"dimension, got {tuple(targets.shape)}"
        )
    for name, t in (("weight", weight), ("targets", targets)):
        if t.device != hidden.device:
            raise ValueError(
                f"linear_cross_entropy: {name} is on {t.device} but hidden is on {hidden.device}: move one of them"
            )
    if reduction not in REDUCTIONS:
        raise ValueError(f'linear_cross_entropy: reduction must be "mean", "sum" or "none", got {reduction!r}')
    # Fake tensors and those of torch.compile's tracing have no values to look at.
    if targets.is_cpu and type(targets) is Tensor and not torch.compiler.is_compiling() and targets.numel():
        low, high = targets.aminmax()
        if low < 0 or high >= weight.shape[0]:
            bad = targets[(targets != ignore_index) & ((targets < 0) | (targets >= weight.shape[0]))]
            if bad.numel():
                raise ValueError(
                    f"linear_cross_entropy: targets must be in [0, {weight.shape[0]}) or ignore_index {ignore_index}, "
                    f"got {int(bad[0])}"
                )


def _sums_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def through_chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    z_loss: float,
    needs: list[bool],
    factor: Tensor | None = None,
    dweight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows' losses (N,), and the gradients of the sum of factor * loss: dhidden, and dweight as its sums' dtype.

    dweight is written where it is given.
    """
    (N, C), V = hidden.shape, weight.shape[0]
    sums = _sums_dtype(hidden.dtype)
    weight = weight.to(hidden.dtype)
    if 1 not in weight.stride():
        weight = weight.contiguous()  # once, and not in each matmul
    targets = targets.contiguous()
    loss = hidden.new_empty(N, dtype=sums)
    dhidden = hidden.new_empty((N, C) if needs[0] else 0)
    if dweight is None:
        dweight = hidden.new_empty((V, C) if needs[1] else 0, dtype=sums)
    if N == 0:
        return loss, dhidden, dweight.zero_()
    # Chunks of equal size, in multiples of 64 rows. The buffer's rows begin on a cache line, whatever the vocabulary.
    chunks = -(-N // (CHUNK_ROWS[hidden.device.type] * 4 // hidden.dtype.itemsize))
    rows = min(N, -(-N // chunks // 64) * 64)
    buffer = hidden.new_empty(rows, -(-V // 64) * 64)
    buffer[:, V:] = 0  # oneDNN's bf16 matmul reads up to the end of a row; it multiplies that by 0, but NaN stays NaN
    for start in range(0, N, rows):
        part = slice(start, min(start + rows, N))
        h = hidden[part]
        logits = buffer[: len(h), :V]
        torch.mm(h, weight.t(), out=logits)
        torch.ops.fastgpt.cross_entropy_(
            logits,
            targets[part],
            loss[part],
            None if factor is None else factor[part],
            ignore_index,
            z_loss,
            any(needs),
        )
        if needs[0]:
            torch.mm(logits, weight, out=dhidden[part])
        if needs[1]:
            _add_product(dweight, logits.t(), h, first=start == 0)
    return loss, dhidden, dweight


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a @ b, or total = a @ b if it is the first; 16-bit products are summed in total's fp32."""
    beta = 0 if first else 1
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=beta)
    elif a.is_cuda and _adds_in_fp32(a.device, a.dtype):
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, beta=beta, out=total)
    else:  # the product is rounded to 16 bits, some rows at a time so that it need not be whole
        for start in range(0, len(total), WEIGHT_ROWS):
            part = slice(start, start + WEIGHT_ROWS)
            product = torch.mm(a[part], b)
            total[part].copy_(product) if first else total[part].add_(product)


@functools.cache
def _adds_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch has a matmul of 16-bit matrices that adds to an fp32 one, as cuBLAS has."""
    a, total = torch.zeros(16, 16, device=device, dtype=dtype), torch.zeros(16, 16, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(total, a, a, torch.float32, out=total)
    except RuntimeError:
        return False
    return True


def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    reduction: str,
    z_loss: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if reduction == "none":
        needs = [False, False]
    loss, dhidden, dweight = through_chunks(hidden, weight, targets, ignore_index, z_loss, needs)
    if reduction == "none":
        return loss, loss.new_ones(()), dhidden, dweight
    if reduction == "sum":
        return loss.sum(), loss.new_ones(()), dhidden, dweight
    count = (targets != ignore_index).sum().to(loss.dtype)
    return loss.sum() / count, count, dhidden, dweight


def _backward_kernel(
    dloss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    count: Tensor,
    dhidden: Tensor,
    dweight: Tensor,
    ignore_index: int,
    z_loss: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    factor = _factor(dloss, count)
    if all(made.numel() or not need for made, need in zip((dhidden, dweight), needs, strict=True)):
        return _times(dhidden, factor, hidden.dtype), _times(dweight, factor, weight.dtype)
    factor = factor.expand(len(hidden)).contiguous()
    _, dhidden, dweight = through_chunks(hidden, weight, targets, ignore_index, z_loss, needs, factor)
    return dhidden, dweight.to(weight.dtype)


def _factor(dloss: Tensor, count: Tensor) -> Tensor:
    """What the rows' gradients are multiplied by. Where no target counts, torch's are 0 though its loss is NaN."""
    return dloss / count.clamp(min=1)


def _times(t: Tensor, factor: Tensor, dtype: torch.dtype, in_place: bool = False) -> Tensor:
    """t * factor in `dtype`, in t's memory if `in_place` and its dtype allow."""
    # of one element but t's dimensions, because a scalar tensor would itself be rounded to a 16-bit t's dtype first
    factor = factor.view([1] * t.dim())
    if t.is_cuda:  # one pass, the conversion in it
        return torch.mul(t, factor, out=t if in_place and dtype == t.dtype else torch.empty_like(t, dtype=dtype))
    if in_place and factor.item() == 1:
        return t.to(dtype)
    return (torch.mul(t, factor, out=t) if in_place else t * factor).to(dtype)


@torch.library.register_fake("fastgpt::linear_cross_entropy")
def _fake(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    reduction: str,
    z_loss: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sums = _sums_dtype(hidden.dtype)
    needs = [need and reduction != "none" for need in needs]
    return (
        hidden.new_empty(targets.shape if reduction == "none" else (), dtype=sums),
        hidden.new_empty((), dtype=sums),
        hidden.new_empty(hidden.shape if needs[0] else (0,)),
        hidden.new_empty(weight.shape if needs[1] else (0,), dtype=sums),
    )


@torch.library.register_fake("fastgpt::linear_cross_entropy_backward")
def _fake_backward(
    dloss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    count: Tensor,
    dhidden: Tensor,
    dweight: Tensor,
    ignore_index: int,
    z_loss: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape if needs[0] else (0,)), weight.new_empty(weight.shape if needs[1] else (0,))


@torch.library.register_fake("fastgpt::cross_entropy_")
def _fake_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    loss: Tensor,
    factor: Tensor | None,
    ignore_index: int,
    z_loss: float,
    gradient: bool,
) -> None:
    return None


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, ctx.ignore_index, _, ctx.z_loss, _ = inputs
    ctx.save_for_backward(hidden, weight, targets, *output[1:])


def _backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, _targets, count, dhidden, dweight = saved = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:2])
    if _may_overwrite(ctx) and all(t.numel() or not need for t, need in zip((dhidden, dweight), needs, strict=True)):
        factor = _factor(dloss, count)
        dhidden = _times(dhidden, factor, hidden.dtype, in_place=True)
        grads = dhidden, _times(dweight, factor, weight.dtype, in_place=True)
    else:
        grads = registry.call_below_autograd(
            "linear_cross_entropy_backward", dloss, *saved, ctx.ignore_index, ctx.z_loss, needs
        )
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None, None, None)


def _may_overwrite(ctx: Any) -> bool:
    """Whether what forward saved is this backward's own, which is run, not to be differentiated, and the last one."""
    return (
        ctx.direct
        and not torch.is_grad_enabled()
        and not registry.is_transformed()
        and not torch._C._autograd._get_current_graph_task_keep_graph()
    )


def _cross_entropy_triton(*args: Any) -> None:
    from fastgpt.ops.triton.cross_entropy import cross_entropy_  # not above: importing Triton takes a while

    cross_entropy_(*args)


_HAS_PASS = {
    "cpu": torch._C._dispatch_has_kernel_for_dispatch_key("fastgpt::cross_entropy_", "CPU"),
    "cuda": bool(torch.version.cuda) and importlib.util.find_spec("triton") is not None,
}
for _device in [device for device, there in _HAS_PASS.items() if there]:
    torch.library.impl("fastgpt::linear_cross_entropy", _device, _forward)
    torch.library.impl("fastgpt::linear_cross_entropy_backward", _device, _backward_kernel)
if _HAS_PASS["cuda"]:
    torch.library.impl("fastgpt::cross_entropy_", "cuda", _cross_entropy_triton)
_call = registry.differentiable("linear_cross_entropy", save=_save, backward=_backward, launcher=_forward)
registry.register(
    "linear_cross_entropy",
    cpu="C++",
    cuda="Triton",
    because="the library's matmuls over chunks of rows, and its own pass over their logits",
)
