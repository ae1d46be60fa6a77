"""Examples of many lengths as rows of one length, none of which sees its neighbours.

An example of n ids is n - 1 inputs, each with the next id as its target; a target that does not count is -100. Rows are
filled with whole examples and padded at their ends. `cu_seqlens` has every example, and each row's padding, as a
document of its own: attention stays inside it and positions start at 0, so an example's loss is what it is alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastgpt.data.loader import check_position

TooLong = Literal["cut", "skip"]
WINDOW = 1024  # examples that are sorted into rows together: enough to fill rows, few enough to stay shuffled


@dataclass(frozen=True)
class Example:
    """Ids, and which of them are learnt to be predicted."""

    ids: list[int]
    trained: list[bool]

    @property
    def length(self) -> int:
        """Tokens in a row: the last id is only a target."""
        return len(self.ids) - 1


class Batch(NamedTuple):
    """What `GPT.loss` takes: ids and targets (B, T) int64, and the documents' boundaries (n + 1,) int32."""

    ids: Tensor
    targets: Tensor
    cu_seqlens: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(t.to(device, non_blocking=True) for t in self))

    @property
    def weight(self) -> int:
        """How many targets count."""
        return int((self.targets != -100).sum())


def fit_example(ids: list[int], trained: list[bool], block_size: int) -> Example | None:
    """An example cut from the left to `block_size` tokens; None if its last response does not fit in whole.

    What stands behind the last response is left out: nothing is learnt from it. A response that loses its beginning, or
    all that it answers, is not trained.
    """
    end = len(trained) - trained[::-1].index(True)
    ids, trained = ids[:end], trained[:end]
    cut = max(0, end - (block_size + 1))
    start = end - response_length(trained)
    if start - cut < 1:  # one token must stand before it, to predict its first
        return None
    ids, trained = ids[cut:], trained[cut:]
    beginning = trained.index(False)
    return Example(ids, [False] * beginning + trained[beginning:])


def response_length(trained: list[bool]) -> int:
    """Tokens of the last response; `trained` ends with it."""
    return [*reversed(trained), False].index(False)


def pack(lengths: Sequence[int], block_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Which examples stand in each row: first-fit decreasing, in windows of an order that seed and epoch decide."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths)).tolist()
    rows: list[list[int]] = []
    for start in range(0, len(order), WINDOW):
        window: list[list[int]] = []
        room: list[int] = []
        for i in sorted(order[start : start + WINDOW], key=lambda i: -lengths[i]):
            row = next((r for r, left in enumerate(room) if left >= lengths[i]), None)
            if row is None:
                row = len(window)
                window.append([])
                room.append(block_size)
            window[row].append(i)
            room[row] -= lengths[i]
        rows += window
    return [rows[i] for i in rng.permutation(len(rows))]  # or the longest examples would come first


class PackedExamples:
    """Batches of packed rows, epoch after epoch. The position in it is part of a checkpoint.

    Args:
        examples: each of at most `block_size` tokens.
        block_size: T, tokens in a row.
        pad_id: any id of the vocabulary.
    """

    def __init__(self, examples: Sequence[Example], block_size: int, seed: int, pad_id: int = 0) -> None:
        self.examples, self.block_size, self.seed, self.pad_id = examples, block_size, seed, pad_id
        self.lengths = [example.length for example in examples]
        self.epoch = self.position = 0
        self._first = self._rows = pack(self.lengths, block_size, seed, 0)

    def rows(self) -> int:
        """How many rows the first epoch has; the others have nearly as many."""
        return len(self._first)

    def next_batch(self, batch_size: int) -> Batch:
        """The next `batch_size` rows; goes on into the next epoch by itself."""
        rows: list[list[int]] = []
        while len(rows) < batch_size:
            if self.position == len(self._rows):
                self.epoch, self.position = self.epoch + 1, 0
                self._rows = pack(self.lengths, self.block_size, self.seed, self.epoch)
            take = self._rows[self.position : self.position + batch_size - len(rows)]
            self.position += len(take)
            rows += take
        return self._batch(rows)

    def sequential_batches(self, batch_size: int) -> Iterator[Batch]:
        """The first epoch's rows once, the last batch maybe smaller; moves no position."""
        for start in range(0, len(self._first), batch_size):
            yield self._batch(self._first[start : start + batch_size])

    def _batch(self, rows: list[list[int]]) -> Batch:
        T = self.block_size
        ids = torch.full((len(rows), T), self.pad_id)
        targets = torch.full((len(rows), T), -100)
        boundaries = [0]
        for r, row in enumerate(rows):
            start = 0
            for i in row:
                example, end = self.examples[i], start + self.lengths[i]
                ids[r, start:end] = torch.tensor(example.ids[:-1])
                wanted = torch.tensor(example.ids[1:])
                targets[r, start:end] = wanted.masked_fill(~torch.tensor(example.trained[1:]), -100)
                boundaries.append(r * T + end)
                start = end
            if start < T:
                boundaries.append((r + 1) * T)
        return Batch(ids, targets, torch.tensor(boundaries, dtype=torch.int32))

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, for `load_state_dict`."""
        names = ("epoch", "position", "seed", "block_size")
        return {**{name: getattr(self, name) for name in names}, "examples": len(self.examples)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken.

        Raises:
            UserError: it was taken from other data, or with another block size or seed.
        """
        check_position(state, self.state_dict())
        self.epoch, self.position = state["epoch"], state["position"]
        self._rows = pack(self.lengths, self.block_size, self.seed, self.epoch)
