"""What a folder of token shards holds: the lengths of its documents, the tokens that occur, the text of a window.

All of it is read in blocks: memory stays flat, and what would take minutes on a huge corpus is counted on evenly spread
parts of it, which the results say.
"""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgpt.data.shards import TokenDataset
from fastgpt.errors import UserError
from fastgpt.files import atomic_write
from fastgpt.tokenizer import Tokenizer

BLOCK = 2**20  # documents or tokens read at a time
TOKEN_BLOCKS = 128  # blocks in which tokens are counted, at the most: some seconds
SAMPLED_LENGTHS = 1_000_000  # lengths that the median is of, at the most
_EIGHTHS = " ▏▎▍▌▋▊▉"


@dataclass(frozen=True)
class Shards:
    """A folder that `prepare` wrote, all its splits opened, with the tokenizer that made it."""

    folder: Path
    meta: dict[str, Any]
    tokenizer: Tokenizer
    splits: dict[str, TokenDataset]

    @classmethod
    def open(cls, folder: str | Path) -> "Shards":
        """Opens all of it.

        Raises:
            UserError: a file of it is missing or damaged, or the tokenizer there is another one.
        """
        folder = Path(folder)
        meta = TokenDataset.open(folder, "train").meta
        splits = {split: TokenDataset.open(folder, split) for split in meta["splits"]}
        tokenizer = Tokenizer.from_pretrained(folder)
        try:
            same = meta["tokenizer_hash"] == tokenizer.hash
            whole = (meta["vocab_size"], meta["eot_id"]) == (tokenizer.vocab_size, tokenizer.eot_id)
            for name, data in splits.items():
                part = meta["splits"][name]
                whole &= len(data) == part["tokens"]
                whole &= all(type(part[key]) is int and part[key] > 0 for key in ("documents", "bytes"))
        except (KeyError, TypeError, IndexError):
            raise UserError(f"{folder / 'meta.json'} is damaged: prepare the data again") from None
        if not same:
            raise UserError(
                f"the tokenizer in {folder} is not the one that its shards were made with: "
                "put that one's tokenizer.json there, or prepare the data again"
            )
        if not whole:
            raise UserError(f"{folder / 'meta.json'} is damaged: prepare the data again")
        return cls(folder, meta, tokenizer, splits)

    def split(self, name: str) -> TokenDataset:
        if name not in self.splits:
            raise UserError(f"{self.folder} has no split {name!r}: it has {', '.join(self.splits)}")
        return self.splits[name]

    @property
    def disk_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.iterdir())


@dataclass(frozen=True)
class Lengths:
    """The lengths of a split's documents in tokens, without the end-of-text.

    Attributes:
        counts: how many documents have a length of at least 2^i and below 2^(i+1), for each i; an empty document, which
            `prepare` writes none of, counts to the first.
        sampled: how many documents, evenly spread, the median is of.
    """

    documents: int
    shortest: int
    median: float
    mean: float
    longest: int
    counts: list[int]
    sampled: int


