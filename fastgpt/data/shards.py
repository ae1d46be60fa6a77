"""Token shards: a corpus as flat little-endian integers on the disk, read through memory maps.

meta.json                    format, dtype, vocabulary size, tokenizer hash, and for each split its shards
train_00000.bin, ...         uint16 (or uint32 beyond 65,536 ids): documents one after another, each with the
val_00000.bin, ...           end-of-text id behind it
train_documents.bin, ...     uint64: where each document starts in its split, in tokens
tokenizer.json, ...          the tokenizer, so that the folder is all that training needs
"""

import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from fastgpt.data.mapped import MappedNumbers
from fastgpt.errors import UserError
from fastgpt.files import fsync

FORMAT = "fastgpt-shards-1"
SPLITS = ("train", "val")


@dataclass
class Written:
    """How much of a split there is."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0


class Writer:
    """One split on its way to the disk. What is there can be cut back, and gone on with."""

    def __init__(self, folder: Path, split: str, dtype: "np.dtype[Any]", shard_tokens: int) -> None:
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, dtype, shard_tokens
        self.written = Written()
        self._files: dict[Path, BinaryIO] = {}
        self._changed: set[Path] = set()

    def _shard(self, index: int) -> Path:
        return self.folder / f"{self.split}_{index:05d}.bin"

    @property
    def _starts(self) -> Path:
        return self.folder / f"{self.split}_documents.bin"

    def _append(self, path: Path, content: bytes) -> None:
        if path not in self._files:
            self._files[path] = path.open("ab")
        self._files[path].write(content)
        self._changed.add(path)

    def add(self, tokens: npt.NDArray[Any], lengths: npt.NDArray[np.int64], size: int, opens: bool = True) -> None:
        """Appends documents of these lengths in tokens, and of `size` bytes of text together.

        Args:
            opens: False where the tokens belong to the last document.
        """
        if opens:
            starts = self.written.tokens + np.cumsum(lengths) - lengths
            self._append(self._starts, starts.astype("<u8").tobytes())
            self.written.documents += len(lengths)
        self.written.bytes += size
        while len(tokens):
            shard, used = divmod(self.written.tokens, self.shard_tokens)
            part = tokens[: self.shard_tokens - used]
            self._append(self._shard(shard), part.tobytes())
            self.written.tokens += len(part)
            tokens = tokens[len(part) :]
            if used + len(part) == self.shard_tokens:
                self._files.pop(self._shard(shard)).close()

    def cut(self, to: Written) -> bool:
        """Cuts what is on the disk back to what there was before; False where there is less."""
        self.close()
        sizes = {self._starts: to.documents * 8}
        for i, tokens in enumerate(self._shard_lengths(to)):
            sizes[self._shard(i)] = tokens * self.dtype.itemsize
        for path, size in sizes.items():
            if size and not (path.is_file() and path.stat().st_size >= size):
                return False
        for path in self.folder.glob(f"{self.split}_*.bin"):
            if path not in sizes:
                path.unlink()
                self._changed.discard(path)
            elif path.stat().st_size > sizes[path]:
                os.truncate(path, sizes[path])
                self._changed.add(path)
        self.written = replace(to)
        return True

    def _shard_lengths(self, of: Written) -> list[int]:
        whole, rest = divmod(of.tokens, self.shard_tokens)
        return [self.shard_tokens] * whole + [rest] * bool(rest)

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """The tokens [start, stop)."""
        self.close()
        parts = []
        while start < stop:
            shard, used = divmod(start, self.shard_tokens)
            count = min(stop - start, self.shard_tokens - used)
            parts.append(np.fromfile(self._shard(shard), self.dtype, count, offset=used * self.dtype.itemsize))
            start += count
        return np.concatenate(parts) if parts else np.empty(0, self.dtype)

    def last_document(self) -> int:
        """Where the last document starts."""
        self.close()
        return int(np.fromfile(self._starts, "<u8", 1, offset=8 * (self.written.documents - 1))[0])

    def rename(self, split: str) -> None:
        """Makes it another split."""
        self.close()
        for path in self.folder.glob(f"{self.split}_*.bin"):
            path.replace(path.with_name(path.name.replace(self.split, split, 1)))
        self.split, self._changed = split, set()

    def sync(self) -> None:
        """Returns when all that was added is on the disk."""
        for file in self._files.values():
            file.flush()
        for path in self._changed:
            fsync(path)
        self._changed.clear()

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()

    def meta(self) -> dict[str, Any]:
        """What meta.json says of the split."""
        shards = [{"file": self._shard(i).name, "tokens": n} for i, n in enumerate(self._shard_lengths(self.written))]
        return {**asdict(self.written), "shards": shards}


class TokenDataset:
    """One split of a folder of shards, as one long sequence of tokens. Opened by `TokenDataset.open`."""

    def __init__(self, folder: Path, split: str, meta: dict[str, Any]) -> None:
        self.folder, self.split, self.meta = folder, split, meta
        part = meta["splits"][split]
        self.dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[meta["dtype"]])
        self.files = [shard["file"] for shard in part["shards"]]
        self._ends = list(accumulate(shard["tokens"] for shard in part["shards"]))
        self._shards = [MappedNumbers(folder / s["file"], self.dtype, s["tokens"]) for s in part["shards"]]
        self._documents: MappedNumbers | None = None

    def __reduce__(self) -> tuple[Any, ...]:  # to a DataLoader's workers: they map the files themselves
        return TokenDataset, (self.folder, self.split, self.meta)

    @classmethod
    def open(cls, folder: str | Path, split: str) -> "TokenDataset":
        """Opens the "train" or "val" split of a folder that `prepare` wrote.

        Raises:
            UserError: it is no such folder, or a file of it is missing or has another length than meta.json says.
        """
        path = Path(folder) / "meta.json"
        try:
            meta = json.loads(path.read_text())
            known = meta["format"] == FORMAT
            if not known:
                raise UserError(f"{path} has the format {meta['format']!r}, not {FORMAT!r}: prepare the data again")
            if split not in meta["splits"]:
                raise UserError(f"{folder} has no split {split!r}: it has {', '.join(meta['splits'])}")
            return cls(Path(folder), split, meta)
        except FileNotFoundError:
            raise UserError(f"no token shards at {folder}: make them with `fastgpt data prepare`") from None
        except OSError as error:
            raise UserError(f"{error.filename or path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is damaged: prepare the data again") from None

    def __len__(self) -> int:
        return self._ends[-1]

    def _parts(self, start: int, stop: int) -> list[tuple[MappedNumbers, int, int]]:
        """The shards that hold the tokens [start, stop), and where in each."""
        if not 0 <= start <= stop <= self._ends[-1]:
            raise IndexError(f"tokens [{start}, {stop}) of {len(self)}")
        parts = []
        shard = bisect_right(self._ends, start)
        while start < stop:
            first, end = self._ends[shard - 1] if shard else 0, min(stop, self._ends[shard])
            parts.append((self._shards[shard], start - first, end - first))
            start, shard = end, shard + 1
        return parts

    def tokens(self, start: int, stop: int) -> npt.NDArray[Any]:
        """The tokens [start, stop), across shards; of the files' dtype.

        Raises:
            UserError: a shard of them was cut short since it was opened.
        """
        parts = [shard()[a:b] for shard, a, b in self._parts(start, stop)]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, self.dtype)

    def windows(self, starts: Sequence[int], length: int) -> npt.NDArray[Any]:
        """The `length` tokens from each of `starts` on: (len(starts), length); errors as for `tokens`.

        Of what is not in memory all is asked for before the first is waited for: on a disk that was 4 times as fast.
        """
        parts = [part for start in starts for part in self._parts(start, start + length)]
        for shard, a, b in parts:
            shard.will_need(a, b)
        return np.concatenate([shard()[a:b] for shard, a, b in parts]).reshape(len(starts), length)

    def file_of(self, position: int) -> Path:
        """The shard that holds a token."""
        return self.folder / self.files[bisect_right(self._ends, position)]

    def damaged(self, position: int) -> UserError:
        """What to raise for the token there, which is outside of the vocabulary."""
        found = self.tokens(position, position + 1)[0]
        return UserError(
            f"the shard {self.file_of(position)} holds the id {found:,}, but its vocabulary has "
            f"{self.meta['vocab_size']:,}: it is damaged; prepare the data again"
        )

    @property
    def document_starts(self) -> npt.NDArray[np.uint64]:
        """Where each document starts, in tokens, through a memory map.

        Raises:
            UserError: the file is missing, has another length than meta.json says, or is of other shards.
        """
        if self._documents is None:
            path = self.folder / f"{self.split}_documents.bin"
            documents = MappedNumbers(path, np.dtype("<u8"), self.meta["splits"][self.split]["documents"])
            starts = documents()
            if starts[0] != 0 or starts[-1] >= len(self) or (starts[1:] <= starts[:-1]).any():
                raise UserError(f"{path} does not match the shards: prepare the data again")
            self._documents = documents
        return self._documents()
