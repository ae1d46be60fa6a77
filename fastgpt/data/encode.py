"""Batches of raw bytes to tokens, in worker processes, in order.

The workers are plain subprocesses that speak pickle over their standard input and output: they import this module and
nothing of the program that started them, and they end by themselves when their input does, however that program ended.
A thread here for each of them hands it a batch and waits for the tokens.
"""

import contextlib
import hashlib
import os
import pickle
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from fastgpt.data.documents import Batch, Document, Skipped, decoded
from fastgpt.errors import UserError
from fastgpt.tokenizer import Tokenizer, without_surrogates

# A document's side is decided by its first bytes: those of a text that is cut into pieces are in its first one.
HASHED_BYTES = 1 << 19
FEW_BATCHES = 4  # fewer are encoded in this process: sooner than others have started


@dataclass
class Encoded:
    """What became of a batch, of n documents.

    Args:
        tokens: their ids one behind the other, an end-of-text behind each that is closed.
        lengths: (n,) int64, each one's tokens.
        sizes: (n,) int64, each one's bytes of UTF-8.
        places: (n,) float64 in [0, 1): a number that each one's text and the seed decide; for its side.
        opens, closes: as the batch's.
        lost: the text that the batch is a piece of is bad, all of it.
        bad: what was wrong.
    """

    tokens: npt.NDArray[Any]
    lengths: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    places: npt.NDArray[np.float64]
    opens: bool
    closes: bool
    lost: bool
    bad: Skipped


class Encoder:
    """Encodes batches. Goes to the workers whole."""

    def __init__(self, tokenizer: Tokenizer, eot_id: int, text_key: str, seed: int) -> None:
        self.tokenizer, self.eot_id, self.text_key = tokenizer, eot_id, text_key
        self.key = seed.to_bytes(8, "little")
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")

    def __call__(self, batch: Batch) -> Encoded:
        texts: list[str] = []
        raw: list[bytes] = []
        bad = Skipped()
        for item in decoded(batch, self.text_key):
            if isinstance(item, Document):
                text = item.text
                try:
                    raw.append(text.encode())
                except UnicodeEncodeError:
                    text = without_surrogates(text)
                    raw.append(text.encode())
                texts.append(text)
            else:
                bad.add(str(item))
        piece = not (batch.opens and batch.closes)
        lost = piece and bad.count > 0
        if lost:
            texts, raw = [], []
        ids, lengths = self.tokenizer.encode_to_numpy(texts)
        if batch.closes:
            ids = np.insert(ids, np.cumsum(lengths), self.eot_id)
            lengths += 1
        return Encoded(
            tokens=ids.astype(self.dtype),
            lengths=lengths,
            sizes=np.fromiter(map(len, raw), np.int64, len(raw)),
            places=np.fromiter(map(self._place, raw), np.float64, len(raw)),
            opens=batch.opens,
            closes=batch.closes,
            lost=lost,
            bad=bad,
        )

    def _place(self, text: bytes) -> float:
        digest = hashlib.blake2b(text[:HASHED_BYTES], digest_size=8, key=self.key).digest()
        return int.from_bytes(digest, "little") / 2**64


def encode(batches: Iterator[Batch], encoder: Encoder, workers: int) -> Generator[Encoded]:
    """Each batch encoded, in order. At most two batches a worker are on their way at a time.

    Raises:
        UserError: a worker was killed.
    """
    first = list(islice(batches, FEW_BATCHES))
    if workers == 1 or len(first) < FEW_BATCHES:
        yield from map(encoder, chain(first, batches))
        return
    content = pickle.dumps(sys.path) + pickle.dumps(encoder, pickle.HIGHEST_PROTOCOL)
    processes: list[subprocess.Popen[bytes]] = []
    own = threading.local()

    def encoded(batch: Batch) -> Encoded:
        if not hasattr(own, "process"):
            own.process = _start()
            processes.append(own.process)
            with contextlib.suppress(BrokenPipeError):  # `_ask` will tell why
                own.process.stdin.write(content)
        return _ask(own.process, batch)

    threads = ThreadPoolExecutor(workers)
    pending: deque[Future[Encoded]] = deque()
    try:
        for batch in chain(first, batches):
            pending.append(threads.submit(encoded, batch))
            if len(pending) == 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for process in processes:
            process.kill()
        threads.shutdown(cancel_futures=True)
        for process in processes:
            process.kill()  # one that was just being started
            process.wait()
            for stream in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # what it was still to be given
                    cast(BinaryIO, stream).close()


def _start() -> "subprocess.Popen[bytes]":
    # In a session of its own, so that Ctrl-C in the terminal reaches this process alone, which then ends the others.
    code = "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); import fastgpt.data.encode as e; e.work()"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},  # numpy makes threads for all CPUs
    )


def _ask(process: "subprocess.Popen[bytes]", batch: Batch) -> Encoded:
    try:
        stdin = cast(BinaryIO, process.stdin)
        pickle.dump(batch, stdin, pickle.HIGHEST_PROTOCOL)
        stdin.flush()
        return pickle.load(cast(BinaryIO, process.stdout))
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):
        code = process.wait()
        if code < 0:
            raise UserError(
                f"a worker process was killed by signal {-code}, perhaps for want of memory: use fewer --workers"
            ) from None
        raise RuntimeError(f"a worker process failed with exit code {code}; its error stands above") from None


def work() -> None:
    """What a worker process does."""
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    with contextlib.suppress(EOFError, BrokenPipeError, pickle.UnpicklingError):  # the program that asks has ended
        encoder = pickle.load(stdin)
        while True:
            result = encoder(pickle.load(stdin))
            pickle.dump(result, stdout, pickle.HIGHEST_PROTOCOL)
            stdout.flush()
    os._exit(0)
