"""A corpus to a folder of token shards: encoded in parallel, divided, and gone on with after a kill.

All is written in a hidden folder beside the one that is asked for, and becomes it at the end. Every few seconds what
is written goes to the disk, and a journal says how much that is and of how many batches. The next run cuts the files
back to the journal and passes over those batches.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgpt.cpus import cpus
from fastgpt.data import read
from fastgpt.data.documents import Batch, Document, Skipped
from fastgpt.data.encode import Encoded, Encoder, encode
from fastgpt.data.read import Corpus, bad_input, batches_of, read_batches
from fastgpt.data.shards import FORMAT, SPLITS, Writer, Written
from fastgpt.errors import UserError
from fastgpt.files import atomic_write, explained, locked, publish, refuse_existing
from fastgpt.tokenizer import Tokenizer

# Bytes of text held back while a split is still empty, so that a small corpus can be divided by hand.
HELD_BACK = 64 << 20
JOURNAL_SECONDS = 3.0


@dataclass(frozen=True)
class PrepareProgress:
    """How far it is: what is there, and how much of it earlier runs had done."""

    done: Written
    before: Written


def prepare(
    corpus: Corpus | Iterable[Document],
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    val_fraction: float = 0.05,
    seed: int = 0,
    shard_tokens: int = 100_000_000,
    workers: int | None = None,
    skipped: Skipped | None = None,
    progress: Callable[[PrepareProgress], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Encodes documents into a folder of token shards, which appears whole or not at all; memory stays flat.

    A document goes to the validation split where the hash of its beginning (512 KiB) and of the seed is below
    `val_fraction`, so that more files move none. A corpus too small for that (a split would be empty) gives validation
    its document of smallest hash, or training the one of the largest; a corpus of a few huge documents gives the empty
    split its last one. Of a single document the last `val_fraction` becomes validation, cut behind a line end if one is
    near.

    Stopped before its end, it goes on where it was when it is called with the same files, tokenizer and options again;
    standard input, datasets and documents in memory are begun again.

    The files are the same to the byte whatever the number of workers, and however often it was stopped.

    Args:
        corpus: what to read, or documents in memory, each of them whole.
        out: folder to make.
        val_fraction: above 0 and below 1.
        seed: of the division.
        shard_tokens: tokens in a file at the most.
        workers: processes that encode, by default one for each CPU that this process may use; a corpus of a few
            megabytes is encoded in this one.
        skipped: counts what the corpus's `skip_bad` passes over.
        progress: called after each batch with how far it is.
        note: called with what a user should know before it begins.

    Returns:
        What meta.json says.

    Raises:
        UserError: there is no text, some of it is bad, `out` exists already, or it cannot be written.
    """
    if not 0 < val_fraction < 1:
        raise UserError(f"--val-fraction must be above 0 and below 1, got {val_fraction}")
    if not 0 <= seed < 2**64:
        raise UserError(f"--seed must be at least 0 and below 2^64, got {seed}")
    if shard_tokens < 1:
        raise UserError(f"--shard-tokens must be at least 1, got {shard_tokens}")
    if workers is not None and workers < 1:
        raise UserError(f"--workers must be at least 1, got {workers}")
    eot = tokenizer.eot_id
    if eot is None:
        raise UserError("the tokenizer has no end-of-text token: train one with the special token <|endoftext|>")
    out = Path(out).absolute()
    refuse_existing(out)
    text_key, skip_bad = (corpus.text_key, corpus.skip_bad) if isinstance(corpus, Corpus) else ("", False)
    encoder = Encoder(tokenizer, eot, text_key, seed)
    options = {"seed": seed, "val_fraction": val_fraction}
    fingerprint = _fingerprint(corpus, {**options, "shard_tokens": shard_tokens, "tokenizer": tokenizer.hash})
    partial = out.with_name(f".{out.name}.partial")
    with explained(out):
        partial.mkdir(parents=True, exist_ok=True)
    with locked(partial / "lock", f"another process is at work on {out}: wait for it, or choose another folder"):
        refuse_existing(out)
        work = _Work(partial, fingerprint, encoder, val_fraction, shard_tokens, skip_bad, skipped or Skipped())
        try:
            with explained(out):
                work.resume(note)
                batches = read_batches(corpus, tokenizer.can_cut) if isinstance(corpus, Corpus) else batches_of(corpus)
                work.run(batches, workers or cpus(), progress)
                meta = {
                    "format": FORMAT,
                    "dtype": encoder.dtype.name,
                    "vocab_size": tokenizer.vocab_size,
                    "tokenizer_hash": tokenizer.hash,
                    "eot_id": eot,
                    **options,
                    "splits": {split: writer.meta() for split, writer in work.writers.items()},
                }
                tokenizer.save_pretrained(work.folder)
                (work.folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
                publish(work.folder, out)
                work.journal.unlink(missing_ok=True)
        except UserError as error:
            if work.journal.exists():
                raise UserError(f"{error}; what is done is kept: the same command goes on with it") from error
            raise
        finally:
            with suppress(OSError):  # of a full disk, again
                work.close()
            if not work.journal.exists():
                shutil.rmtree(partial, ignore_errors=True)
    return meta


def _fingerprint(corpus: Corpus | Iterable[Document], options: dict[str, Any]) -> str | None:
    """What must be the same for going on; None for what cannot be read again from its beginning."""
    if not isinstance(corpus, Corpus):
        return None
    files = corpus.files()
    if not files or not all(path.is_file() for path in files):
        return None
    stats = [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    sizes = [read.BATCH_BYTES, read.TEXT_BYTES, read.LINE_BYTES]
    content = [FORMAT, stats, corpus.format, corpus.text_key, sizes, sorted(options.items())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class _Work:
    """The hidden folder, and the state of what is in it: all that the journal says."""

    def __init__(
        self,
        partial: Path,
        fingerprint: str | None,
        encoder: Encoder,
        val_fraction: float,
        shard_tokens: int,
        skip_bad: bool,
        skipped: Skipped,
    ) -> None:
        self.folder, self.journal = partial / "shards", partial / "journal.json"
        self.fingerprint, self.encoder = fingerprint, encoder
        self.val_fraction, self.shard_tokens = val_fraction, shard_tokens
        self.writers = {split: self._writer(split) for split in SPLITS}
        self.batches = 0  # that were added
        self.held: list[Encoded] | None = []  # until both splits have a document
        self.open: tuple[str, Written] | None = None  # where the text in pieces goes, and what was there before it
        self.dropping = False  # the rest of a text that is bad
        self.skip_bad, self.skipped = skip_bad, skipped
        self.before = Written()  # by earlier runs

    def _writer(self, split: str) -> Writer:
        return Writer(self.folder, split, self.encoder.dtype, self.shard_tokens)

    def resume(self, note: Callable[[str], None] | None) -> None:
        """Takes up what an earlier run has left, or clears it away."""
        if self.journal.exists():
            state = json.loads(self.journal.read_text())
            fits = state["fingerprint"] == self.fingerprint and (self.skip_bad or not state["skipped"]["count"])
            if fits and all(w.cut(Written(**state["written"][split])) for split, w in self.writers.items()):
                self.batches, self.dropping, self.held = state["batches"], state["dropping"], None
                self.open = state["open"] and (state["open"][0], Written(**state["open"][1]))
                self.skipped.add(state["skipped"]["first"], state["skipped"]["count"])
                self.before = self.total()
                for path in self.folder.iterdir():
                    if path.suffix != ".bin":  # of a run that was stopped while it finished
                        path.unlink()
                if note:
                    note(f"going on behind the {self.before.documents:,} documents that were done before")
                return
            if note:
                note("what was done before was of other files or options: beginning again")
        self.journal.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.writers = {split: self._writer(split) for split in SPLITS}

    def save(self) -> None:
        """Brings all that is written to the disk, then the journal."""
        for writer in self.writers.values():
            writer.sync()
        state = {
            "fingerprint": self.fingerprint,
            "batches": self.batches,
            "dropping": self.dropping,
            "open": self.open and (self.open[0], asdict(self.open[1])),
            "skipped": asdict(self.skipped),
            "written": {split: asdict(writer.written) for split, writer in self.writers.items()},
        }
        atomic_write(self.journal, json.dumps(state) + "\n")

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()

    def run(self, batches: Iterator[Batch], workers: int, progress: Callable[[PrepareProgress], None] | None) -> None:
        """Encodes and writes all that is left to do."""
        saved = time.monotonic()
        with closing(encode(islice(batches, self.batches, None), self.encoder, workers)) as results:
            for result in results:
                self.add(result)
                self.batches += 1
                if progress:
                    progress(PrepareProgress(self.total(), self.before))
                if self.fingerprint and self.held is None and time.monotonic() - saved > JOURNAL_SECONDS:
                    self.save()
                    saved = time.monotonic()
        self.finish()

    def total(self) -> Written:
        """What is written and held back."""
        parts = [writer.written for writer in self.writers.values()]
        for e in self.held or ():
            parts.append(Written(len(e.sizes) if e.opens else 0, len(e.tokens), int(e.sizes.sum())))
        return Written(*(sum(getattr(part, f.name) for part in parts) for f in fields(Written)))

    def add(self, result: Encoded) -> None:
        """Takes the next batch."""
        if self.dropping and not result.opens:
            self.dropping = not result.closes
            return
        self.dropping = False
        if result.bad.count:
            if not self.skip_bad:
                raise bad_input(result.bad.first)
            self.skipped.add(result.bad.first, result.bad.count)
        if result.lost:
            self._drop(result)
        elif self.held is None:
            self._write(result, result.places < self.val_fraction)
        else:
            self.held.append(result)
            val = self._places() < self.val_fraction
            both = result.closes and val.any() and not val.all()
            if both or sum(int(e.sizes.sum()) for e in self.held) > HELD_BACK:
                self._release(val)

    def _drop(self, result: Encoded) -> None:
        """Takes back what there is of a text, of which `result` is a later piece."""
        self.dropping = not result.closes
        if result.opens:
            return
        if self.held is None:
            assert self.open
            split, before = self.open
            self.writers[split].written = before
            if self.journal.exists():
                self.save()  # first, so that the files are never shorter than it says
            self.writers[split].cut(before)
        else:
            while not self.held.pop().opens:
                pass

    def _places(self) -> npt.NDArray[np.float64]:
        """Of each document that is held back."""
        return np.concatenate([e.places for e in self.held or () if e.opens] or [np.empty(0)])

    def _release(self, val: npt.NDArray[np.bool_]) -> None:
        """Writes what was held back; to validation where `val` says so."""
        for e in self.held or ():
            own = len(e.places) if e.opens else 0
            self._write(e, val[:own])
            val = val[own:]
        self.held = None

    def _write(self, e: Encoded, val: npt.NDArray[np.bool_]) -> None:
        if not (e.opens and e.closes):
            if e.opens:
                split = SPLITS[int(val[0])]
                self.open = split, replace(self.writers[split].written)
            assert self.open
            self.writers[self.open[0]].add(e.tokens, e.lengths, int(e.sizes.sum()), e.opens)
            return
        for split, chosen in zip(SPLITS, (~val, val), strict=True):
            if chosen.any():
                tokens = e.tokens[np.repeat(chosen, e.lengths)]
                self.writers[split].add(tokens, e.lengths[chosen], int(e.sizes[chosen].sum()))

    def finish(self) -> None:
        """Divides what is small, when all has been added.

        Raises:
            UserError: there is too little text.
        """
        if self.held is not None:
            places = self._places()
            val = places < self.val_fraction
            if len(val) and val.all():
                val[places.argmax()] = False
            elif len(val) > 1 and not val.any():
                val[places.argmin()] = True
            self._release(val)
        documents = [writer.written.documents for writer in self.writers.values()]
        if not any(documents):
            raise self.skipped.nothing_left()
        if not all(documents):
            self._fill_empty_split(single=sum(documents) == 1)
        self.close()

    def _fill_empty_split(self, single: bool) -> None:
        """Moves the last document, or the end of the only one, to the split that has none."""
        self.journal.unlink(missing_ok=True)  # from here on the files are not what it says
        if single and not self.writers["train"].written.documents:
            self.writers["val"].rename("train")
            self.writers = {"train": self.writers["val"], "val": self._writer("val")}
        full, empty = sorted(self.writers.values(), key=lambda writer: -writer.written.documents)
        whole = full.written
        tokens = {i: token for token, i in self.encoder.tokenizer.vocab.items()}
        spelled = [tokens.get(i, b"") for i in range(self.encoder.tokenizer.vocab_size)]
        start = self._end_of_single(full, spelled) if single else full.last_document()
        size = np.array([len(token) for token in spelled])
        for begin in range(start, whole.tokens, 1 << 22):
            part = full.read(begin, min(whole.tokens, begin + (1 << 22)))
            empty.add(part, np.array([len(part)]), int(size[part].sum()), opens=begin == start)
        full.cut(Written(whole.documents - (not single), start, whole.bytes - empty.written.bytes))
        if single:
            full.add(np.array([self.encoder.eot_id], full.dtype), np.array([1]), 0, opens=False)

    def _end_of_single(self, writer: Writer, spelled: list[bytes]) -> int:
        """Where the validation part of the only document begins, in tokens."""
        end = writer.written.tokens - 1  # of the text; the end-of-text is behind it
        if end < 2:
            raise UserError("the corpus is a single token: give more text")
        cut = max(1, min(end - 1, round(end * (1 - self.val_fraction))))
        near = min(end // 100, 1 << 20)
        ends_line = np.array([token.endswith(b"\n") for token in spelled])
        lines = np.flatnonzero(ends_line[writer.read(cut - near, cut)])
        if len(lines):
            return cut - near + int(lines[-1]) + 1
        within = np.array([token[:1] > b"\x7f" and token[:1] < b"\xc0" for token in spelled])  # a character
        while cut > 1 and within[writer.read(cut, cut + 1)[0]]:
            cut -= 1
        return cut
