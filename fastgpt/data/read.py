"""Files, standard input and datasets to batches of raw bytes, all of them streamed."""

import glob
import gzip
import io
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import numpy as np
import regex

from fastgpt.data.documents import Batch, Document, Skipped, decode_file, decoded
from fastgpt.errors import UserError

# Folders of other people's code and of caches, which nobody means by "this folder".
SKIPPED_FOLDERS = ("site-packages", "dist-packages", "__pycache__", "node_modules")
STANDARD_INPUT = "-"
# A batch is what a worker encodes at a time. In megabytes it takes tenths of a second: long beside the cost of sending
# it, short beside the whole, so that at the end no worker waits for another.
BATCH_BYTES = 1 << 20
# A text without a place to cut it (see `_CUT`) is cut anywhere behind so much: merging one word of that size takes most
# of a gigabyte. A line of a .jsonl cannot be cut; one that is longer than this is refused.
TEXT_BYTES = 16 << 20
LINE_BYTES = 64 << 20
# Where a text can be cut without changing its ids under GPT-2's or cl100k's split pattern: in front of the plain space
# behind any letter, or of the comma or full stop behind a Chinese or Japanese one (they write without spaces). In both
# patterns nothing but \p{L}+, which ends at what is no letter, matches a letter, so that no match crosses the cut;
# nothing looks behind; and (?!\S) and $ are asked behind white space only, never behind a letter.
_CUT = regex.compile(r"(?r)\p{L}(?= )|[一-鿋ぁ-ゖァ-ヺ](?=[，。、])")


@dataclass(frozen=True)
class Corpus:
    """Where the documents come from."""

    input: tuple[str, ...] = ()
    """Text files, .jsonl, .parquet, folders or globs; .gz and .zst of text and .jsonl; - is standard input."""
    include: str = "*"
    """Patterns of the file names to take from folders, comma-separated."""
    exclude: str = ""
    """Patterns of names of files and folders to leave out, comma-separated."""
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    """What all of the input is; auto goes by each file's name."""
    text_key: str = "text"
    """Field of a .jsonl line, or column of a .parquet or dataset, that holds the text."""
    skip_bad: bool = False
    """Pass over files that are damaged or no UTF-8 text, and lines without a text, and count them."""
    dataset: str | None = None
    """A Hugging Face dataset to read, by its name there or a folder, in place of --input."""
    dataset_config: str | None = None
    """Which of the dataset's configurations."""
    dataset_split: str = "train"
    """Which of its splits."""

    def files(self) -> list[Path]:
        """The files that `input` means, standard input left out.

        Raises:
            UserError: there is no input or it contradicts itself, or a file is not there.
        """
        if bool(self.input) == bool(self.dataset):
            raise UserError("name what to read with either --input or --dataset")
        if STANDARD_INPUT in self.input:
            if len(self.input) > 1:
                raise UserError("standard input is read alone: name the other --input in another run")
            if self.format not in ("text", "jsonl"):
                raise UserError("standard input does not tell what it is: add --format text or --format jsonl")
            return []
        return find_files(self.input, self.include, self.exclude) if self.input else []


def find_files(inputs: Sequence[str | Path], include: str = "*", exclude: str = "") -> list[Path]:
    """The files that `inputs` mean, in a fixed order: files as named, globs, and folders with all that is below them.

    Args:
        include: patterns of file names, comma-separated; they choose within folders only.
        exclude: patterns of names of files and folders to leave out, comma-separated; within folders only. Hidden ones,
            caches and installed packages are left out always.

    Raises:
        UserError: an input is not there, or nothing is left.
    """
    wanted = [p.strip() for p in include.split(",") if p.strip()]
    left_out = [p.strip() for p in exclude.split(",") if p.strip()] + [".*", *SKIPPED_FOLDERS]

    def below(folder: Path) -> Iterator[Path]:
        for path in sorted(folder.iterdir()):
            if any(fnmatch(path.name, p) for p in left_out):
                continue
            if path.is_dir():
                if not path.is_symlink():  # a link can lead back up
                    yield from below(path)
            elif path.is_file() and any(fnmatch(path.name, p) for p in wanted):
                yield path

    files: list[Path] = []
    for item in inputs:
        matches = [Path(m) for m in sorted(glob.glob(str(item)))] if not Path(item).exists() else [Path(item)]
        if not matches:
            raise UserError(f"no such file or folder: {item}")
        for path in matches:
            try:
                files += below(path) if path.is_dir() else [path]
            except OSError as error:
                raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None
    if not files:
        raise UserError(f"no file matches {include!r} in {', '.join(map(str, inputs))}: check --input and --include")
    return list(dict.fromkeys(files))


