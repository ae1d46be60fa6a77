"""Keys and values of the tokens that a model has seen, so that the next token costs one position and not all."""

import torch
from torch import Tensor

from fastgpt.model.config import GPTConfig


class KVCache:
    """Room for `n_positions` keys and values a layer, taken once: nothing is allocated while generating.

    2 * n_layer * batch * n_positions * n_embd numbers: 75 MB for GPT-2 124M in fp32 at batch 1.
    """

    def __init__(self, config: GPTConfig, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.n_layer, batch, config.n_head, config.n_positions, config.n_embd // config.n_head)
        self.keys = torch.empty(shape, device=device, dtype=dtype)  # (L, B, H, n_positions, D)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the new keys and values (B, H, T, D) of a layer behind those it has; returns all of them."""
        end = self.length + k.size(2)
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, tokens: int) -> None:
        """Called once a forward pass, when every layer has appended."""
        self.length += tokens
