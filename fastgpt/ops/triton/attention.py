"""Attention forward in Triton (Dao 2023, arXiv:2307.08691), and what its backward shares with it.

For a query row i with key columns j in [start_i, end_i), which is what causality and documents leave it to see:

    s_ij = q_i . k_j * scale * log2(e)          p_ij = 2^(s_ij - m_i)          m_i, l_i = running max and sum over j
    o_i  = sum_j z_ij p_ij v_j / (keep * l_i)   z_ij in {0, 1} is dropout's, keep = 1 - p_drop, and l_i is without it
    lse_i = m_i + log2(l_i)                     +inf where the row sees nothing: then 2^(s - lse) = 0, and o_i = 0

A program has BLOCK_M rows of one head and walks over the columns that any of them sees, BLOCK_N at a time: first those
that all rows see, with no mask at all; then those that some row does not: the diagonal, the tail, and where a document
begins. Masked scores are -inf before the maximum and 0 after the exponential: a column
out of range was loaded as 0, and its score is 0, not -inf.

With few rows (decoding), the columns are split over SPLITS programs, each of which gives an output and a logsumexp of
its own; `combine` weighs them: o = sum_s 2^(lse_s - lse) o_s.

Saved for backward: q, k, v, o and lse (fp32, one a row). z is not: it is a function of (seed, head, i, j).
"""

import triton
import triton.language as tl


@triton.jit
def keep_mask(seed, head, rows, first_column, BLOCK_N: tl.constexpr, threshold, TRANSPOSED: tl.constexpr):
    """Dropout's z for `rows` and BLOCK_N columns: (len(rows), BLOCK_N), or (BLOCK_N, len(rows)) if TRANSPOSED.

    Philox (Salmon et al. 2011) of counter (column // 8, row, head) gives 128 bits: 16 for each of 8 columns, low
    halves first. 7 rounds, the fewest that pass all of BigCrush; 10 would cost 40% more.
    """
    octets = first_column // 8 + tl.arange(0, BLOCK_N // 8)
    if TRANSPOSED:
        octet, row = octets[:, None], rows[None, :]
    else:
        octet, row = octets[None, :], rows[:, None]
    zero = octet * 0 + row * 0
    w0, w1, w2, w3 = tl.philox(seed, octet + zero, row + zero, head + zero, zero, 7)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (..., 2, 2): word 2a + b at [..., a, b]
    halves = tl.join(words & 0xFFFF, words >> 16)  # (..., 2, 2, 2): column 4a + 2b + half
    if TRANSPOSED:
        halves = tl.permute(halves, (0, 2, 3, 4, 1))
        bits = tl.reshape(halves, (BLOCK_N, rows.shape[0]))
    else:
        bits = tl.reshape(halves, (rows.shape[0], BLOCK_N))
    return bits.to(tl.int32) >= threshold


@triton.jit
def row_span(Spans, row_base, rows, T_q, T_k, n_tokens, CAUSAL: tl.constexpr, DOCS: tl.constexpr):
    """The columns [start, end) that each of `rows` sees; rows from T_q on see none."""
    inside = rows < T_q
    if DOCS:
        start = tl.load(Spans + row_base + rows, inside, other=0)
    else:
        start = rows * 0
    if CAUSAL:
        end = rows + 1 + (T_k - T_q)
    elif DOCS:
        end = tl.load(Spans + n_tokens + row_base + rows, inside, other=0)
    else:
        end = rows * 0 + T_k
    return start, tl.where(inside, end, 0)


@triton.jit
def split_blocks(lo, full_lo, full_hi, hi, BLOCK: tl.constexpr, BEFORE: tl.constexpr):
    """Blocks that need no mask, [full_lo, full_hi), and those of [lo, hi) before and after, which do.

    All four are multiples of BLOCK but hi. Returns where the first lie and how many they are; and for the second, which
    one loop takes in turn, their first, how many come before a jump over the others, how far that is, and how many they
    are. Two loops in a kernel and not three: with three, ptxas spills.
    """
    full = tl.maximum(tl.cdiv(full_hi - full_lo, BLOCK), 0)
    after = tl.maximum(full_lo, full_hi)
    if BEFORE:
        before = tl.maximum(tl.cdiv(tl.minimum(full_lo, hi) - lo, BLOCK), 0)
        first = lo
    else:
        before = full * 0
        first = after
    jump = after - first - before * BLOCK
    return full, first, before, jump, before + tl.maximum(tl.cdiv(hi - after, BLOCK), 0)


