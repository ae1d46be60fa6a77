"""Raw bytes to documents: what a batch of a corpus holds, decoded.

Reading (`fastgpt.data.read`) gives batches of raw bytes, so that all work on single documents can be done elsewhere,
in worker processes: this module is what they import, and needs no torch.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastgpt.errors import UserError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Document:
    """A text and where it came from: a file, file:line of a .jsonl, file:row of a .parquet."""

    name: str
    text: str


@dataclass
class Batch:
    """Some documents' bytes, about a megabyte, or a piece of one that is larger.

    Args:
        name: the file, or the dataset.
        data: the documents, one behind the other.
        ends: where each text ends in `data`; None where each line of it is a JSON object.
        files: the text file that each text is, where they are; otherwise they are rows of `name`.
        number: of the first line or row in `name`, from 1.
        opens: False where `data` goes on with the text of the batch before.
        closes: False where its text goes on in the next batch.
        offset: how many bytes of the text were in the batches before.
        bad: reading went wrong behind `data`, in these words. In an open text: all of the text is lost.
    """

    name: str
    data: bytes = b""
    ends: list[int] | None = None
    files: list[str] | None = None
    number: int = 1
    opens: bool = True
    closes: bool = True
    offset: int = 0
    bad: str | None = None


@dataclass
class Skipped:
    """How many files, lines and rows were passed over, and why the first was."""

    count: int = 0
    first: str = ""

    def add(self, reason: str, count: int = 1) -> None:
        self.first = self.first or reason
        self.count += count

    def nothing_left(self) -> UserError:
        """What to raise where the corpus has no text beside what was passed over."""
        skipped = f"; skipped {self.count:,}, the first: {self.first}" if self.count else ""
        return UserError(f"the corpus is empty: no file has any text{skipped}")


def decoded(batch: Batch, text_key: str) -> Iterator[Document | UserError]:
    """Each document of a batch, or what is wrong with it. Empty ones, and null, are passed over; a piece is not."""
    whole = batch.opens and batch.closes
    for name, content in _contents(batch):
        try:
            if batch.ends is None:
                text = _field(_decode(content, name), text_key, name)
            elif batch.files:
                text = _decode(content, name, batch.offset)
            else:
                text = _decode_row(content, name)
        except UserError as error:
            yield error
            continue
        if text or not whole:
            yield Document(name, text)
    if batch.bad:
        yield UserError(batch.bad)


def _contents(batch: Batch) -> Iterator[tuple[str, bytes]]:
    if batch.ends is None:
        for i, line in enumerate(batch.data.split(b"\n"), batch.number):
            if line and not line.isspace():
                yield f"{batch.name}:{i}", line
        return
    start = 0
    for i, end in enumerate(batch.ends):
        yield batch.files[i] if batch.files else f"{batch.name}:{batch.number + i}", batch.data[start:end]
        start = end


def decode_file(content: bytes, path: Path) -> str:
    """A text file's text, line ends as they are, without a byte order mark.

    Raises:
        UserError: it is no UTF-8 text; names the byte.
    """
    return _decode(content, str(path))


def _decode(content: bytes, name: str, offset: int = 0) -> str:
    if b"\0" in content:
        raise UserError(f"{name} is binary, not text: it has a zero at byte {offset + content.index(0):,}")
    mark = len(BYTE_ORDER_MARK) if not offset and content.startswith(BYTE_ORDER_MARK) else 0
    try:
        return content[mark:].decode()
    except UnicodeDecodeError as error:
        byte = mark + error.start
        raise UserError(f"{name} is no UTF-8 text: byte {offset + byte:,} is 0x{content[byte]:02x}") from None


def _decode_row(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is no UTF-8 text: byte {error.start:,} is 0x{content[error.start]:02x}") from None


def _field(line: str, key: str, name: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is no JSON: {error}") from None
    if not isinstance(value, dict) or key not in value:
        have = ", ".join(map(repr, value)) if isinstance(value, dict) else type(value).__name__
        raise UserError(f"{name} has no text in a field {key!r} (it has {have}): name the field with --text-key")
    text = value[key]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{name} has no text in its field {key!r}, but {type(text).__name__}")
    return text