def document_lengths(data: TokenDataset) -> Lengths:
    """One pass over where the documents start.

    Raises:
        UserError: the starts are missing or do not match the shards.
    """
    starts = data.document_starts
    step = -(-len(starts) // SAMPLED_LENGTHS)
    counts = np.zeros(64, np.int64)
    sample: list[npt.NDArray[Any]] = []
    shortest, longest = len(data), 0
    for first in range(0, len(starts), BLOCK):
        block = starts[first : first + BLOCK + 1].astype(np.int64)
        if first + BLOCK >= len(starts):
            block = np.append(block, len(data))
        lengths = np.diff(block) - 1
        shortest, longest = min(shortest, int(lengths.min())), max(longest, int(lengths.max()))
        counts += np.bincount(np.frexp(np.maximum(lengths, 1))[1] - 1, minlength=len(counts))
        sample.append(lengths[-first % step :: step])
    sampled = np.concatenate(sample)
    return Lengths(
        len(starts),
        shortest,
        float(np.median(sampled)),
        len(data) / len(starts) - 1,
        longest,
        np.trim_zeros(counts, "b").tolist(),
        len(sampled),
    )


@dataclass(frozen=True)
class TokenCounts:
    """How often each id occurs, (vocab_size,) int64, among `tokens` tokens in `blocks` evenly spread pieces."""

    counts: npt.NDArray[np.int64]
    tokens: int
    blocks: int

    @property
    def used(self) -> int:
        return int(np.count_nonzero(self.counts))

    def most_frequent(self, count: int) -> list[tuple[int, int]]:
        """The ids that occur most often, each with how often; of ties the smaller id first."""
        order = np.argsort(-self.counts, kind="stable")[:count]
        return [(int(i), int(self.counts[i])) for i in order if self.counts[i]]


def count_tokens(data: TokenDataset) -> TokenCounts:
    """One pass over the tokens, or over TOKEN_BLOCKS pieces of many.

    Raises:
        UserError: an id is not in the vocabulary.
    """
    vocab_size = data.meta["vocab_size"]
    every = -(-len(data) // BLOCK)
    blocks = min(every, TOKEN_BLOCKS)
    counts = np.zeros(vocab_size, np.int64)
    for i in range(blocks):
        start = i * every // blocks * BLOCK
        block = data.tokens(start, min(start + BLOCK, len(data)))
        if block.max() >= vocab_size:
            raise data.damaged(start + int(block.argmax()))
        counts += np.bincount(block, minlength=vocab_size)
    return TokenCounts(counts, int(counts.sum()), blocks)


@dataclass(frozen=True)
class Part:
    """What a window has of one document: `ids` from its token `offset` on; `length` with its end-of-text."""

    document: int
    offset: int
    length: int
    ids: list[int]


def window(data: TokenDataset, at: int, length: int) -> list[Part]:
    """The tokens [at, at + length) of a split, or what there is of them, by document.

    Raises:
        UserError: there is no token `at`, or the length is none.
    """
    if not 0 <= at < len(data):
        raise UserError(f"--at must be at least 0 and below the split's {len(data):,} tokens, got {at}")
    if length < 1:
        raise UserError(f"--length must be at least 1, got {length}")
    starts, stop = data.document_starts, min(at + length, len(data))
    parts = []
    document = int(np.searchsorted(starts, at, "right")) - 1
    while at < stop:
        first = int(starts[document])
        end = int(starts[document + 1]) if document + 1 < len(starts) else len(data)
        until = min(end, stop)
        parts.append(Part(document, at - first, end - first, data.tokens(at, until).tolist()))
        at, document = until, document + 1
    return parts


def document_window(data: TokenDataset, document: int, length: int) -> list[Part]:
    """A document's first tokens, `length` at the most.

    Raises:
        UserError: there is no such document, or the length is none.
    """
    starts = data.document_starts
    if not 0 <= document < len(starts):
        raise UserError(f"--document must be at least 0 and below the split's {len(starts):,}, got {document}")
    return window(data, int(starts[document]), length)[:1]


def length_bars(lengths: Lengths, width: int = 40) -> list[str]:
    """The lengths as a picture of text: a bar for each power of two, its share of the documents behind it."""
    first = next(i for i, count in enumerate(lengths.counts) if count)
    rows = [(f"{2**i:,}", f"{2 ** (i + 1) - 1:,}", n) for i, n in enumerate(lengths.counts)][first:]
    wide, most = len(rows[-1][1]), max(lengths.counts)
    lines = []
    for low, high, count in rows:
        eighths = max(round(8 * width * count / most), count > 0)  # what is there is seen
        bar = "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
        label = f"{low:>{wide}} - {high:>{wide}}"
        lines.append(f"{label} │{bar} {count:,} ({count / lengths.documents:.1%})" if count else f"{label} │")
    return lines


def draw_lengths(lengths: Lengths, path: Path, title: str) -> None:
    """Draws the same as a PNG, with the median and the mean.

    Raises:
        UserError: `path` is no .png, exists already, or cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    if path.suffix != ".png":
        raise UserError(f"--out must end in .png, got {path}")
    if path.exists():
        raise UserError(f"{path} exists already and is not overwritten: remove it or choose another name")
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    edges = 2.0 ** np.arange(len(lengths.counts) + 1)
    axes.stairs(lengths.counts, edges, fill=True, color="#9ecae1", edgecolor="white")
    axes.axvline(max(lengths.median, 1), color="#08519c", label=f"median {lengths.median:,.0f}")
    axes.axvline(max(lengths.mean, 1), color="#d94801", linestyle="--", label=f"mean {lengths.mean:,.0f}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    first = next(i for i, count in enumerate(lengths.counts) if count)
    axes.set_xlim(edges[first], edges[-1])
    axes.set(xlabel="tokens in a document", ylabel="documents", title=title)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    content = BytesIO()
    figure.savefig(content, format="png")
    atomic_write(path, content.getvalue())
