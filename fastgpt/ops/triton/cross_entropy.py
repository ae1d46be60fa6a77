"""Cross-entropy of rows of logits in Triton, each row then overwritten with its gradient.

For a row x of width V with target t:

    m = max(x)      o = sum over j != t of exp(x_j - m)      s = o + exp(x_t - m)      lse = m + log(s)
    loss = lse - x_t + z lse^2

and with p = exp(x - m) / s, times the row's factor g:

    dx_j = g (1 + 2 z lse) p_j          dx_t = g (2 z lse p_t - o / s)

p_t - 1 is -o / s: where the target is nearly certain, both 1 and p_t round to the same number and their difference to
nothing, while o keeps all its digits.

A program has one row and walks over it in blocks: first with a running maximum and sum, then to write the gradient.
Whole blocks have no mask, which would cost them their 16-byte loads where V is no multiple of 16, as 50,257; what is
left over goes in smaller ones.
The 264 rows of 101 KB (50,304 in 16 bits) that an H100 or H200 has at work are 27 MB, so that the second reading comes
from L2 (50 MB). The whole row as one tile would need 64 registers a thread for itself at 32 warps, and spills.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, TAIL = 8192, 1024


@triton.jit
def add_block(Row, at, V, t, maximum, others, MASKED: tl.constexpr, ACC: tl.constexpr):
    """The running maximum, and sum of exp(x - maximum) without the target's, after the block of columns `at`."""
    x = tl.load(Row + at, at < V if MASKED else None, -float("inf") if MASKED else None, eviction_policy="evict_last")
    x = x.to(ACC)
    new = tl.maximum(maximum, tl.max(x, 0))
    # exp(-inf - -inf) is NaN, which a block of nothing but -inf must not give
    base = tl.where(new == -float("inf"), 0.0, new).to(ACC)
    e = tl.where(at == t, 0.0, tl.exp(x - base))
    return new, others * tl.exp(maximum - base) + tl.sum(e, 0)


@triton.jit
def write_block(Row, at, V, t, maximum, scale, at_target, MASKED: tl.constexpr, ACC: tl.constexpr):
    """dx = scale * exp(x - maximum), and at_target for the target."""
    mask = at < V if MASKED else None
    x = tl.load(Row + at, mask, eviction_policy="evict_first").to(ACC)
    dx = tl.where(at == t, at_target, tl.exp(x - maximum) * scale)
    tl.store(Row + at, dx.to(Row.dtype.element_ty), mask)


@triton.jit
def cross_entropy_rows(
    Logits,
    Targets,
    Loss,
    Factor,
    stride,
    V,
    ignore_index,
    Z_LOSS: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    GRADIENT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    Row = Logits + row * stride
    target = tl.load(Targets + row)
    columns = tl.arange(0, BLOCK)
    few = tl.arange(0, TAIL)
    if (target == ignore_index) | (target < 0) | (target >= V):
        fill = tl.where(target == ignore_index, 0.0, float("nan"))
        tl.store(Loss + row, fill.to(ACC))
        if GRADIENT:
            zeros = tl.zeros([BLOCK], ACC) + fill.to(ACC)
            for start in range(0, V, BLOCK):
                tl.store(Row + start + columns, zeros.to(Row.dtype.element_ty), start + columns < V)
    else:
        t = target.to(tl.int32)
        x_target = tl.load(Row + t).to(ACC)
        maximum = x_target
        others = tl.full((), 0.0, ACC)
        whole = V // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            maximum, others = add_block(Row, start + columns, V, t, maximum, others, False, ACC)
        for start in range(whole, V, TAIL):
            maximum, others = add_block(Row, start + few, V, t, maximum, others, True, ACC)
        e_target = tl.exp(x_target - maximum)
        total = others + e_target
        # log(total), which where the target is nearly certain is log1p(others), of which three terms are exact enough
        series = others * (1 - others * (0.5 - others / 3))
        log_total = tl.where((x_target == maximum) & (others < 0.001), series, tl.log(total))
        lse = maximum + log_total
        tl.store(Loss + row, log_total - (x_target - maximum) + Z_LOSS * lse * lse)
        if GRADIENT:
            g = 1 / total
            if HAS_FACTOR:
                g *= tl.load(Factor + row)
            scale = g * (1 + 2 * Z_LOSS * lse)
            at_target = g * (2 * Z_LOSS * lse * e_target - others)
            for start in range(0, whole, BLOCK):
                write_block(Row, start + columns, V, t, maximum, scale, at_target, False, ACC)
            for start in range(whole, V, TAIL):
                write_block(Row, start + few, V, t, maximum, scale, at_target, True, ACC)


def cross_entropy_(
    logits: Tensor,
    targets: Tensor,
    loss: Tensor,
    factor: Tensor | None,
    ignore_index: int,
    z_loss: float,
    gradient: bool,
) -> None:
    """Launches it over the rows of `logits` (N, V); see `fastgpt::cross_entropy_`."""
    n, V = logits.shape
    if n == 0:
        return
    if logits.stride(1) != 1 and V > 1:
        raise ValueError(f"cross_entropy_: logits must have contiguous rows, got strides {logits.stride()}")
    block = min(BLOCK, max(128, triton.next_power_of_2(V)))
    with torch.accelerator.device_index(logits.get_device() if logits.is_cuda else None):
        cross_entropy_rows[(n,)](
            logits,
            targets,
            loss,
            factor,
            logits.stride(0),
            V,
            ignore_index,
            Z_LOSS=z_loss,
            HAS_FACTOR=factor is not None,
            GRADIENT=gradient,
            ACC=tl.float64 if logits.dtype == torch.float64 else tl.float32,
            BLOCK=block,
            TAIL=min(TAIL, block),
            num_warps=max(4, block // 512),
            enable_fp_fusion=True,  # of x * log2(e) - m * log2(e); Triton 3.10 will no longer do so by itself
        )
