"""Token shards: a corpus as flat little-endian integers on the disk, read through memory maps.

meta.json                    format, dtype, vocabulary size, tokenizer hash, and for each split its shards
train_00000.bin, ...         uint16 (or uint32 beyond 65,536 ids): documents one after another, each with the
val_00000.bin, ...           end-of-text id behind it
train_documents.bin, ...     uint64: where each document starts in its split, in tokens
tokenizer.json, ...          the tokenizer, so that the folder is all that training needs
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgpt.data.mapped import MappedNumbers
from fastgpt.data.read import Document
from fastgpt.errors import UserError
from fastgpt.files import atomic_dir
from fastgpt.tokenizer import Tokenizer

FORMAT = "fastgpt-shards-1"
SPLITS = ("train", "val")
# Held back while a split is still empty, so that a small corpus can be divided by hand.
HELD_BACK = 64 * 2**20
BATCH = 256  # documents encoded at a time


class _Writer:
    """One split on its way to the disk."""

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int) -> None:
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, np.dtype(dtype), shard_tokens
        self.shards: list[dict[str, Any]] = []
        self.documents = self.tokens = self.bytes = 0
        self._starts = (folder / f"{split}_documents.bin").open("wb")
        self._file: Any = None

    def add(self, ids: list[int], text_bytes: int) -> None:
        self._starts.write(np.array([self.tokens], "<u8").tobytes())
        array = np.array(ids, self.dtype)
        self.documents += 1
        self.tokens += len(array)
        self.bytes += text_bytes
        while len(array):
            if self._file is None or self.shards[-1]["tokens"] == self.shard_tokens:
                self.close_shard()
                name = f"{self.split}_{len(self.shards):05d}.bin"
                self._file = (self.folder / name).open("wb")
                self.shards.append({"file": name, "tokens": 0})
            part = array[: self.shard_tokens - self.shards[-1]["tokens"]]
            self._file.write(part.tobytes())
            self.shards[-1]["tokens"] += len(part)
            array = array[len(part) :]

    def close_shard(self) -> None:
        if self._file is not None:
            self._file.close()

    def close(self) -> dict[str, Any]:
        self.close_shard()
        self._starts.close()
        return {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes, "shards": self.shards}


def _place(text: str, seed: int) -> float:
    """A number in [0, 1) that depends on the text and the seed alone."""
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") / 2**64


def _divide(documents: Iterable[Document], val_fraction: float, seed: int) -> Iterator[tuple[str, str]]:
    """(split, text) of each document: val where its hash is below `val_fraction`, so that more files move none.

    A corpus too small for that (a split would be empty) gives val its document of smallest hash, or the largest goes
    to train; of a single document the last `val_fraction` becomes val, cut behind a line end if one is near.
    """
    held: list[str] = []
    seen: set[bool] = set()
    size = 0
    rest = iter(documents)
    for document in rest:
        held.append(document.text)
        seen.add(_place(document.text, seed) < val_fraction)
        size += len(document.text)
        if len(seen) == 2 or size > HELD_BACK:
            break
    else:
        if not held:
            raise UserError("the corpus is empty: no file has any text")
        if len(held) == 1:
            text = held[0]
            cut = max(1, min(len(text) - 1, round(len(text) * (1 - val_fraction))))
            line = text.rfind("\n", cut - len(text) // 100, cut) + 1
            cut = line or cut
            if len(text) < 2:
                raise UserError("the corpus is one character: give more text")
            yield from (("train", text[:cut]), ("val", text[cut:]))
            return
        by_hash = sorted(range(len(held)), key=lambda i: _place(held[i], seed))
        val = {i for i in by_hash if _place(held[i], seed) < val_fraction} or {by_hash[0]}
        val -= {by_hash[-1]}
        for i, text in enumerate(held):
            yield ("val" if i in val else "train"), text
        return
    for text in chain(held, (document.text for document in rest)):
        yield ("val" if _place(text, seed) < val_fraction else "train"), text


def prepare(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    val_fraction: float = 0.05,
    seed: int = 0,
    shard_tokens: int = 100_000_000,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Encodes documents into a folder of token shards, which appears whole or not at all; memory stays flat.

    Args:
        out: folder to make.
        val_fraction: how much of the documents goes to the validation split, above 0 and below 1.
        seed: of the division.
        shard_tokens: tokens in a file at the most.
        progress: called with the number of documents written so far.

    Returns:
        What meta.json says.

    Raises:
        UserError: there is no text, `out` exists already, or it cannot be written.
    """
    if not 0 < val_fraction < 1:
        raise UserError(f"--val-fraction must be above 0 and below 1, got {val_fraction}")
    if not 0 <= seed < 2**64:
        raise UserError(f"--seed must be at least 0 and below 2^64, got {seed}")
    if shard_tokens < 1:
        raise UserError(f"--shard-tokens must be at least 1, got {shard_tokens}")
    eot = tokenizer.eot_id
    if eot is None:
        raise UserError("the tokenizer has no end-of-text token: train one with the special token <|endoftext|>")
    dtype = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
    with atomic_dir(Path(out)) as folder:
        writers = {split: _Writer(folder, split, dtype, shard_tokens) for split in SPLITS}
        done = 0

        def write(batch: list[tuple[str, str]]) -> None:
            encoded = tokenizer.encode_batch([text for _, text in batch])
            for (split, text), ids in zip(batch, encoded, strict=True):
                writers[split].add([*ids, eot], len(text.encode("utf-8", "replace")))

        batch: list[tuple[str, str]] = []
        for item in _divide(documents, val_fraction, seed):
            batch.append(item)
            if len(batch) == BATCH:
                write(batch)
                done += len(batch)
                batch = []
                if progress:
                    progress(done)
        write(batch)
        meta: dict[str, Any] = {
            "format": FORMAT,
            "dtype": "uint16" if dtype == "<u2" else "uint32",
            "vocab_size": tokenizer.vocab_size,
            "tokenizer_hash": tokenizer.hash,
            "eot_id": eot,
            "seed": seed,
            "val_fraction": val_fraction,
            "splits": {split: writer.close() for split, writer in writers.items()},
        }
        for split, part in meta["splits"].items():
            if not part["tokens"]:
                raise UserError(f"no document came into the {split} split: change --val-fraction or --seed")
        tokenizer.save_pretrained(folder)
        (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    return meta


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
