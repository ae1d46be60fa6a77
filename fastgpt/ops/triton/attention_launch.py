"""Launches the attention kernels: tile sizes, the number of splits, outputs and strides.

The tile sizes are a frozen table, so that nothing is tuned while a user waits and results do not depend on what a
timing run picked. They were chosen from what the compiler gives for sm_80, sm_90 and sm_100 (no spill, wgmma, shared
memory for two programs an SM where it fits) and have not been timed on a GPU yet.
"""

import functools
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastgpt.ops import philox
from fastgpt.ops.attention_cpu import empty_grads, heads_last
from fastgpt.ops.triton.attention import attention_forward, combine, document_spans
from fastgpt.ops.triton.attention_backward import attention_backward_kv, attention_backward_q


class Tile(NamedTuple):
    block_m: int
    block_n: int
    warps: int
    stages: int


class Config(NamedTuple):
    """One row of the table: forward, forward of at most 16 rows, and the two kernels of backward."""

    forward: Tile
    decode: Tile
    backward_q: Tile
    backward_kv: Tile


MAX_HEAD_DIM = 256
DECODE_ROWS = 16  # tl.dot's smallest tile: up to so many rows the columns are split over programs instead
MAX_SPLITS = 128
DECODE_PROGRAMS = 4  # decode programs that an SM runs at a time: 4 warps and at most 50 KB of shared memory each
LOG2_E = math.log2(math.e)
OPTIONS = {"enable_fp_fusion": True}  # s * scale - base in one instruction; Triton 3.10 will no longer do so by itself


