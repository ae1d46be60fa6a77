"""Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762), causal unless told otherwise.

For each head, with q (T_q, D), k and v (T_k, D), and rows i of q that see columns [start_i, end_i) of k and v:

    s = scale * q k^T           scale = 1 / sqrt(D) unless given
    p = softmax over the columns that a row sees, 0 elsewhere; all 0 in a row that sees none
    o = (z * p / keep) v        z in {0, 1} is dropout's (philox.py), keep = 1 - p_drop

and backwards, with delta_i = do_i . o_i and dp = z / keep * (do v^T):

    ds = p * (dp - delta)       dq = scale * ds k       dk = scale * ds^T q       dv = (z * p / keep)^T do

Causal: row i sees columns up to i + T_k - T_q, so that the last row sees all. Documents: a token sees those of its own.

Saved for backward: q, k, v, o and one logsumexp a row, in fp32. Neither p nor z is: they are made again.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops import attention_cpu, attention_table, philox, registry
from fastgpt.ops.attention_spans import check_boundaries, spans
from fastgpt.ops.registry import DTYPES

MAX_HEAD_DIM = 256  # of the Triton kernels: an output row has to fit in registers

_COMMON = "bool causal, float scale, float dropout_p, Tensor? seed, Tensor? cu_seqlens"
torch.library.define("fastgpt::attention", f"(Tensor q, Tensor k, Tensor v, {_COMMON}) -> (Tensor, Tensor)")
torch.library.define(
    "fastgpt::attention_backward",
    f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor logsumexp, {_COMMON}) -> (Tensor, Tensor, Tensor)",
)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The definition, in plain torch; also what runs where there is no kernel."""
    B, H, T_q, D = q.shape
    T_k = k.size(2)
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        check_boundaries(cu_seqlens, B * T_q)
    scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(D) if scale is None else scale)  # (B, H, T_q, T_k)
    start, end = (t[:, None, :, None] for t in spans(q, k, causal, cu_seqlens))  # (1 or B, 1, T_q, 1)
    column = torch.arange(T_k, device=q.device)
    seen = (column >= start) & (column < end)  # (1 or B, 1, T_q, T_k)
    scores = scores.masked_fill(~seen, -math.inf)
    weights = torch.softmax(scores, -1).masked_fill(~seen, 0.0)  # a row of -inf only is NaN, and to be 0
    if philox.threshold(dropout_p):
        kept = philox.keep_mask(_seed(seed, q), B * H, T_q, T_k, dropout_p).view(B, H, T_q, T_k)
        weights = weights * kept * philox.inverse_keep(dropout_p)
    return weights @ v


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Attention of each row of `q` over the rows of `k` and `v` that it sees.

    Args:
        q: (B, H, T_q, D), float32, float64, bfloat16 or float16. Views of a fused projection are taken as they are:
            any strides, though a last dimension that is not contiguous is copied.
        k, v: (B, H, T_k, D), of q's dtype.
        causal: row i sees columns up to i + T_k - T_q: aligned at the bottom right, as with a KV cache, so that the
            last row sees all. A row that sees nothing gives 0.
        scale: what the dot products are multiplied by, above 0; 1 / sqrt(D) if None.
        dropout_p: the probability, in [0, 1), that dropout sets a weight to 0; rounded to a multiple of 2^-16. It is
            applied whenever it is not 0: pass 0 in evaluation.
        seed: of dropout. The mask depends on it and on the positions in (B * H, T_q, T_k) and on nothing else, on any
            device. An int, or one int64 on q's device (a CUDA graph can be replayed with another); if None, torch's
            generator for the device draws it.
        cu_seqlens: (n + 1,) int32 on q's device, T_q = T_k: boundaries of documents over the B * T tokens of the
            batch, row after row: 0, ascending, B * T. No token sees another document's, or another batch row's. It may
            be padded with B * T. Its values are checked on a CPU; on a GPU, which would have to be waited for, wrong
            ones give wrong results, but no access out of bounds.

    Returns:
        (B, H, T_q, D), of q's dtype; where q is a view of a fused projection it lies as (B, T_q, H, D), so that joining
        the heads again is a view. Differentiable once in q, k and v; bitwise the same from run to run.

    Raises:
        TypeError: an argument is no tensor or its dtype is not one of the above.
        ValueError: a shape, device or number does not fit.
    """
    if not _is_usual(q, k, v, scale, dropout_p, seed, cu_seqlens):
        _check(q, k, v, scale, dropout_p, seed, cu_seqlens)
    scale = 1 / math.sqrt(q.size(3)) if scale is None else float(scale)
    if not philox.threshold(dropout_p):
        dropout_p = 0.0
    route = _route(q, k, v, causal, dropout_p, cu_seqlens)
    if route == "reference":
        return attention_reference(
            q, k, v, causal=causal, scale=scale, dropout_p=dropout_p, seed=seed, cu_seqlens=cu_seqlens
        )
    if route == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal and q.size(2) > 1, scale=scale)
    return _call(q, k, v, causal, scale, dropout_p, _seed(seed, q) if dropout_p else None, cu_seqlens)


def _route(q: Tensor, k: Tensor, v: Tensor, causal: bool, dropout_p: float, cu_seqlens: Tensor | None) -> str:
    """What to run: "reference", "kernel", or "sdpa" where torch's public function alone does it."""
    if not registry.takes_kernel("attention", q):
        return "reference"
    T_q, T_k = q.size(2), k.size(2)
    plain = dropout_p == 0 and cu_seqlens is None and (T_q == T_k or T_q == 1 or not causal) and T_k > 0 < T_q
    if q.device.type == "cpu":
        if dropout_p and not attention_cpu.HAS_DROPOUT:
            return "reference"
        # Through torch's own autograd: in Python it takes 20 us more each way, and 150 with cold caches. But rows that
        # are not contiguous would make it take its unfused path.
        own = attention_cpu.takes_causal(q, k, causal, dropout_p, cu_seqlens)
        return "sdpa" if plain and not own and q.stride(3) == k.stride(3) == v.stride(3) == 1 else "kernel"
    major, minor = torch.cuda.get_device_capability(q.device)
    if q.dtype == torch.float64 or q.size(3) > MAX_HEAD_DIM or major < 8:  # before Ampere there is no bf16
        return "reference"
    if plain and causal and T_q == T_k and attention_table.sdpa_is_faster(10 * major + minor, q.size(3), T_q):
        return "sdpa"
    return "kernel"


