"""Weights held in 4 bits, NF4 with double quantization (QLoRA: Dettmers et al. 2023, arXiv:2305.14314).

A weight's numbers, row after row, are cut into blocks of 64. With a the largest magnitude of a block, each w of it is
held as the index of the nearest of 16 values to w / a, which is in [-1, 1]:

    w ~ NF4[code] * a

The 16 values are quantiles of the normal distribution scaled to [-1, 1], one of them 0, so each code is about as
frequent as the next for normal weights. The a of all blocks are quantized in turn, to 8 bits: their mean is taken off,
and in groups of 256 they are whole multiples, within +-127, of the group's scale:

    a ~ absmax * scale + mean

The codes are chosen for a as it will be read back. A weight takes 4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits. On normal
weights the error is 0.092 of their root mean square; the second quantization's part in it does not show. An outlier
makes its block's steps coarse, and its group's scale: the other 255 blocks then have little but the mean for their a.

All of it is in fp32, each operation rounded once, so every implementation gives the same bits. Nothing is kept that is
as large as the weight: `lora_linear` makes it again, in the dtype that it computes in, forward and backward.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt.ops import registry
from fastgpt.ops.registry import DTYPES

BLOCK = 64  # weights of one a
GROUP = 256  # blocks of one scale

# The paper's appendix E: normal quantiles at 7 equal steps of probability from 1 - d up to 1/2 and at 8 from 1/2 up to
# d, with d = (31/32 + 29/30) / 2, divided by the largest. csrc/common/nf4.h has them too.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_CHUNK = 1 << 14  # blocks that quantize_nf4 works on at once: 4 MB of weights in fp32

Tensors: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]  # an NF4Weight's codes, absmax, scale and mean

# `numel` weights in a row: what the caller makes of them in shape is a view.
torch.library.define(
    "fastgpt::dequantize_nf4",
    "(Tensor codes, Tensor absmax, Tensor scale, Tensor mean, SymInt numel, ScalarType dtype) -> Tensor",
)


class NF4Weight(nn.Module):
    """A weight in 4 bits. As a submodule it moves with its model and is in the state dict; its tensors are never cast.

    Attributes:
        codes: (blocks, 32), uint8. Byte i holds the code of a block's weight i in its low half, i + 32's in its high.
        absmax: (blocks,), int8.
        scale: (ceil(blocks / 256),), float32.
        mean: (1,), float32.
        shape: of the weight. The last block's weights beyond it are 0.
        dtype: that `dequantize` gives by default: the weight's, or what the module was cast to.
    """

    codes: Tensor
    absmax: Tensor
    scale: Tensor
    mean: Tensor

    def __init__(
        self, codes: Tensor, absmax: Tensor, scale: Tensor, mean: Tensor, shape: Sequence[int], dtype: torch.dtype
    ) -> None:
        super().__init__()
        for name, t in (("codes", codes), ("absmax", absmax), ("scale", scale), ("mean", mean)):
            self.register_buffer(name, t)
        self.shape, self.dtype = torch.Size(shape), dtype

    def tensors(self) -> Tensors:
        """codes, absmax, scale, mean."""
        return self.codes, self.absmax, self.scale, self.mean

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """`ops.dequantize_nf4` of this weight."""
        return dequantize_nf4(self, dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {self.dtype}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NF4Weight":
        # As bytes, which `.to(torch.bfloat16)` leaves alone: 16 bits are too few for a scale and a mean.
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        return super()._apply(lambda t: fn(t.view(torch.uint8)).view(t.dtype), recurse)


@torch.no_grad()
def quantize_nf4(weight: Tensor) -> NF4Weight:
    """Makes an NF4Weight of a weight, in chunks: of its own size it needs nothing beside the result.

    Args:
        weight: of any shape, at least one element; float32, float64, bfloat16 or float16; all finite.

    Raises:
        TypeError: weight is no tensor or has another dtype.
        ValueError: it is empty, or has an element that is infinite, NaN or 2^127 and more.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"quantize_nf4: weight must be a tensor, got {type(weight).__name__}")
    if weight.dtype not in DTYPES:
        raise TypeError(f"quantize_nf4: weight must be float32, float64, bfloat16 or float16, got {weight.dtype}")
    if weight.numel() == 0:
        raise ValueError(f"quantize_nf4: weight must have at least one element, got shape {tuple(weight.shape)}")
    flat = weight.reshape(-1)
    blocks = -(-len(flat) // BLOCK)

    def chunk(first: int) -> Tensor:
        """(up to _CHUNK, 64), from block `first` on."""
        part = flat[first * BLOCK : (first + _CHUNK) * BLOCK].float()
        return F.pad(part, (0, -len(part) % BLOCK)).view(-1, BLOCK)

    starts = range(0, blocks, _CHUNK)
    largest = torch.cat([chunk(first).abs().amax(1) for first in starts])
    if not (largest < 2.0**127).all():  # and NaN is not less
        raise ValueError("quantize_nf4: weight must be finite and below 2^127 everywhere, and is not")
    mean = largest.double().mean().float().view(1)
    groups = F.pad(largest - mean, (0, -blocks % GROUP)).view(-1, GROUP)
    scale = groups.abs().amax(1) / 127
    steps = groups / scale.clamp(min=2.0**-149)[:, None]  # the least fp32 above 0: a scale of 0 has groups of 0
    absmax = steps.round().clamp(-127, 127).to(torch.int8).flatten()[:blocks].clone()

    a = _expanded_absmax(absmax, scale, mean)
    a.masked_fill_(a == 0, 1)  # whatever the codes are then, the weights are 0
    table = torch.tensor(NF4, device=weight.device)
    between = (table[1:] + table[:-1]) / 2
    codes = torch.empty(blocks, BLOCK // 2, dtype=torch.uint8, device=weight.device)
    for first in starts:
        block = chunk(first)
        nearest = torch.bucketize(block / a[first : first + len(block), None], between, out_int32=True).byte()
        codes[first : first + len(block)] = nearest[:, : BLOCK // 2] | nearest[:, BLOCK // 2 :] << 4
    return NF4Weight(codes, absmax, scale, mean, weight.shape, weight.dtype)


def dequantize_nf4_reference(weight: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """The definition, in plain torch; also what runs where there is no kernel."""
    return _definition(*weight.tensors(), weight.shape.numel(), dtype or weight.dtype).view(weight.shape)


def dequantize_nf4(weight: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """The weight that `weight` holds, as near as its 4 bits are.

    Args:
        weight: what `quantize_nf4` gives.
        dtype: float32, float64, bfloat16 or float16; by default `weight.dtype`.

    Returns:
        (weight.shape), contiguous, of `dtype`: NF4[code] * a in fp32, then rounded. The same bits on every device.

    Raises:
        TypeError: weight is no NF4Weight, or dtype is not one of the above.
    """
    if not isinstance(weight, NF4Weight):
        raise TypeError(f"dequantize_nf4: weight must be an NF4Weight, got {type(weight).__name__}")
    dtype = dtype or weight.dtype
    if dtype not in DTYPES:
        raise TypeError(f"dequantize_nf4: dtype must be float32, float64, bfloat16 or float16, got {dtype}")
    return expand(weight.tensors(), weight.shape, dtype)


def expand(tensors: Tensors, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What dequantize_nf4 does, of an NF4Weight's tensors; for ops that hold those."""
    kernel = registry.takes_kernel("dequantize_nf4", tensors[0])
    make = torch.ops.fastgpt.dequantize_nf4.default if kernel else _definition
    return make(*tensors, math.prod(shape), dtype).view(shape)


def _definition(codes: Tensor, absmax: Tensor, scale: Tensor, mean: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
    table = torch.tensor(NF4, dtype=scale.dtype, device=codes.device)
    each = torch.stack([codes & 15, codes >> 4], 1).flatten(1)  # (blocks, 64)
    weights = table[each.int()] * _expanded_absmax(absmax, scale, mean)[:, None]
    return weights.flatten()[:numel].to(dtype)


def _expanded_absmax(absmax: Tensor, scale: Tensor, mean: Tensor) -> Tensor:
    return absmax.to(scale.dtype) * scale.repeat_interleave(GROUP)[: len(absmax)] + mean


@torch.library.register_fake("fastgpt::dequantize_nf4")
def _fake(codes: Tensor, absmax: Tensor, scale: Tensor, mean: Tensor, numel: int, dtype: Any) -> Tensor:
    return codes.new_empty(numel, dtype=dtype)


registry.register("dequantize_nf4", cpu="C++", cuda="CUDA C++")
