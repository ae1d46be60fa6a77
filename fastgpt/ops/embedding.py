"""Token and position embedding in one pass (Radford et al. 2019, Language Models are Unsupervised Multitask Learners).

For ids (B, T), a token table wte (V, C) and a position table wpe (P, C):

    y[b, t] = wte[ids[b, t]] + wpe[offset + t]

and backwards:

    dwte[v]          = sum over the (b, t) with ids[b, t] = v of dy[b, t]
    dwpe[offset + t] = sum over b of dy[b, t]

Saved for backward: ids. Plain torch writes the tokens' rows, reads them again and writes the sum: 5 passes over
(B, T, C) where this one makes 2 or 3.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops import registry
from fastgpt.ops.registry import DTYPES

torch.library.define("fastgpt::embedding", "(Tensor ids, Tensor wte, Tensor wpe, SymInt offset) -> Tensor")
torch.library.define(
    "fastgpt::embedding_backward",
    "(Tensor dy, Tensor ids, SymInt vocab, SymInt positions, SymInt offset) -> (Tensor, Tensor)",
)
# The same where there is a gradient of wte already, which it is added to; returns wpe's. On CPUs alone.
torch.library.define(
    "fastgpt::embedding_backward_add_",
    "(Tensor dy, Tensor ids, Tensor(a!) dwte, SymInt positions, SymInt offset) -> Tensor",
)


def embedding_reference(ids: Tensor, wte: Tensor, wpe: Tensor, offset: int = 0) -> Tensor:
    """The definition, in plain torch; also what runs where there is no kernel."""
    return F.embedding(ids, wte) + wpe[offset : offset + ids.shape[1]]


def embedding(ids: Tensor, wte: Tensor, wpe: Tensor, offset: int = 0) -> Tensor:
    """The rows of `wte` that `ids` name, each plus the row of `wpe` for its position.

    Args:
        ids: (B, T), int64, each in [0, V); any strides; B and T may be 0.
        wte: (V, C), the token table; float32, float64, bfloat16 or float16.
        wpe: (P, C), the position table, of wte's dtype.
        offset: the position of ids[:, 0]; at least 0, and offset + T at most P.

    Returns:
        (B, T, C), contiguous, of wte's dtype. Differentiable once in wte and wpe, whose gradients are dense; their
        sums are in fp32 (fp64 for float64) and bitwise the same from run to run, on a GPU too.

    Raises:
        TypeError: an argument is no tensor or has another dtype.
        ValueError: a shape, a device or the offset does not fit; or, on a CPU, an id is not in [0, V). Under
            torch.compile that id raises RuntimeError instead. On a GPU, where to look would mean to wait for it, such
            an id gives a row of NaN and adds nothing to dwte.
    """
    _check(ids, wte, wpe, offset)
    kernel = registry.takes_kernel("embedding", wte)
    if torch.compiler.is_compiling():
        return _call(ids, wte, wpe, offset) if kernel else embedding_reference(ids, wte, wpe, offset)
    try:
        return _call(ids, wte, wpe, offset) if kernel else embedding_reference(ids, wte, wpe, offset)
    except (
        RuntimeError,
        IndexError,
    ):  # the kernel looks at the ids anyway: what is wrong is looked for only afterwards
        if ids.device.type == "cpu":
            _check_range(ids, wte.shape[0])
        raise


def _check(ids: Tensor, wte: Tensor, wpe: Tensor, offset: int) -> None:
    for name, t in (("ids", ids), ("wte", wte), ("wpe", wpe)):
        if not isinstance(t, Tensor):
            raise TypeError(f"embedding: {name} must be a tensor, got {type(t).__name__}")
    if ids.dtype != torch.int64:
        raise TypeError(f"embedding: ids must be int64, got {ids.dtype}")
    if wte.dtype not in DTYPES:
        raise TypeError(f"embedding: wte must be float32, float64, bfloat16 or float16, got {wte.dtype}")
    if wpe.dtype != wte.dtype:
        raise TypeError(f"embedding: wpe must have wte's dtype {wte.dtype}, got {wpe.dtype}")
    for name, t, shape in (("ids", ids, "(B, T)"), ("wte", wte, "(V, C)"), ("wpe", wpe, "(P, C)")):
        if t.dim() != 2:
            raise ValueError(f"embedding: {name} must have shape {shape}, got {tuple(t.shape)}")
    if wpe.shape[1] != wte.shape[1]:
        raise ValueError(f"embedding: wpe must have wte's width {wte.shape[1]}, got shape {tuple(wpe.shape)}")
    for name, t in (("ids", ids), ("wpe", wpe)):
        if t.device != wte.device:
            raise ValueError(f"embedding: {name} is on {t.device} but wte is on {wte.device}: move one of them")
    if isinstance(offset, bool) or not isinstance(offset, (int, torch.SymInt)):
        raise TypeError(f"embedding: offset must be an int, got {type(offset).__name__}")
    if offset < 0:
        raise ValueError(f"embedding: offset must be at least 0, got {offset}")
    if offset + ids.shape[1] > wpe.shape[0]:
        raise ValueError(
            f"embedding: offset {offset} plus ids' length {ids.shape[1]} must be at most wpe's {wpe.shape[0]} rows"
        )


def _check_range(ids: Tensor, vocab: int) -> None:
    wrong = ids[(ids < 0) | (ids >= vocab)]
    if wrong.numel():
        raise ValueError(f"embedding: ids must be in [0, {vocab}), got {int(wrong[0])}") from None


@torch.library.register_fake("fastgpt::embedding")
def _fake(ids: Tensor, wte: Tensor, wpe: Tensor, offset: int) -> Tensor:
    return wte.new_empty((*ids.shape, wte.shape[1]))


@torch.library.register_fake("fastgpt::embedding_backward_add_")
def _fake_backward_add(dy: Tensor, ids: Tensor, dwte: Tensor, positions: int, offset: int) -> Tensor:
    return dy.new_empty((positions, dy.shape[-1]))


@torch.library.register_fake("fastgpt::embedding_backward")
def _fake_backward(dy: Tensor, ids: Tensor, vocab: int, positions: int, offset: int) -> tuple[Tensor, Tensor]:
    return dy.new_empty((vocab, dy.shape[-1])), dy.new_empty((positions, dy.shape[-1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, wte, wpe, offset = inputs
    ctx.save_for_backward(ids)
    ctx.sizes = wte.shape[0], wpe.shape[0], offset


def _backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor, Tensor, None]:
    dwte, dwpe = registry.call_below_autograd("embedding_backward", dy, *ctx.saved_tensors, *ctx.sizes)
    return None, dwte, dwpe, None


_call = registry.differentiable("embedding", save=_save, backward=_backward)
registry.register("embedding", cpu="C++", cuda="CUDA C++")
