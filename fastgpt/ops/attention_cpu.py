"""Attention on CPUs: a C++ kernel for what training does in fp32 on AVX-512; else torch's own flash kernel (the one
behind F.scaled_dot_product_attention), put together so that it skips what no row sees; and the matmuls with one C++
pass between them where there is dropout, which both lack.

The C++ kernel takes 0.6 to 0.8 of the flash kernel's time, forward and backward, on square causal heads of 64 to 2048
tokens, and documents of any length in one call. Of the flash kernel, what measured fastest on two cores, fp32, 12 heads
of 64:
    square causal            the kernel's own causal mode, which skips the blocks above the diagonal
    one row                  no mask: it sees all columns
    fewer rows than columns  an additive mask; the columns before the square apart, joined by logsumexp, was no faster
    more rows than columns   the first rows see nothing and are 0; the rest is square
    documents                each a call on views, so that nothing is computed across them; short ones under a mask
"""

import math

import torch
from torch import Tensor

from fastgpt.ops import philox, registry  # noqa: F401 (registry loads the extension)
from fastgpt.ops.attention_spans import check_boundaries, documents, spans

# Scores of as many heads at a time as make up 4 MiB in fp32: few enough to stay in a core's cache between the passes.
CHUNK = 1 << 20

torch.library.define(
    "fastgpt::attention_dropout_",
    "(Tensor(a!) scores, Tensor starts, Tensor ends, Tensor seed, int first_head, float scale, int threshold, "
    "float inv_keep) -> Tensor",
)
torch.library.define(
    "fastgpt::attention_dropout_backward_",
    "(Tensor(a!) scores, Tensor(b!) dp, Tensor lse, Tensor starts, Tensor ends, Tensor seed, "
    "int first_head, float scale, int threshold, float inv_keep) -> ()",
)
torch.library.define(
    "fastgpt::attention_causal_",
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor(b!) lse, Tensor segments, float scale) -> ()",
)
torch.library.define(
    "fastgpt::attention_causal_backward_",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, "
    "Tensor segments, float scale) -> ()",
)
HAS_DROPOUT = torch._C._dispatch_has_kernel_for_dispatch_key("fastgpt::attention_dropout_", "CPU")
HAS_CAUSAL = (
    torch._C._dispatch_has_kernel_for_dispatch_key("fastgpt::attention_causal_", "CPU")
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
)
MIN_SCORES, MAX_LENGTH = 1 << 17, 2048  # B * H * T * T and T from which, and up to which, the C++ kernel was faster
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def takes_causal(q: Tensor, k: Tensor, causal: bool, dropout_p: float, cu_seqlens: Tensor | None) -> bool:
    """Whether the C++ kernel for square causal attention takes it, and is faster."""
    B, H, T, D = q.shape
    return (
        HAS_CAUSAL
        and q.dtype is torch.float32
        and causal
        and T == k.size(2) <= MAX_LENGTH
        and D % 16 == 0
        and B * H * T * T >= MIN_SCORES
        and torch.get_num_threads() <= B * H  # it gives each thread whole heads
        and (T > 32 or cu_seqlens is not None)  # it computes 32 rows at a time
        and not philox.threshold(dropout_p)
    )