def read_pieces(
    corpus: Corpus | Sequence[str | Path],
    on_file: Callable[[Path], None] | None = None,
    skipped: Skipped | None = None,
) -> Iterator[Document]:
    """Documents one at a time; a text above a megabyte comes in pieces, each of them a Document.

    For what needs the text alone, such as training a tokenizer; `fastgpt.data.prepare` takes the corpus itself. A text
    file is one document, a .jsonl has one a line, a .parquet one a row. Text is read as it is, line ends included.
    Empty documents are passed over.

    Args:
        corpus: what to read, or the paths alone.
        on_file: called with each file before it is read.
        skipped: counts what `skip_bad` passes over.

    Raises:
        UserError: a file or line is bad; names the file, and the byte or line.
    """
    if not isinstance(corpus, Corpus):
        corpus = Corpus(input=tuple(map(str, corpus)))
    skipped = Skipped() if skipped is None else skipped
    for batch in read_batches(corpus, on_file=on_file):
        for item in decoded(batch, corpus.text_key):
            if isinstance(item, Document):
                yield item
            elif corpus.skip_bad:
                skipped.add(str(item))
            else:
                raise bad_input(str(item))


def bad_input(what: str) -> UserError:
    """What to raise for a bad file or line that is not to be skipped."""
    return UserError(f"{what}; mend it, or pass over such with --skip-bad")


def read_text_file(path: Path) -> str:
    """A file's text as it is, line ends included; a .gz's or .zst's is unpacked.

    Raises:
        UserError: it cannot be read, or is no UTF-8 text; names the byte.
    """
    with _reading(path), _open(path) as file:
        return decode_file(file.read(), path)


def read_batches(
    corpus: Corpus, cut_texts: bool = True, on_file: Callable[[Path], None] | None = None
) -> Iterator[Batch]:
    """The corpus as batches of raw bytes, always the same ones.

    Args:
        cut_texts: False keeps a text whole up to `TEXT_BYTES`, for a tokenizer whose split pattern is not known.

    Raises:
        UserError: the corpus names nothing that can be read. What is wrong with a single file is in its batch.
    """
    files: list[Path | None] = [*corpus.files()]
    if corpus.dataset:
        yield from _rows(_dataset_texts(corpus), corpus.dataset)
        return
    if not files:
        files = [None]  # standard input
    kinds = [corpus.format if corpus.format != "auto" else _format(path) for path in files]
    if any(path and path.suffix == ".zst" for path in files):
        _import("zstandard", "a .zst file")
    if "parquet" in kinds:
        _import("pyarrow", "a .parquet file")
    small = _SmallTexts()
    for path, kind in zip(files, kinds, strict=True):
        if path and on_file:
            on_file(path)
        if kind == "text":
            yield from _text(path, small, cut_texts)
        else:
            yield from small.flush()
            yield from _lines(path) if kind == "jsonl" else _parquet(cast(Path, path), corpus.text_key)
    yield from small.flush()


def batches_of(documents: Iterable[Document]) -> Iterator[Batch]:
    """Documents that are in memory already, as batches."""
    return _rows((document.text for document in documents), "document")


def _format(path: Path | None) -> str:
    suffix = Path(str(path).removesuffix(".gz").removesuffix(".zst")).suffix
    return {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}.get(suffix, "text")


@contextmanager
def _reading(path: Path | None) -> Iterator[None]:
    """Turns what can go wrong with a file into a UserError that names it."""
    name = _name(path)
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{name} is damaged: {error}") from None
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror or _line(error)}") from None


def _name(path: Path | None) -> str:
    return "standard input" if path is None else str(path)


