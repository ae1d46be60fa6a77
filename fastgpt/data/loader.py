"""Windows of token shards as inputs and targets, the targets being the same tokens one later.

`WindowDataset` is the plain one: a window each `stride` tokens, for torch's DataLoader. `PackedDataset` is what
pre-training reads: windows end to end, shuffled, whose place in the epoch a checkpoint keeps.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastgpt.data.permutation import Permutation
from fastgpt.data.shards import TokenDataset
from fastgpt.errors import UserError

ORDERED_TOGETHER = 1024  # windows whose order is computed at once: as quick as that of a few


def read_windows(data: TokenDataset, starts: Sequence[int], length: int) -> Tensor:
    """The `length` tokens from each of `starts` on: (len(starts), length) int64.

    Raises:
        UserError: an id is outside of the vocabulary; names the shard.
    """
    block = data.windows(starts, length)
    if block.max() >= data.meta["vocab_size"]:
        row = int(block.max(axis=1).argmax())
        raise data.damaged(starts[row] + int(block[row].argmax()))
    return torch.from_numpy(block.astype(np.int64))


def check_position(state: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuses the position of other data than that of `now`, or of an order that another seed or size made."""
    for name in (n for n in now if n not in ("epoch", "position")):
        if state[name] != now[name]:
            raise UserError(
                f"the checkpoint's position is of other data: its {name} is {state[name]}, here it is {now[name]}; "
                "resume on the data that the run was started on"
            )


class WindowDataset(Dataset[tuple[Tensor, Tensor]]):
    """Windows of `max_length` tokens that begin each `stride` tokens; item i is (inputs, targets), (T,) int64 each.

    A `stride` of `max_length` takes each token once, a smaller one makes windows that overlap. What is left at the end
    and does not fill a window with its targets is left out.

        DataLoader(WindowDataset(tokenizer.encode(text), max_length=256, stride=128), batch_size=8, shuffle=True)

    Args:
        ids: a text's, or an opened split of token shards.
        max_length: T, tokens in a window.
        stride: from one window's first token to the next one's.

    Raises:
        UserError: there is not one window, or a number is below 1.
    """

    def __init__(self, ids: Sequence[int] | Tensor | TokenDataset, max_length: int, stride: int) -> None:
        if max_length < 1 or stride < 1:
            raise UserError(f"max_length and stride must be at least 1, got {max_length} and {stride}")
        self.ids = ids if isinstance(ids, TokenDataset) else torch.as_tensor(ids, dtype=torch.int64)
        self.max_length, self.stride = max_length, stride
        if len(self.ids) <= max_length:
            raise UserError(
                f"{len(self.ids):,} tokens are fewer than one window of {max_length + 1:,}: give more text, or a "
                "smaller max_length"
            )

    def __len__(self) -> int:
        return (len(self.ids) - self.max_length - 1) // self.stride + 1

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if not 0 <= i < len(self):
            raise IndexError(f"window {i} of {len(self)}")
        start, length = i * self.stride, self.max_length + 1
        if isinstance(self.ids, TokenDataset):
            window = read_windows(self.ids, [start], length)[0]
        else:
            window = self.ids[start : start + length]
        return window[:-1], window[1:]


class PackedDataset:
    """The stream cut into windows of `block_size` tokens, end to end, whatever documents they cross.

    Each epoch takes every window once, in an order that seed and epoch decide. The position in it is part of a
    checkpoint. Of several ranks each takes its own part of the next windows, and all count all of them: a position
    means the same to any number of ranks.

    Args:
        data: an opened split.
        block_size: T, tokens in a window; the targets are the same tokens one later.
        shuffle: False takes the windows in the text's order.
        document_masks: batches have a third part, `cu_seqlens`.
        rank, ranks: whose part the next batches are, of how many.

    Raises:
        UserError: the split is shorter than one window.
    """

    def __init__(
        self,
        data: TokenDataset,
        block_size: int,
        seed: int,
        shuffle: bool = True,
        document_masks: bool = False,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.data, self.block_size, self.seed, self.shuffle = data, block_size, seed, shuffle
        self.document_masks, self.rank, self.ranks = document_masks, rank, ranks
        self.windows = (len(data) - 1) // block_size
        if self.windows < 1:
            raise UserError(
                f"the {data.split} split of {data.folder} has {len(data):,} tokens, fewer than one window of "
                f"{block_size + 1:,}: give more text, or a smaller --block-size"
            )
        self._go_to(0, 0)

    def _go_to(self, epoch: int, position: int) -> None:
        self.epoch, self.position = epoch, position
        self._coming = self._windows_from(epoch, position)

    def _windows_from(self, epoch: int, position: int) -> Iterator[tuple[int, int]]:
        """Epochs and windows without end."""
        while True:
            order = Permutation(self.windows, [self.seed, epoch])
            for start in range(position, self.windows, ORDERED_TOGETHER):
                stop = min(start + ORDERED_TOGETHER, self.windows)
                for window in order(start, stop) if self.shuffle else range(start, stop):
                    yield epoch, window
            epoch, position = epoch + 1, 0

    def next_windows(self, batch_size: int) -> list[tuple[int, int]]:
        """The epochs and numbers of this rank's next windows, whose `batch` is the next one."""
        windows = list(itertools.islice(self._coming, batch_size * self.ranks))
        epochs, last = divmod(self.position + len(windows) - 1, self.windows)
        self.epoch, self.position = self.epoch + epochs, last + 1
        return windows[self.rank * batch_size :][:batch_size]

    def batch(self, windows: Sequence[int]) -> tuple[Tensor, ...]:
        """The inputs and targets of these windows, (B, T) int64 each; window w starts at token w T of the split.

        With `document_masks` `cu_seqlens` too, as `GPT.loss` takes it: (n + 1,) int32, where among the B T tokens a
        document or a row begins, and B T. A document begins with the end-of-text before it: that is what a model is
        given to begin a text with, and so no token is predicted from another document.
        """
        starts = [window * self.block_size for window in windows]
        ids = read_windows(self.data, starts, self.block_size + 1)
        parts = (ids[:, :-1], ids[:, 1:])  # (B, T) each
        return (*parts, self._cu_seqlens(starts)) if self.document_masks else parts

    def _cu_seqlens(self, starts: list[int]) -> Tensor:
        T, documents = self.block_size, self.data.document_starts
        first = np.array(starts, np.uint64)
        # A document at d begins at d - 1, the end-of-text; one at a row's first token is where the row begins anyway.
        within = (np.searchsorted(documents, first + n).tolist() for n in (2, T + 1))
        boundaries = []
        for row, (start, a, b) in enumerate(zip(starts, *within, strict=True)):
            boundaries += [row * T, *(documents[a:b] - (start + 1) + row * T).tolist()]
        return torch.tensor([*boundaries, len(starts) * T], dtype=torch.int32)

    def next_batch(self, batch_size: int) -> tuple[Tensor, ...]:
        """This rank's next `batch`; goes on into the next epoch by itself."""
        return self.batch([window for _, window in self.next_windows(batch_size)])

    def sequential_batches(self, batch_size: int, max_batches: int | None = None) -> Iterator[tuple[Tensor, ...]]:
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
        names = ("epoch", "position", "seed", "block_size", "windows")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken, by however many ranks.

        Raises:
            UserError: it was taken from other data, or with another block size or seed.
        """
        check_position(state, self.state_dict())
        self._go_to(state["epoch"], state["position"])
