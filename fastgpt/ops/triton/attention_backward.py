"""Attention backward in Triton. With s, lse and z as in attention.py, and the output's gradient do_i:

    p_ij   = 2^(s_ij - lse_i)                               the probabilities, again
    delta_i = do_i . o_i                                    = sum_j p_ij dp_ij, also with dropout
    dp_ij  = z_ij / keep * (do_i . v_j)
    ds_ij  = p_ij * (dp_ij - delta_i)

    dq_i = scale * sum_j ds_ij k_j          dk_j = scale * sum_i ds_ij q_i          dv_j = sum_i z_ij / keep * p_ij do_i

Two kernels: one has rows of q and walks over columns, the other has columns and walks over rows. Each element of a
gradient is summed by one program in one order, so the result is bitwise the same every time; the price is that s and dp
are computed twice, 7 matmuls for 5. The first also computes delta and leaves it for the second.
"""

import triton
import triton.language as tl

from fastgpt.ops.triton.attention import column_ranges, keep_mask, row_span, split_blocks


@triton.jit
def _accumulate_dq(
    dq, q, do, lse, delta, K, V, k_offsets, v_offsets, stride_kt, stride_vt, scale_log2, start, end,
    first, before, jump, count, T_k, seed, head, rows, threshold, inv_keep,
    PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, DOCS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    for i in tl.range(0, count):
        n0 = first + i * BLOCK_N
        if MASKED and DOCS:
            n0 += tl.where(i < before, 0, jump)
        at = n0.to(tl.int64)
        columns = n0 + offs_n
        if MASKED:
            inside = (columns < T_k)[None, :] & (offs_d < D)[:, None]
            kt = tl.load(K + at * stride_kt + k_offsets, inside, other=0.0)
            vt = tl.load(V + at * stride_vt + v_offsets, inside, other=0.0)
        elif D < BLOCK_D:
            kt = tl.load(K + at * stride_kt + k_offsets, (offs_d < D)[:, None], other=0.0)
            vt = tl.load(V + at * stride_vt + v_offsets, (offs_d < D)[:, None], other=0.0)
        else:
            kt = tl.load(K + at * stride_kt + k_offsets)  # (BLOCK_D, BLOCK_N)
            vt = tl.load(V + at * stride_vt + v_offsets)
        s = tl.dot(q, kt, input_precision=PRECISION)
        p = tl.exp2(s * scale_log2 - lse[:, None])
        if MASKED:  # a column out of range has s = 0 and may have p = inf
            seen = columns[None, :] < end[:, None]
            if DOCS:
                seen &= columns[None, :] >= start[:, None]
            p = tl.where(seen, p, 0.0)
        dp = tl.dot(do, vt, input_precision=PRECISION)
        if DROPOUT:
            dp = tl.where(keep_mask(seed, head, rows, n0, BLOCK_N, threshold, False), dp * inv_keep, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(kt.dtype), tl.trans(kt), dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["T_q", "T_k", "n_tokens", "threshold"])
def attention_backward_q(
    Q, K, V, Out, dOut, Lse, Delta, dQ, Seed, Spans,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt, stride_dqb, stride_dqh, stride_dqt,
    H, T_q, T_k, n_tokens, scale, scale_log2, threshold, inv_keep,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, DOCS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (row blocks * B * H,). Writes dQ, and Delta (B, H, T_q) for the other kernel."""
    row_blocks = tl.cdiv(T_q, BLOCK_M)
    program = tl.program_id(0)
    m0 = (row_blocks - 1 - program % row_blocks) * BLOCK_M
    head = program // row_blocks
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)

    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    in_block = tl.arange(0, BLOCK_M)
    rows = m0 + in_block
    row_mask = (rows < T_q)[:, None] & (offs_d < D)[None, :]
    first = m0.to(tl.int64)
    Q += b * stride_qb + h * stride_qh + first * stride_qt
    Out += b * stride_ob + h * stride_oh + first * stride_ot
    dOut += b * stride_gb + h * stride_gh + first * stride_gt
    dQ += b * stride_dqb + h * stride_dqh + first * stride_dqt
    K += b * stride_kb + h * stride_kh
    V += b * stride_vb + h * stride_vh
    stats = head.to(tl.int64) * T_q

    do = tl.load(dOut + in_block[:, None] * stride_gt + offs_d[None, :], row_mask, other=0.0)
    o = tl.load(Out + in_block[:, None] * stride_ot + offs_d[None, :], row_mask, other=0.0)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(Delta + stats + rows, delta, rows < T_q)
    q = tl.load(Q + in_block[:, None] * stride_qt + offs_d[None, :], row_mask, other=0.0)
    lse = tl.load(Lse + stats + rows, rows < T_q, other=float("inf"))

    row_base = b * T_q
    start, end = row_span(Spans, row_base, rows, T_q, T_k, n_tokens, CAUSAL, DOCS)
    lo, full_lo, full_hi, hi = column_ranges(
        Spans, row_base, m0, T_q, T_k, n_tokens, BLOCK_M, BLOCK_N, CAUSAL, DOCS
    )  # fmt: skip
    if DROPOUT:
        seed = tl.load(Seed)
    else:
        seed = 0

    k_offsets = offs_n[None, :] * stride_kt + offs_d[:, None]
    v_offsets = offs_n[None, :] * stride_vt + offs_d[:, None]
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    full, first, before, jump, masked = split_blocks(lo, full_lo, full_hi, hi, BLOCK_N, DOCS)
    dq = _accumulate_dq(
        dq, q, do, lse, delta, K, V, k_offsets, v_offsets, stride_kt, stride_vt, scale_log2, start, end,
        full_lo, 0, 0, full, T_k, seed, head, rows, threshold, inv_keep,
        PRECISION, D, BLOCK_D, BLOCK_N, False, DOCS, DROPOUT,
    )  # fmt: skip
    dq = _accumulate_dq(
        dq, q, do, lse, delta, K, V, k_offsets, v_offsets, stride_kt, stride_vt, scale_log2, start, end,
        first, before, jump, masked, T_k, seed, head, rows, threshold, inv_keep,
        PRECISION, D, BLOCK_D, BLOCK_N, True, DOCS, DROPOUT,
    )  # fmt: skip
    tl.store(dQ + in_block[:, None] * stride_dqt + offs_d[None, :], (dq * scale).to(dQ.dtype.element_ty), row_mask)


@triton.jit
def _accumulate_dkv(
    dk, dv, k, v, Q, dOut, Lse, Delta, Spans, q_offsets, g_offsets, stride_qt, stride_gt, scale_log2, columns, n0,
    first, before, jump, count, row_base, T_q, T_k, n_tokens, seed, head, threshold, inv_keep,
    PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, DOCS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    in_block = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    for i in tl.range(0, count):
        m0 = first + i * BLOCK_M
        if MASKED and DOCS:
            m0 += tl.where(i < before, 0, jump)
        at = m0.to(tl.int64)
        rows = m0 + in_block
        inside = rows < T_q
        qt = tl.load(Q + at * stride_qt + q_offsets, inside[None, :] & (offs_d < D)[:, None], other=0.0)
        do = tl.load(dOut + at * stride_gt + g_offsets, inside[:, None] & (offs_d < D)[None, :], other=0.0)
        lse = tl.load(Lse + rows, inside, other=float("inf"))  # so that rows out of range have p = 0
        delta = tl.load(Delta + rows, inside, other=0.0)
        st = tl.dot(k, qt, input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
        pt = tl.exp2(st * scale_log2 - lse[None, :])
        if MASKED:
            start, end = row_span(Spans, row_base, rows, T_q, T_k, n_tokens, CAUSAL, DOCS)
            seen = columns[:, None] < end[None, :]
            if DOCS:
                seen &= columns[:, None] >= start[None, :]
            pt = tl.where(seen, pt, 0.0)
        dpt = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        if DROPOUT:
            keep = keep_mask(seed, head, rows, n0, BLOCK_N, threshold, True)
            dropped = tl.where(keep, pt, 0.0)  # dv is multiplied by inv_keep at the end
            dpt = tl.where(keep, dpt * inv_keep, 0.0)
        else:
            dropped = pt
        dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision=PRECISION)
        dst = pt * (dpt - delta[None, :])
        dk = tl.dot(dst.to(qt.dtype), tl.trans(qt), dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["T_q", "T_k", "n_tokens", "threshold"])
def attention_backward_kv(
    Q, K, V, dOut, Lse, Delta, dK, dV, Seed, Spans,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_dkb, stride_dkh, stride_dkt, stride_dvb, stride_dvh, stride_dvt,
    H, T_q, T_k, n_tokens, scale, scale_log2, threshold, inv_keep,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, DOCS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (column blocks * B * H,). The first columns of a causal head are seen by most rows: they go first."""
    column_blocks = tl.cdiv(T_k, BLOCK_N)
    program = tl.program_id(0)
    n0 = program % column_blocks * BLOCK_N
    head = program // column_blocks
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)

    offs_d = tl.arange(0, BLOCK_D)
    in_rows = tl.arange(0, BLOCK_M)
    in_columns = tl.arange(0, BLOCK_N)
    columns = n0 + in_columns
    column_mask = (columns < T_k)[:, None] & (offs_d < D)[None, :]
    first = n0.to(tl.int64)
    Q += b * stride_qb + h * stride_qh
    dOut += b * stride_gb + h * stride_gh
    K += b * stride_kb + h * stride_kh + first * stride_kt
    V += b * stride_vb + h * stride_vh + first * stride_vt
    dK += b * stride_dkb + h * stride_dkh + first * stride_dkt
    dV += b * stride_dvb + h * stride_dvh + first * stride_dvt
    Lse += head.to(tl.int64) * T_q
    Delta += head.to(tl.int64) * T_q
    k = tl.load(K + in_columns[:, None] * stride_kt + offs_d[None, :], column_mask, other=0.0)
    v = tl.load(V + in_columns[:, None] * stride_vt + offs_d[None, :], column_mask, other=0.0)

    # Rows [lo, full_lo) see some of the columns, [full_lo, full_hi) all, [full_hi, hi) some; no other row sees any.
    row_base = b * T_q
    last = tl.minimum(n0 + BLOCK_N, T_k) - 1
    lo = n0 * 0
    full_lo = n0 * 0
    if DOCS:  # T_q = T_k: a column's document is that of the row with its number
        full_hi = tl.load(Spans + n_tokens + row_base + n0)
        hi = tl.load(Spans + n_tokens + row_base + last)
        if CAUSAL:
            lo = n0
            full_lo = last
        else:
            lo = tl.load(Spans + row_base + n0)
            full_lo = tl.load(Spans + row_base + last)
    else:
        full_hi = n0 * 0 + T_q
        hi = n0 * 0 + T_q
        if CAUSAL:
            lo = tl.maximum(n0 - (T_k - T_q), 0)
            full_lo = tl.maximum(last - (T_k - T_q), 0)
    lo = lo // BLOCK_M * BLOCK_M
    full_lo = tl.cdiv(full_lo, BLOCK_M) * BLOCK_M
    if DOCS:
        full_hi = full_hi // BLOCK_M * BLOCK_M
    if DROPOUT:
        seed = tl.load(Seed)
    else:
        seed = 0

    q_offsets = in_rows[None, :] * stride_qt + offs_d[:, None]
    g_offsets = in_rows[:, None] * stride_gt + offs_d[None, :]
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    full, mask_first, before, jump, masked = split_blocks(lo, full_lo, full_hi, hi, BLOCK_M, True)
    if CAUSAL or DOCS:
        dk, dv = _accumulate_dkv(
            dk, dv, k, v, Q, dOut, Lse, Delta, Spans, q_offsets, g_offsets, stride_qt, stride_gt, scale_log2,
            columns, n0, mask_first, before, jump, masked, row_base, T_q, T_k, n_tokens, seed, head, threshold,
            inv_keep, PRECISION, D, BLOCK_D, BLOCK_M, BLOCK_N, True, CAUSAL, DOCS, DROPOUT,
        )  # fmt: skip
    dk, dv = _accumulate_dkv(
        dk, dv, k, v, Q, dOut, Lse, Delta, Spans, q_offsets, g_offsets, stride_qt, stride_gt, scale_log2,
        columns, n0, full_lo, 0, 0, full, row_base, T_q, T_k, n_tokens, seed, head, threshold,
        inv_keep, PRECISION, D, BLOCK_D, BLOCK_M, BLOCK_N, False, CAUSAL, DOCS, DROPOUT,
    )  # fmt: skip
    out = in_columns[:, None]
    tl.store(dK + out * stride_dkt + offs_d[None, :], (dk * scale).to(dK.dtype.element_ty), column_mask)
    tl.store(dV + out * stride_dvt + offs_d[None, :], (dv * inv_keep).to(dV.dtype.element_ty), column_mask)
