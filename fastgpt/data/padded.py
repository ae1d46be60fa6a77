"""Batches of whole documents, padded, as fine-tuning takes them."""

import random
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastgpt.data.loader import check_position, read_windows
from fastgpt.data.shards import TokenDataset
from fastgpt.errors import UserError

# Batches are filled from so many batches' rows, in the order of their lengths: little is padding.
SORTED_TOGETHER = 16


def batches_by_length(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The rows of each batch of an epoch: shuffled, then sorted by length some batches at a time, then shuffled again.

    Args:
        lengths: of each row.
    """
    rng = random.Random(f"{seed}/{epoch}")
    order = rng.sample(range(len(lengths)), len(lengths))
    batches = []
    for start in range(0, len(order), batch_size * SORTED_TOGETHER):
        together = sorted(order[start : start + batch_size * SORTED_TOGETHER], key=lambda i: lengths[i])
        batches += [together[i : i + batch_size] for i in range(0, len(together), batch_size)]
    rng.shuffle(batches)
    return batches


class DocumentBatch(NamedTuple):
    """ids and targets (B, T) int64, filled on the right, the targets with -100; mask (B, T) bool, where ids are a
    document's own. Causal attention needs no mask for what is filled on the right: nothing before it sees it."""

    ids: Tensor
    targets: Tensor
    mask: Tensor


class DocumentDataset:
    """A document a row, rows of like length together; the targets are the document's tokens one later, its end-of-text
    the last.

    Each epoch takes every row once, in an order that seed and epoch decide; its last batches may be smaller. The
    position in it is part of a checkpoint.

    Args:
        data: an opened split.
        batch_size: B, rows in a batch.
        max_length: tokens in a row at the most.
        too_long: of a longer document, "cut" takes the first tokens and "split" all of them, in several rows.
        pad_id: any id of the vocabulary.

    Raises:
        UserError: the documents' starts do not match the shards, or a number is below 1.
    """

    def __init__(
        self,
        data: TokenDataset,
        batch_size: int,
        max_length: int,
        seed: int,
        too_long: Literal["cut", "split"] = "cut",
        pad_id: int = 0,
    ) -> None:
        if batch_size < 1 or max_length < 1:
            raise UserError(f"batch_size and max_length must be at least 1, got {batch_size} and {max_length}")
        self.data, self.batch_size, self.max_length = data, batch_size, max_length
        self.seed, self.pad_id = seed, pad_id
        starts = data.document_starts.astype(np.int64)
        # A row of n inputs takes n + 1 tokens: the last one is only a target. A document of one token has nothing else.
        lengths = np.diff(starts, append=len(data)) - 1
        if too_long == "split":
            rows = -(-lengths // max_length)
            which = np.repeat(np.arange(len(starts)), rows)
            before = max_length * (np.arange(len(which)) - np.repeat(rows.cumsum() - rows, rows))
            starts, lengths = starts[which] + before, lengths[which] - before
        self.starts, self.lengths = starts[lengths > 0], np.minimum(lengths[lengths > 0], max_length)
        if not len(self.starts):
            raise UserError(f"the {data.split} split of {data.folder} has only empty documents: give it text")
        self._go_to(0, 0)

    def _go_to(self, epoch: int, position: int) -> None:
        self.epoch, self.position = epoch, position
        self._batches = batches_by_length(self.lengths.tolist(), self.batch_size, self.seed, epoch)

    def next_batch(self) -> DocumentBatch:
        """The next rows; goes on into the next epoch by itself."""
        if self.position == len(self._batches):
            self._go_to(self.epoch + 1, 0)
        rows = self._batches[self.position]
        self.position += 1
        return self.batch(rows)

    def batch(self, rows: Sequence[int]) -> DocumentBatch:
        """These rows; row i begins at token `starts[i]` of the split and has `lengths[i]` inputs."""
        ids = [read_windows(self.data, [int(self.starts[i])], int(self.lengths[i]) + 1)[0] for i in rows]
        inputs = pad_sequence([row[:-1] for row in ids], batch_first=True, padding_value=self.pad_id)  # (B, T)
        targets = pad_sequence([row[1:] for row in ids], batch_first=True, padding_value=-100)
        return DocumentBatch(inputs, targets, targets != -100)

    def padding(self) -> float:
        """The share of this epoch's batches that is padding."""
        longest = [int(self.lengths[rows].max()) * len(rows) for rows in self._batches]
        return 1 - int(self.lengths.sum()) / sum(longest)

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, for `load_state_dict`."""
        names = ("epoch", "position", "seed", "batch_size", "max_length")
        return {**{name: getattr(self, name) for name in names}, "rows": len(self.starts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken.

        Raises:
            UserError: it was taken from other data, or with other numbers.
        """
        check_position(state, self.state_dict())
        self._go_to(state["epoch"], state["position"])
