"""Batches from token shards."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgpt.data.shards import TokenDataset
from fastgpt.errors import UserError


class PackedDataset:
    """The stream cut into windows of `block_size` tokens, end to end, whatever documents they cross.

    Each epoch takes every window once, in an order that seed and epoch decide. The position in it is part of a
    checkpoint.

    Args:
        data: an opened split.
        block_size: T, tokens in a window; the targets are the same tokens one later.
        shuffle: False takes the windows in the text's order.

    Raises:
        UserError: the split is shorter than one window.
    """

    def __init__(self, data: TokenDataset, block_size: int, seed: int, shuffle: bool = True) -> None:
        self.data, self.block_size, self.seed, self.shuffle = data, block_size, seed, shuffle
        self.windows = (len(data) - 1) // block_size
        if self.windows < 1:
            raise UserError(
                f"the {data.split} split of {data.folder} has {len(data):,} tokens, fewer than one window of "
                f"{block_size + 1:,}: give more text, or a smaller --block-size"
            )
        self.epoch = self.position = 0
        self._order = self._permutation()

    def _permutation(self) -> Tensor:
        if not self.shuffle:
            return torch.arange(self.windows)
        # One stream of random numbers an epoch, from both numbers: seed + epoch would make (0, 1) and (1, 0) the same.
        mixed = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)[0]
        return torch.randperm(self.windows, generator=torch.Generator().manual_seed(int(mixed >> np.uint64(1))))

    def batch(self, windows: list[int]) -> tuple[Tensor, Tensor]:
        """The inputs and targets of these windows, (B, T) int64 each; window w starts at token w T of the split."""
        T = self.block_size
        block = np.stack([self.data.tokens(w * T, w * T + T + 1) for w in windows])  # (B, T + 1)
        if block.max() >= self.data.meta["vocab_size"]:
            row = int(block.max(axis=1).argmax())
            shard = self.data.file_of(windows[row] * T + int(block[row].argmax()))
            raise UserError(
                f"the shard {shard} holds the id {block.max():,}, but its vocabulary has "
                f"{self.data.meta['vocab_size']:,}: it is damaged; prepare the data again"
            )
        ids = torch.from_numpy(block.astype(np.int64))
        return ids[:, :-1], ids[:, 1:]  # (B, T) each

    def next_batch(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """The next inputs and targets, (B, T) int64 each; goes on into the next epoch by itself."""
        return self.batch([window for _, window in self.next_windows(batch_size)])

    def next_windows(self, batch_size: int) -> list[tuple[int, int]]:
        """The epochs and numbers of the next windows, whose `batch` is the next one."""
        windows: list[tuple[int, int]] = []
        while len(windows) < batch_size:
            if self.position == self.windows:
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._permutation()
            take = self._order[self.position : self.position + batch_size - len(windows)].tolist()
            self.position += len(take)
            windows += [(self.epoch, window) for window in take]
        return windows

    def sequential_batches(self, batch_size: int, max_batches: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """The windows in the text's order, the last batch maybe smaller; moves no position.

        With `max_batches`, as many windows as fit into them, evenly spread over the text: its beginning alone may be
        of one kind.
        """
        for windows in self.sequential_windows(batch_size, max_batches):
            yield self.batch(windows)

    def sequential_windows(self, batch_size: int, max_batches: int | None = None) -> list[list[int]]:
        """The windows of each of `sequential_batches`."""
        count = self.windows if max_batches is None else min(self.windows, batch_size * max_batches)
        windows = [i * self.windows // count for i in range(count)]
        return [windows[start : start + batch_size] for start in range(0, count, batch_size)]

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, for `load_state_dict`."""
        return {name: getattr(self, name) for name in ("epoch", "position", "seed", "block_size", "windows")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken.

        Raises:
            UserError: it was taken from other data, or with another block size or seed.
        """
        for name in ("seed", "block_size", "windows"):
            if state[name] != getattr(self, name):
                raise UserError(
                    f"the checkpoint's position is of other data: its {name} is {state[name]}, here it is "
                    f"{getattr(self, name)}; resume on the data that the run was started on"
                )
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = self._permutation()