def _open(path: Path | None) -> BinaryIO:
    if path is None:
        return open(sys.stdin.fileno(), "rb", closefd=False)
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path))
    if path.suffix == ".zst":
        return io.BufferedReader(_Zstd(path), BATCH_BYTES)
    return path.open("rb")


class _SmallTexts:
    """Text files that are smaller than a batch, together until they make one."""

    def __init__(self) -> None:
        self._texts: list[bytes] = []
        self._names: list[str] = []
        self._size = 0

    def add(self, name: str, text: bytes) -> Iterator[Batch]:
        self._names.append(name)
        self._texts.append(text)
        self._size += len(text)
        if self._size >= BATCH_BYTES:
            yield from self.flush()

    def flush(self) -> Iterator[Batch]:
        if self._texts:
            ends = list(accumulate(map(len, self._texts)))
            yield Batch(self._names[0], b"".join(self._texts), ends, self._names)
        self._texts, self._names, self._size = [], [], 0


def _text(path: Path | None, small: _SmallTexts, cut_texts: bool) -> Iterator[Batch]:
    """One text, in pieces if it is large; those are cut where the split pattern sees no difference, if there is such a
    place within `TEXT_BYTES`."""
    name = _name(path)
    offset = 0  # where `text` begins in the file
    try:
        with _reading(path), _open(path) as file:
            text = bytearray(file.read(BATCH_BYTES))
            if len(text) < BATCH_BYTES:
                yield from small.add(name, bytes(text))
                return
            yield from small.flush()
            searched = 0  # no place to cut before this
            while chunk := file.read(BATCH_BYTES):
                cut = 0
                if len(text) >= (BATCH_BYTES if cut_texts else TEXT_BYTES):
                    cut = _cut(text, max(searched, BATCH_BYTES // 2))
                    searched = len(text) - 4  # a letter's bytes can be at the very end
                if not cut and len(text) >= TEXT_BYTES:
                    cut = _last_character(text)
                if cut:
                    yield Batch(name, bytes(text[:cut]), [cut], [name], opens=not offset, closes=False, offset=offset)
                    del text[:cut]
                    offset += cut
                    searched = 0
                text += chunk
            yield Batch(name, bytes(text), [len(text)], [name], opens=not offset, offset=offset)
    except UserError as error:
        yield from small.flush()
        yield Batch(name, b"", [0], [name], opens=not offset, offset=offset, bad=str(error))


def _cut(text: bytearray, start: int) -> int:
    """The last place behind `start` where a text can be cut, or 0."""
    for window in (1 << 12, len(text)):  # nearly always there is one in the last few lines
        end = text[max(start, len(text) - window) :].decode("utf-8", "surrogateescape")
        if found := _CUT.search(end):
            return len(text) - len(end[found.end() :].encode("utf-8", "surrogateescape"))
    return 0


def _last_character(text: bytearray) -> int:
    """Where the last character of a text starts."""
    at = len(text) - 1
    while at > len(text) - 4 and text[at] & 0xC0 == 0x80:
        at -= 1
    return at


def _lines(path: Path | None) -> Iterator[Batch]:
    name = _name(path)
    number = 1
    rest: list[bytes] = []  # the beginning of a line whose end has not been read
    too_long = False
    try:
        with _reading(path), _open(path) as file:
            while chunk := file.read(BATCH_BYTES):
                if too_long:
                    _, newline, chunk = chunk.partition(b"\n")
                    too_long = not newline
                    number += bool(newline)
                    if not chunk:
                        continue
                end = chunk.rfind(b"\n") + 1
                if end:
                    data = b"".join([*rest, chunk[:end]])
                    yield Batch(name, data, number=number)
                    number += data.count(b"\n")
                    rest = []
                rest.append(chunk[end:])
                if sum(map(len, rest)) > LINE_BYTES:
                    yield Batch(name, bad=f"{name}:{number} is longer than {LINE_BYTES:,} bytes")
                    rest, too_long = [], True
            yield Batch(name, b"".join(rest), number=number)
    except UserError as error:
        yield Batch(name, bad=f"{error} (of {name}, {number - 1:,} lines could be read)")


def _parquet(path: Path, key: str) -> Iterator[Batch]:
    pyarrow, parquet = _import("pyarrow", path), _import("pyarrow.parquet", path)
    row = 1
    try:
        with _reading(path), parquet.ParquetFile(path, buffer_size=BATCH_BYTES, pre_buffer=False) as file:
            if key not in file.schema_arrow.names:
                have = ", ".join(map(repr, file.schema_arrow.names))
                raise UserError(f"{path} has no column {key!r} (it has {have}): name it with --text-key")
            kind = file.schema_arrow.field(key).type
            if pyarrow.types.is_dictionary(kind):
                kind = kind.value_type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise UserError(f"{path} has no text in the column {key!r} (it has {kind}): name it with --text-key")
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
            chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
            size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == key)
            rows = max(1, min(8192, BATCH_BYTES * file.metadata.num_rows // max(1, size)))  # that make a batch
            for part in file.iter_batches(rows, columns=[key]):
                texts = part.column(0).cast(pyarrow.large_string()).fill_null("")
                _, offsets, data = texts.buffers()
                ends = np.frombuffer(offsets, "<i8")[texts.offset : texts.offset + len(texts) + 1]
                content = bytes(memoryview(data)[ends[0] : ends[-1]]) if data else b""
                yield Batch(str(path), content, (ends[1:] - ends[0]).tolist(), number=row)
                row += len(texts)
    except (UserError, pyarrow.ArrowException) as error:
        what = str(error) if isinstance(error, UserError) else f"{path} is damaged: {_line(error)}"
        yield Batch(str(path), bad=what)


def _line(error: Exception) -> str:
    """The first line of what a library says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _rows(texts: Iterable[str], name: str) -> Iterator[Batch]:
    rows: list[bytes] = []
    size, number = 0, 1
    for text in texts:
        rows.append(text.encode("utf-8", "surrogatepass"))
        size += len(rows[-1])
        if size >= BATCH_BYTES:
            yield Batch(name, b"".join(rows), list(accumulate(map(len, rows))), number=number)
            number += len(rows)
            rows, size = [], 0
    yield Batch(name, b"".join(rows), list(accumulate(map(len, rows))), number=number)


def _dataset_texts(corpus: Corpus) -> Iterator[str]:
    name, key = corpus.dataset, corpus.text_key
    datasets = _import("datasets", "--dataset")
    try:
        data = datasets.load_dataset(name, corpus.dataset_config, split=corpus.dataset_split, streaming=True)
        for rows in data.iter(256):
            if key not in rows:
                raise UserError(
                    f"the dataset {name} has no column {key!r} (it has {', '.join(map(repr, rows))}): "
                    "name it with --text-key"
                )
            for text in rows[key]:
                if not isinstance(text, str | None):
                    raise UserError(
                        f"the dataset {name} has no text in the column {key!r} (it has {type(text).__name__}): "
                        "name it with --text-key"
                    )
                yield text or ""
    except UserError:
        raise
    except Exception as error:  # of many kinds, from as many libraries
        raise UserError(
            f"the dataset {name} cannot be read: {_line(error)}; "
            "check its name, --dataset-config, --dataset-split and the network"
        ) from error


class _Zstd(io.RawIOBase):
    """A .zst unpacked. The library's own stream ends a file that was cut short as if it were whole."""

    def __init__(self, path: Path) -> None:
        self._library = _import("zstandard", path)
        self._file = path.open("rb")
        self._frame: Any = None
        self._packed = b""
        self._unpacked = memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            self._packed = self._packed or self._file.read(1 << 14)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("it ends before its end-of-frame")
                return 0
            if self._frame is None:  # `zstd --long=31`, which published dumps use, needs a window of 2 GB
                self._frame = self._library.ZstdDecompressor(max_window_size=2**31).decompressobj()
            try:
                self._unpacked = memoryview(self._frame.decompress(self._packed))
            except self._library.ZstdError as error:
                raise EOFError(str(error)) from None
            self._packed = b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        n = min(len(buffer), len(self._unpacked))
        buffer[:n] = self._unpacked[:n]
        self._unpacked = self._unpacked[n:]
        return n


def _import(package: str, what: object) -> Any:
    try:
        return import_module(package)
    except ImportError:
        extra = "datasets" if package == "datasets" else "data"
        raise UserError(f"{what} needs {package}: pip install 'fastgpt[{extra}]'") from None
