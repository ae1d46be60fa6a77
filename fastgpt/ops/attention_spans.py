"""Which columns a row of attention sees: always [start, end), by causality and by the documents in a batch.

`cu_seqlens` holds the cumulative lengths of the documents in a packed batch, as variable-length attention has it
everywhere: boundaries over the batch's B * T tokens, row after row, from 0 to B * T. A row's end is a boundary whether
it is listed or not, so a document that a batch's rows cut in two is simply listed whole. A boundary that repeats is an
empty document: the array can be padded to a fixed length with B * T.
"""

import itertools

import torch
from torch import Tensor


def check_boundaries(cu_seqlens: Tensor, tokens: int) -> list[int]:
    """The boundaries, from the CPU, if they are what they should be."""
    boundaries: list[int] = cu_seqlens.tolist()
    if boundaries[0] != 0 or boundaries[-1] != tokens:
        raise ValueError(
            f"attention: cu_seqlens must begin with 0 and end with B * T = {tokens}, got {boundaries[0]} and "
            f"{boundaries[-1]}"
        )
    if any(a > b for a, b in itertools.pairwise(boundaries)):
        raise ValueError("attention: cu_seqlens must not decrease, got a boundary below the one before it")
    return boundaries


def documents(boundaries: list[int], B: int, T: int) -> list[tuple[int, int, int]]:
    """(batch row, first token, end) of each document that is not empty, cut where rows end."""
    cuts = sorted({*boundaries, *range(0, B * T + 1, T)})
    return [(a // T, a % T, a % T + b - a) for a, b in itertools.pairwise(cuts)]


def spans(q: Tensor, k: Tensor, causal: bool, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """start and end of the columns that each row sees: (1, T_q), or (B, T_q) with documents; int64, on q's device."""
    B, T_q, T_k = q.size(0), q.size(2), k.size(2)
    row = torch.arange(T_q, device=q.device)[None]
    until = (row + 1 + T_k - T_q).clamp(0, T_k) if causal else torch.full_like(row, T_k)
    if cu_seqlens is None:
        return torch.zeros_like(row), until
    token = torch.arange(B * T_q, device=q.device).view(B, T_q)
    first = token - row  # of the batch row
    ends = torch.nn.functional.pad(cu_seqlens.long(), (1, 1))  # (n + 3,): 0, the boundaries, B * T
    ends[-1] = B * T_q
    document = torch.searchsorted(cu_seqlens, token.to(cu_seqlens.dtype), right=True)
    start = torch.minimum(torch.maximum(ends[document], first), token) - first
    end = torch.maximum(torch.minimum(ends[document + 1], first + T_q), token + 1) - first
    return start, torch.minimum(end, until)