def _segments(q: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(n, 3): batch row, first token and end of each sequence."""
    B, _, T, _ = q.shape
    boundaries = [0, B * T] if cu_seqlens is None else cu_seqlens.tolist()
    return torch.tensor(documents(boundaries, B, T))


def _rows_contiguous(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _bias(q: Tensor, k: Tensor, causal: bool) -> Tensor | None:
    """Added to the scores where causality is not square: (T_q, T_k), 0 or -inf."""
    if not causal or q.size(2) == 1:
        return None
    return q.new_full((q.size(2), k.size(2)), -math.inf).triu_(1 + k.size(2) - q.size(2))


def _documents_bias(q: Tensor, causal: bool, cu_seqlens: Tensor) -> Tensor:
    """The same for documents: (B, 1, T, T)."""
    start, end = (t[:, None, :, None] for t in spans(q, q, causal, cu_seqlens))
    column = torch.arange(q.size(2))
    bias = q.new_zeros((q.size(0), 1, q.size(2), q.size(2)))
    return bias.masked_fill_((column < start) | (column >= end), -math.inf)


def _apart(q: Tensor, parts: list[tuple[int, int, int]]) -> bool:
    """Whether documents are faster each in a call of its own than all in one with a mask.

    A call took 0.23 ms forward and backward (12 heads, fp32) and 1.15 (bf16), however short the document; a row of T
    tokens with a mask took 1.35e-4 T^2 and 8.1e-5 T^2 ms.
    """
    B, _, T, _ = q.shape
    return len(parts) <= B * (1 + T * T / (1000 if q.dtype in (torch.float32, torch.float64) else 14000))


def empty_as(t: Tensor) -> Tensor:
    """As the flash kernel's output lies: in t's order of dimensions, (B, T, H, D) for views of a fused projection."""
    return torch.empty_like(_rows_contiguous(t))


def heads_last(t: Tensor) -> Tensor:
    """As its gradients lie: always (B, T, H, D)."""
    B, H, T, D = t.shape
    return t.new_empty((B, T, H, D)).transpose(1, 2)


def empty_grads(q: Tensor, k: Tensor, v: Tensor, together: bool) -> tuple[Tensor, Tensor, Tensor]:
    """For the gradients of q, k and v: `together`, if their shapes allow it, as the views of one fused (B, T, 3, H, D).

    `split_heads` then hands it on as it is. Not from an op that the dispatcher sees: its outputs must not overlap.
    """
    B, H, T, D = q.shape
    if together and q.shape == k.shape:
        dq, dk, dv = q.new_empty((B, T, 3, H, D)).permute(2, 0, 3, 1, 4)
        return dq, dk, dv
    return heads_last(q), heads_last(k), heads_last(v)


def empty_logsumexp(q: Tensor) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((q.size(0), q.size(2), q.size(1)), dtype=dtype).transpose(1, 2)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, T_q, D) and logsumexp (B, H, T_q), +inf for a row that sees nothing."""
    q, k, v = map(_rows_contiguous, (q, k, v))
    B, _, T_q, _ = q.shape
    T_k = k.size(2)
    blind = max(0, T_q - T_k) if causal else T_q * (T_k == 0)  # rows that see nothing
    boundaries = None if cu_seqlens is None else check_boundaries(cu_seqlens, B * T_q)
    if takes_causal(q, k, causal, dropout_p, cu_seqlens):
        out, lse = empty_as(q), empty_logsumexp(q)
        torch.ops.fastgpt.attention_causal_(q, k, v, out, lse, _segments(q, cu_seqlens), scale)
        return out, lse
    if q.numel() and blind < T_q and philox.threshold(dropout_p):
        assert seed is not None
        return _dropout_forward(q, k, v, causal, scale, dropout_p, seed, cu_seqlens)
    if q.numel() and boundaries is None and not blind:
        square = causal and T_q == T_k
        return _flash(q, k, v, 0.0, square, attn_mask=None if square else _bias(q, k, causal), scale=scale)
    out, lse = empty_as(q), empty_logsumexp(q)
    if boundaries is not None and cu_seqlens is not None:
        parts = documents(boundaries, B, T_q) if q.numel() else []
        if not _apart(q, parts):
            return _flash(q, k, v, attn_mask=_documents_bias(q, causal, cu_seqlens), scale=scale)
        for b, s, e in parts:
            part = (slice(b, b + 1), slice(None), slice(s, e))
            out[part], lse[part] = _flash(q[part], k[part], v[part], 0.0, causal, scale=scale)
        return out, lse
    out[:, :, :blind], lse[:, :, :blind] = 0.0, math.inf
    if q.numel() and blind < T_q:
        out[:, :, blind:], lse[:, :, blind:] = _flash(q[:, :, blind:], k, v, 0.0, True, scale=scale)
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
    dropout_p: float,
    seed: Tensor | None,
    cu_seqlens: Tensor | None,
    together: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; `together` is as for `empty_grads`."""
    dout, q, k, v = map(_rows_contiguous, (dout, q, k, v))
    B, _, T_q, _ = q.shape
    T_k = k.size(2)
    blind = max(0, T_q - T_k) if causal else T_q * (T_k == 0)
    if takes_causal(q, k, causal, dropout_p, cu_seqlens):
        grads = empty_grads(q, k, v, together)
        segments = _segments(q, cu_seqlens)
        torch.ops.fastgpt.attention_causal_backward_(dout, q, k, v, out, lse, *grads, segments, scale)
        return grads
    if q.numel() and blind < T_q and philox.threshold(dropout_p):
        assert seed is not None
        return _dropout_backward(dout, q, k, v, lse, causal, scale, dropout_p, seed, cu_seqlens)
    if q.numel() and cu_seqlens is None and not blind:
        square = causal and T_q == T_k
        bias = None if square else _bias(q, k, causal)
        return _flash_backward(dout, q, k, v, out, lse, 0.0, square, attn_mask=bias, scale=scale)
    dq, dk, dv = map(heads_last, (q, k, v))
    if cu_seqlens is not None:
        parts = documents(cu_seqlens.tolist(), B, T_q) if q.numel() else []
        if not _apart(q, parts):
            bias = _documents_bias(q, causal, cu_seqlens)
            return _flash_backward(dout, q, k, v, out, lse, 0.0, False, attn_mask=bias, scale=scale)
        for b, s, e in parts:
            part = (slice(b, b + 1), slice(None), slice(s, e))
            dq[part], dk[part], dv[part] = _flash_backward(
                dout[part], q[part], k[part], v[part], out[part], lse[part], 0.0, causal, scale=scale
            )
        return dq, dk, dv
    dq[:, :, :blind] = 0.0
    if blind == T_q or not q.numel():
        return dq.zero_(), dk.zero_(), dv.zero_()
    rest = (slice(None), slice(None), slice(blind, None))
    dq[rest], dk[:], dv[:] = _flash_backward(dout[rest], q[rest], k, v, out[rest], lse[rest], 0.0, True, scale=scale)
    return dq, dk, dv


def _chunks(q: Tensor, k: Tensor, causal: bool, cu_seqlens: Tensor | None) -> tuple[range, int, Tensor, Tensor]:
    """The first head of each chunk, how many heads it has, and the columns that each row of each head sees."""
    B, H, T_q, _ = q.shape
    step = max(1, CHUNK // (T_q * k.size(2)))
    start, end = (
        t.expand(B, T_q).repeat_interleave(H, 0).to(torch.int32).contiguous() for t in spans(q, k, causal, cu_seqlens)
    )
    return range(0, B * H, step), step, start, end


@torch.autocast("cpu", enabled=False)  # these matmuls are to stay in fp32
def _dropout_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    out, lse = empty_as(q), empty_logsumexp(q)
    numbers = (scale, philox.threshold(dropout_p), philox.inverse_keep(dropout_p))
    firsts, step, start, end = _chunks(q, k, causal, cu_seqlens)
    flat = [t.flatten(0, 1) for t in (q, k, v)]  # (B * H, T, D)
    outs, lses = lse.new_empty(flat[0].shape), lse.new_empty(flat[0].shape[:2])
    for first in firsts:
        part = slice(first, first + step)
        qc, kc, vc = (t[part].to(lse.dtype) for t in flat)
        weights = qc @ kc.mT  # (heads, T_q, T_k)
        lses[part] = torch.ops.fastgpt.attention_dropout_(weights, start[part], end[part], seed, first, *numbers)
        torch.bmm(weights, vc, out=outs[part])
    return out.copy_(outs.view(q.shape)), lse.copy_(lses.view(lse.shape))


@torch.autocast("cpu", enabled=False)  # these matmuls are to stay in fp32
def _dropout_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = heads_last(q), heads_last(k), heads_last(v)
    numbers = (scale, philox.threshold(dropout_p), philox.inverse_keep(dropout_p))
    firsts, step, start, end = _chunks(q, k, causal, cu_seqlens)
    flat = [t.flatten(0, 1) for t in (q, k, v, dout)]
    lses = lse.flatten(0, 1).contiguous()
    found = [lse.new_empty(t.shape) for t in flat[:3]]
    for first in firsts:
        part = slice(first, first + step)
        qc, kc, vc, gc = (t[part].to(lse.dtype) for t in flat)
        weights = qc @ kc.mT
        ds = gc @ vc.mT
        torch.ops.fastgpt.attention_dropout_backward_(
            weights, ds, lses[part], start[part], end[part], seed, first, *numbers
        )
        dq, dk, dv = (t[part] for t in found)
        torch.baddbmm(dq, ds, kc, beta=0, alpha=scale, out=dq)
        torch.baddbmm(dk, ds.mT, qc, beta=0, alpha=scale, out=dk)
        torch.bmm(weights.mT, gc, out=dv)
    for grad, made in zip(grads, found, strict=True):
        grad.copy_(made.view(grad.shape))
    return grads
