"""The shapes that attention hands to torch's scaled_dot_product_attention on GPUs, because it measured faster there.

On Hopper torch's own choice is cuDNN's kernel, on others FlashAttention 2's. An entry is made from a measurement, by
`fastgpt bench kernels --op attention`, on the GPU that it names. No GPU has been measured yet, so there is none.
"""

from typing import NamedTuple


class Entry(NamedTuple):
    """SDPA is faster on `arch` (90 is sm_90) for square causal attention, min_length <= T <= max_length."""

    arch: int
    head_dim: int
    min_length: int
    max_length: int
    why: str  # what was measured: both figures, and the versions


TABLE: tuple[Entry, ...] = ()


def sdpa_is_faster(arch: int, head_dim: int, length: int) -> bool:
    return any(e.arch == arch and e.head_dim == head_dim and e.min_length <= length <= e.max_length for e in TABLE)


def describe() -> str:
    """For `fastgpt info`."""
    if not TABLE:
        return "no shape is handed to SDPA: no GPU has been measured yet"
    return "SDPA measured faster, and is taken, for " + "; ".join(
        f"sm_{e.arch} D {e.head_dim} T {e.min_length} to {e.max_length} ({e.why})" for e in TABLE
    )
