"""Documents from the files that a user names."""

import glob
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from fastgpt.errors import UserError

# Folders of other people's code and of caches, which nobody means by "this folder".
SKIPPED_FOLDERS = ("site-packages", "dist-packages", "__pycache__", "node_modules")


@dataclass(frozen=True)
class Document:
    """A text and where it came from: a file, or file:line of a .jsonl."""

    name: str
    text: str


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
            files += below(path) if path.is_dir() else [path]
    if not files:
        raise UserError(f"no file matches {include!r} in {', '.join(map(str, inputs))}: check --input and --include")
    return list(dict.fromkeys(files))


def read_documents(
    inputs: Sequence[str | Path],
    *,
    include: str = "*",
    exclude: str = "",
    text_key: str = "text",
    on_error: Literal["raise", "skip"] = "raise",
    on_file: Callable[[Path], None] | None = None,
    on_skip: Callable[[str], None] | None = None,
) -> Iterator[Document]:
    """Documents one at a time: a text file is one, a .jsonl has one a line; either may be gzipped (.gz).

    Text is read as it is, line ends included. Empty documents are passed over.

    Args:
        inputs, include, exclude: as for `find_files`.
        text_key: which field of a .jsonl's objects is the text.
        on_error: what to do with a file that is no UTF-8 text or a line that is no such object: raise, or skip it.
        on_file: called with each file before it is read.
        on_skip: called with the reason for each file or line that is skipped.

    Raises:
        UserError: names the file, and the byte or line.
    """
    for path in find_files(inputs, include, exclude):
        if on_file:
            on_file(path)
        try:
            raw = _read_bytes(path)
            if path.name.removesuffix(".gz").endswith(".jsonl"):
                lines: list[tuple[str, bytes]] = [
                    (f"{path}:{i}", line) for i, line in enumerate(raw.split(b"\n"), 1) if line.strip()
                ]
            else:
                lines = [(str(path), raw)]
        except UserError as error:
            _refuse(error, on_error, on_skip)
            continue
        is_jsonl = lines and lines[0][0] != str(path)
        for name, content in lines:
            try:
                text = _decode(content, name)
                if is_jsonl:
                    text = _field(text, text_key, name)
            except UserError as error:
                _refuse(error, on_error, on_skip)
                continue
            if text:
                yield Document(name, text)


def read_text_file(path: Path) -> str:
    """A file's text as it is, line ends included; a .gz's is unpacked.

    Raises:
        UserError: it cannot be read, or is no UTF-8 text; names the byte.
    """
    return _decode(_read_bytes(path), str(path))


def _refuse(error: UserError, on_error: str, on_skip: Callable[[str], None] | None) -> None:
    if on_error == "raise":
        raise UserError(f"{error}; mend it, or pass over such files with --on-error skip")
    if on_skip:
        on_skip(str(error))


def _read_bytes(path: Path) -> bytes:
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                return file.read()
        return path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _decode(content: bytes, name: str) -> str:
    if b"\0" in content:
        raise UserError(f"{name} is binary, not text: it has a zero at byte {content.index(0):,}")
    try:
        return content.decode("utf-8-sig" if content.startswith(b"\xef\xbb\xbf") else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is no UTF-8 text: byte {error.start:,} is 0x{content[error.start]:02x}") from None


def _field(line: str, key: str, name: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"{name} is no JSON: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get(key), str):
        have = ", ".join(map(repr, value)) if isinstance(value, dict) else type(value).__name__
        raise UserError(f"{name} has no text in a field {key!r} (it has {have}): name the field with --text-key")
    return value[key]