def _seed(seed: int | Tensor | None, q: Tensor) -> Tensor:
    """One int64 on q's device, without waiting for it."""
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), device=q.device)
    if isinstance(seed, Tensor):
        return seed
    return torch.full((), (seed + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=q.device)


def _is_usual(q: Any, k: Any, v: Any, scale: Any, dropout_p: Any, seed: Any, cu_seqlens: Any) -> bool:
    """Whether there is nothing to check: one query over 64 keys takes 11 us on a CPU, and the checks took another 5."""
    return (
        scale is None
        and seed is None
        and cu_seqlens is None
        and dropout_p == 0
        and type(q) is Tensor
        and type(k) is Tensor
        and type(v) is Tensor
        and q.dim() == 4
        and k.dtype is q.dtype
        and v.dtype is q.dtype
        and q.dtype in DTYPES
        and k.shape == v.shape
        and k.device == q.device
        and v.device == q.device
        and (shape := q.shape)[:2] == k.shape[:2]
        and shape[3] == k.shape[3] > 0
    )


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    dropout_p: float,
    seed: int | Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor):
            raise TypeError(f"attention: {name} must be a tensor, got {type(t).__name__}")
        dtype = t.dtype
        if dtype not in DTYPES:
            raise TypeError(f"attention: {name} must be float32, float64, bfloat16 or float16, got {dtype}")
        if dtype != q.dtype:
            raise TypeError(f"attention: {name} must have q's dtype {q.dtype}, got {dtype}")
        if t.dim() != 4:
            raise ValueError(f"attention: {name} must have shape (B, H, T, D), got {tuple(t.shape)}")
        if t.device != q.device:
            raise ValueError(f"attention: {name} is on {t.device} but q is on {q.device}: move one of them")
    B, H, T, D = q.shape
    if D == 0:
        raise ValueError(f"attention: q must have a head dimension of at least 1, got shape {tuple(q.shape)}")
    if k.size(0) != B or k.size(1) != H or k.size(3) != D:
        raise ValueError(
            f"attention: k must have shape ({B}, {H}, T_k, {D}) as q {tuple(q.shape)} has, got {tuple(k.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"attention: v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"attention: scale must be finite and above 0, got {scale}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"attention: dropout_p must be at least 0 and below 1, got {dropout_p}")
    if isinstance(seed, Tensor) and (seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != q.device):
        raise ValueError(
            f"attention: seed must be one int64 on {q.device}, got {seed.dtype} of shape {tuple(seed.shape)} on "
            f"{seed.device}"
        )
    if seed is not None and not isinstance(seed, int | Tensor):
        raise TypeError(f"attention: seed must be an int or a tensor, got {type(seed).__name__}")
    if cu_seqlens is None:
        return
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32:
        got = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"attention: cu_seqlens must be an int32 tensor, got {got}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"attention: cu_seqlens must have shape (n + 1,), got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != q.device:
        raise ValueError(f"attention: cu_seqlens is on {cu_seqlens.device} but q is on {q.device}: move one of them")
    if k.size(2) != T:
        raise ValueError(f"attention: cu_seqlens must come with as many rows of k as of q, got {k.size(2)} and {T}")


@torch.library.register_fake("fastgpt::attention")
def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
        return attention_cpu.empty_as(q), attention_cpu.empty_logsumexp(q)
    return attention_cpu.heads_last(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("fastgpt::attention_backward")
def _fake_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(attention_cpu.heads_last(t) for t in (q, k, v))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, causal, scale, dropout_p, seed, cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, *output, seed, cu_seqlens)
    ctx.options = causal, scale, dropout_p


def _backward(ctx: Any, dout: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, seed, cu_seqlens = ctx.saved_tensors
    args = (dout, *tensors, *ctx.options, seed, cu_seqlens)
    if ctx.direct and not torch.is_grad_enabled():
        with torch._C._AutoDispatchBelowAutograd():
            grads = _module(dout).backward(*args, together=True)
    else:
        grads = registry.call_below_autograd("attention_backward", *args)
    return *grads, None, None, None, None, None


try:
    if not torch.version.cuda:
        raise ImportError("torch was built without CUDA")
    from fastgpt.ops.triton import attention_launch
except ImportError:
    pass
else:
    torch.library.impl("fastgpt::attention", "cuda")(attention_launch.forward)
    torch.library.impl("fastgpt::attention_backward", "cuda")(attention_launch.backward)
torch.library.impl("fastgpt::attention", "cpu")(attention_cpu.forward)
torch.library.impl("fastgpt::attention_backward", "cpu")(attention_cpu.backward)


def _module(t: Tensor) -> Any:
    return attention_cpu if t.device.type == "cpu" else attention_launch


def _launch(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _module(q).forward(q, *args)


_call = registry.differentiable("attention", save=_save, backward=_backward, launcher=_launch)
registry.register(
    "attention",
    cpu="C++ and SDPA",
    cuda="Triton",
    because={
        "cpu": ("C++ for causal training in fp32, else " if attention_cpu.HAS_CAUSAL else "")
        + "torch's flash kernel, called so that it skips what is masked; "
        + ("dropout is in C++" if attention_cpu.HAS_DROPOUT else "dropout takes the reference, as no C++ is built"),
        "cuda": attention_table.describe(),
    },
)