@triton.jit
def column_ranges(
    Spans, row_base, m0, T_q, T_k, n_tokens,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, DOCS: tl.constexpr,
):  # fmt: skip
    """(lo, full_lo, full_hi, hi): the rows from m0 see nothing outside [lo, hi) and all of [full_lo, full_hi)."""
    last = tl.minimum(m0 + BLOCK_M, T_q) - 1
    lo = m0 * 0
    full_lo = m0 * 0
    if DOCS:  # starts and ends never fall from a row to the next, so the first and the last row tell
        lo = tl.load(Spans + row_base + m0) // BLOCK_N * BLOCK_N
        full_lo = tl.cdiv(tl.load(Spans + row_base + last), BLOCK_N) * BLOCK_N
    if CAUSAL:
        full_hi = tl.maximum(m0 + 1 + T_k - T_q, 0)
        hi = tl.maximum(last + 1 + T_k - T_q, 0)
    elif DOCS:
        full_hi = tl.load(Spans + n_tokens + row_base + m0)
        hi = tl.load(Spans + n_tokens + row_base + last)
    else:
        full_hi = m0 * 0 + T_k
        hi = m0 * 0 + T_k
    return lo, full_lo, full_hi // BLOCK_N * BLOCK_N, hi


@triton.jit
def _accumulate(
    acc, total, m, q, K, V, k_offsets, v_offsets, stride_kt, stride_vt, scale_log2, start, end,
    first, before, jump, count, T_k, seed, head, rows, threshold,
    PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, DOCS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Takes `count` blocks of columns into the running output, sum and maximum."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    for i in tl.range(0, count):
        n0 = first + i * BLOCK_N
        if MASKED and DOCS:
            n0 += tl.where(i < before, 0, jump)
        at = n0.to(tl.int64)
        columns = n0 + offs_n
        # What cannot be out of range has no mask.
        if MASKED:
            k = tl.load(K + at * stride_kt + k_offsets, (columns < T_k)[None, :] & (offs_d < D)[:, None], other=0.0)
            v = tl.load(V + at * stride_vt + v_offsets, (columns < T_k)[:, None] & (offs_d < D)[None, :], other=0.0)
        elif D < BLOCK_D:
            k = tl.load(K + at * stride_kt + k_offsets, (offs_d < D)[:, None], other=0.0)
            v = tl.load(V + at * stride_vt + v_offsets, (offs_d < D)[None, :], other=0.0)
        else:
            k = tl.load(K + at * stride_kt + k_offsets)
            v = tl.load(V + at * stride_vt + v_offsets)
        s = tl.dot(q, k, input_precision=PRECISION)  # (BLOCK_M, BLOCK_N), not scaled yet
        if MASKED:
            seen = columns[None, :] < end[:, None]
            if DOCS:
                seen &= columns[None, :] >= start[:, None]
            s = tl.where(seen, s, float("-inf"))
            new_m = tl.maximum(m, tl.max(s, 1))
            base = tl.where(new_m == float("-inf"), 0.0, new_m) * scale_log2  # no column yet: -inf - -inf is NaN
            p = tl.where(seen, tl.exp2(s * scale_log2 - base[:, None]), 0.0)
        else:
            new_m = tl.maximum(m, tl.max(s, 1))
            base = new_m * scale_log2
            p = tl.exp2(s * scale_log2 - base[:, None])
        shrink = tl.exp2(m * scale_log2 - base)
        total = total * shrink + tl.sum(p, 1)
        if DROPOUT:
            p = tl.where(keep_mask(seed, head, rows, n0, BLOCK_N, threshold, False), p, 0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        m = new_m
    return acc, total, m


@triton.jit(do_not_specialize=["T_q", "T_k", "n_tokens", "blocks_each", "threshold"])
def attention_forward(
    Q, K, V, Out, Lse, Seed, Spans,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_os, stride_ob, stride_oh, stride_ot,
    H, T_q, T_k, n_tokens, blocks_each, scale_log2, threshold, inv_keep,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
    CAUSAL: tl.constexpr, DOCS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (row blocks * splits * B * H,). Out is (splits, B, H, T_q, D) and Lse (splits, B, H, T_q) in fp32."""
    row_blocks = tl.cdiv(T_q, BLOCK_M)
    program = tl.program_id(0)
    # The last rows of a causal head have the most columns: they go first, and the short ones fill the end.
    m0 = (row_blocks - 1 - program % row_blocks) * BLOCK_M
    rest = program // row_blocks
    split = rest % SPLITS
    head = rest // SPLITS
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)

    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    rows = m0 + tl.arange(0, BLOCK_M)
    row_mask = (rows < T_q)[:, None] & (offs_d < D)[None, :]
    Q += b * stride_qb + h * stride_qh + m0.to(tl.int64) * stride_qt
    K += b * stride_kb + h * stride_kh
    V += b * stride_vb + h * stride_vh
    in_block = tl.arange(0, BLOCK_M)[:, None]
    q = tl.load(Q + in_block * stride_qt + offs_d[None, :], row_mask, other=0.0)
    k_offsets = offs_n[None, :] * stride_kt + offs_d[:, None]
    v_offsets = offs_n[:, None] * stride_vt + offs_d[None, :]

    row_base = b * T_q
    start, end = row_span(Spans, row_base, rows, T_q, T_k, n_tokens, CAUSAL, DOCS)
    lo, full_lo, full_hi, hi = column_ranges(
        Spans, row_base, m0, T_q, T_k, n_tokens, BLOCK_M, BLOCK_N, CAUSAL, DOCS
    )  # fmt: skip
    if SPLITS > 1:
        lo = tl.maximum(lo, split * blocks_each * BLOCK_N)
        hi = tl.minimum(hi, (split + 1) * blocks_each * BLOCK_N)
        full_lo = tl.maximum(full_lo, lo)
        full_hi = tl.minimum(full_hi, hi)
    if DROPOUT:
        seed = tl.load(Seed)
    else:
        seed = 0

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    full, first, before, jump, masked = split_blocks(lo, full_lo, full_hi, hi, BLOCK_N, DOCS)
    acc, total, m = _accumulate(
        acc, total, m, q, K, V, k_offsets, v_offsets, stride_kt, stride_vt, scale_log2, start, end,
        full_lo, 0, 0, full, T_k, seed, head, rows, threshold,
        PRECISION, D, BLOCK_D, BLOCK_N, False, DOCS, DROPOUT,
    )  # fmt: skip
    acc, total, m = _accumulate(
        acc, total, m, q, K, V, k_offsets, v_offsets, stride_kt, stride_vt, scale_log2, start, end,
        first, before, jump, masked, T_k, seed, head, rows, threshold,
        PRECISION, D, BLOCK_D, BLOCK_N, True, DOCS, DROPOUT,
    )  # fmt: skip

    empty = total == 0.0
    factor = tl.where(empty, 0.0, 1.0 / total)
    if DROPOUT:
        factor = factor * inv_keep
    lse = m * scale_log2 + tl.log2(total)
    if SPLITS == 1:  # a split that sees nothing has weight 0 in `combine`: it keeps its -inf
        lse = tl.where(empty, float("inf"), lse)
    o = acc * factor[:, None]
    Lse += (split * (tl.num_programs(0) // (row_blocks * SPLITS)) + head).to(tl.int64) * T_q
    tl.store(Lse + rows, lse, rows < T_q)
    Out += split.to(tl.int64) * stride_os + b * stride_ob + h * stride_oh + m0.to(tl.int64) * stride_ot
    tl.store(Out + in_block * stride_ot + offs_d[None, :], o.to(Out.dtype.element_ty), row_mask)


@triton.jit(do_not_specialize=["T_q", "rows_all"])
def combine(
    Partial, PartialLse, Out, Lse, stride_ob, stride_oh, stride_ot, H, T_q, rows_all,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Grid: (B * H * T_q,). Partial (SPLITS, B * H * T_q, D) and PartialLse (SPLITS, B * H * T_q), contiguous, fp32."""
    row = tl.program_id(0).to(tl.int64)
    offs_s = tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_D)
    lse_s = tl.load(PartialLse + offs_s.to(tl.int64) * rows_all + row, offs_s < SPLITS, other=float("-inf"))
    top = tl.max(lse_s, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(lse_s - base)
    total = tl.sum(weight, 0)
    weight = weight / tl.where(total == 0.0, 1.0, total)
    mask = (offs_s < SPLITS)[:, None] & (offs_d < D)[None, :]
    o_s = tl.load(Partial + (offs_s.to(tl.int64)[:, None] * rows_all + row) * D + offs_d[None, :], mask, other=0.0)
    o = tl.sum(o_s * weight[:, None], 0)
    tl.store(Lse + row, tl.where(total == 0.0, float("inf"), base + tl.log2(total)))
    head, t = row // T_q, row % T_q
    Out += (head // H) * stride_ob + (head % H) * stride_oh + t * stride_ot
    tl.store(Out + offs_d, o.to(Out.dtype.element_ty), offs_d < D)


@triton.jit(do_not_specialize=["n_boundaries", "n_tokens", "T", "steps"])
def document_spans(Boundaries, Spans, n_boundaries, n_tokens, T, steps, BLOCK: tl.constexpr):
    """Spans (2, B * T): where the document of each token begins and ends, counted from the token's own batch row.

    Binary search for the last boundary that is at most the token. Whatever the boundaries hold, the result stays
    within the row and around the token, so that what reads it stays within the tensors.
    """
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = token * 0 - 1  # the last boundary known to be at most the token, -1 if none is
    high = low + 1 + n_boundaries
    for _ in range(steps):
        mid = (low + high) // 2
        probe = (mid >= 0) & (mid > low)
        before = tl.load(Boundaries + mid, probe, other=0) <= token
        low = tl.where(probe & before, mid, low)
        high = tl.where(probe & (before == 0), mid, high)
    row = token // T * T
    start = tl.load(Boundaries + low, low >= 0, other=0)
    end = tl.load(Boundaries + low + 1, low + 1 < n_boundaries, other=n_tokens)
    start = tl.minimum(tl.maximum(start, row), token) - row
    end = tl.maximum(tl.minimum(end, row + T), token + 1) - row
    tl.store(Spans + token, start, token < n_tokens)
    tl.store(Spans + n_tokens + token, end, token < n_tokens)