def padded(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


# By padded head dimension, for 16-bit numbers. Hopper and Blackwell have 227 KB of shared memory a program...
LARGE = {
    16: Config(Tile(128, 64, 4, 3), Tile(16, 128, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
    32: Config(Tile(128, 64, 8, 3), Tile(16, 128, 4, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
    64: Config(Tile(128, 64, 8, 3), Tile(16, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 2)),
    # backward_kv spills here, in 32 to 69 instructions (Triton 3.9; the causal one not with 3.6). Tiles that do not,
    # (32, 64) and (16, 128), have wgmmas half as wide, which wait for shared memory.
    128: Config(Tile(128, 64, 8, 3), Tile(16, 64, 4, 2), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    256: Config(Tile(64, 32, 8, 2), Tile(16, 32, 4, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 1)),
}
# ... A100 has 163 KB, and the consumer's Ampere, Ada and Blackwell 99: this half of the table stays below that.
SMALL = {
    16: Config(Tile(128, 64, 8, 3), Tile(16, 128, 4, 3), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)),
    32: Config(Tile(64, 64, 4, 3), Tile(16, 128, 4, 3), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)),
    64: Config(Tile(64, 64, 4, 3), Tile(16, 64, 4, 3), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)),
    128: Config(Tile(128, 32, 8, 3), Tile(16, 64, 4, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 1)),
    256: Config(Tile(64, 32, 8, 2), Tile(16, 32, 4, 2), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
}
# fp32 is multiplied exactly as torch does it, without tensor cores: its tiles are small, as all of it is in registers.
FP32 = {
    16: Config(Tile(32, 32, 4, 2), Tile(16, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    32: Config(Tile(32, 32, 4, 2), Tile(16, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    64: Config(Tile(32, 32, 4, 2), Tile(16, 32, 4, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 2)),
    128: Config(Tile(16, 16, 4, 2), Tile(16, 32, 8, 2), Tile(32, 16, 8, 2), Tile(32, 16, 8, 2)),
    256: Config(Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 2), Tile(16, 16, 8, 1)),
}


def config(dtype: torch.dtype, head_dim: int, arch: int, dropout: bool = False) -> Config:
    table = FP32 if dtype == torch.float32 else LARGE if arch in (90, 100, 103) else SMALL
    row = table[padded(head_dim)]
    if dropout and head_dim > 64 and dtype != torch.float32:  # its random numbers need registers
        row = row._replace(backward_kv=row.backward_kv._replace(block_m=row.backward_kv.block_m // 2))
    return row


@functools.cache
def splits_for(heads: int, blocks: int, slots: int) -> int:
    """How many programs share the `blocks` column blocks of each of `heads` heads, on a GPU with `slots` at a time.

    The one whose last wave ends first, if a program takes one block's time to begin and to end; of equals the fewest.
    """
    best, best_time = 1, float("inf")
    for splits in range(1, min(blocks, MAX_SPLITS) + 1):
        each = -(-blocks // splits)
        if -(-blocks // each) != splits:  # some would have nothing to do
            continue
        time = -(-heads * splits // slots) * (each + 1) + (splits > 1)
        if time < best_time:
            best, best_time = splits, time
    return best


def combine_warps(splits: int, head_dim: int) -> int:
    """`combine` holds all parts of a row in registers: at most 64 numbers a thread."""
    return max(4, triton.next_power_of_2(splits) * padded(head_dim) // 2048)


@functools.cache
def _sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _arch(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever its tensors are on."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _rows_contiguous(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.size(-1) == 1 else t.contiguous()


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"


def spans(cu_seqlens: Tensor, B: int, T: int) -> Tensor:
    """(2, B, T) int32: where each token's document begins and ends within its row; see `document_spans`."""
    out = torch.empty((2, B, T), device=cu_seqlens.device, dtype=torch.int32)
    n = cu_seqlens.numel()
    with _on(cu_seqlens.device):
        document_spans[(triton.cdiv(B * T, 512),)](
            cu_seqlens, out, n, B * T, T, n.bit_length() + 1, BLOCK=512, num_warps=4
        )
    return out


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    tile: Tile | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, T_q, D), of q's dtype, and logsumexp (B, H, T_q), fp32 and to base 2.

    `tile` and `splits` are for tests; they are picked otherwise.
    """
    B, H, T_q, D = q.shape
    T_k = k.size(2)
    out = heads_last(q)
    lse = torch.empty((B, H, T_q), device=q.device, dtype=torch.float32)
    if out.numel() == 0 or T_k == 0:
        return out.zero_(), lse.fill_(math.inf)
    q, k, v = map(_rows_contiguous, (q, k, v))
    dropout = dropout_p > 0.0
    if tile is None:
        table = config(q.dtype, D, _arch(q.device), dropout)
        small = T_q <= DECODE_ROWS
        tile = table.decode if small else table.forward
        if small and not dropout and cu_seqlens is None and splits is None:
            splits = splits_for(B * H, triton.cdiv(T_k, tile.block_n), DECODE_PROGRAMS * _sms(q.device))
    splits = splits or 1
    blocks_each = triton.cdiv(triton.cdiv(T_k, tile.block_n), splits)
    partial, partial_lse, stride_split = out, lse, 0
    if splits > 1:
        partial = torch.empty((splits, B, H, T_q, D), device=q.device, dtype=torch.float32)
        partial_lse = torch.empty((splits, B, H, T_q), device=q.device, dtype=torch.float32)
        stride_split = partial.stride(0)
    with _on(q.device):
        attention_forward[(triton.cdiv(T_q, tile.block_m) * splits * B * H,)](
            q, k, v, partial, partial_lse, seed if dropout else None,
            None if cu_seqlens is None else spans(cu_seqlens, B, T_q),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], stride_split, *partial.stride()[-4:-1],
            H, T_q, T_k, B * T_q, blocks_each, scale * LOG2_E, philox.threshold(dropout_p),
            philox.inverse_keep(dropout_p),
            D=D, BLOCK_D=padded(D), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, SPLITS=splits, CAUSAL=causal,
            DOCS=cu_seqlens is not None, DROPOUT=dropout, PRECISION=_precision(q.dtype),
            num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
        )  # fmt: skip
        if splits > 1:
            combine[(B * H * T_q,)](
                partial, partial_lse, out, lse, *out.stride()[:3], H, T_q, B * H * T_q,
                D=D, BLOCK_D=padded(D), SPLITS=splits, BLOCK_S=triton.next_power_of_2(splits),
                num_warps=combine_warps(splits, D), **OPTIONS,
            )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    together: bool = False,
    tiles: tuple[Tile, Tile] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from what `forward` took and gave.

    `together` is as for `attention_cpu.empty_grads`; `tiles` is for tests.
    """
    B, H, T_q, D = q.shape
    T_k = k.size(2)
    dq, dk, dv = empty_grads(q, k, v, together)
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    q, k, v, out, dout = map(_rows_contiguous, (q, k, v, out, dout))
    delta = torch.empty_like(lse)
    dropout = dropout_p > 0.0
    if tiles is None:
        table = config(q.dtype, D, _arch(q.device), dropout)
        tiles = table.backward_q, table.backward_kv
    for_q, for_kv = tiles
    document_spans = None if cu_seqlens is None else spans(cu_seqlens, B, T_q)
    numbers = (
        H, T_q, T_k, B * T_q, scale, scale * LOG2_E, philox.threshold(dropout_p), philox.inverse_keep(dropout_p),
    )  # fmt: skip
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    switches: dict[str, Any] = dict(
        D=D, BLOCK_D=padded(D), CAUSAL=causal, DOCS=cu_seqlens is not None, DROPOUT=dropout,
        PRECISION=_precision(q.dtype), **OPTIONS,
    )  # fmt: skip
    with _on(q.device):
        attention_backward_q[(triton.cdiv(T_q, for_q.block_m) * B * H,)](
            q, k, v, out, dout, lse, delta, dq, seed if dropout else None, document_spans,
            *strides, *out.stride()[:3], *dout.stride()[:3], *dq.stride()[:3], *numbers,
            BLOCK_M=for_q.block_m, BLOCK_N=for_q.block_n, num_warps=for_q.warps, num_stages=for_q.stages, **switches,
        )  # fmt: skip
        attention_backward_kv[(triton.cdiv(T_k, for_kv.block_n) * B * H,)](
            q, k, v, dout, lse, delta, dk, dv, seed if dropout else None, document_spans,
            *strides, *dout.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], *numbers,
            BLOCK_M=for_kv.block_m, BLOCK_N=for_kv.block_n, num_warps=for_kv.warps, num_stages=for_kv.stages,
            **switches,
        )  # fmt: skip
    return dq, dk, dv
