"""fastgpt tokenizer train, fastgpt tokenizer show"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastgpt.cli.colours import frequency_table, id_text, token_text
from fastgpt.cli.progress import counter, skipped_line
from fastgpt.data.documents import Skipped
from fastgpt.data.read import Corpus, read_pieces, read_text_file
from fastgpt.errors import UserError
from fastgpt.token_view import Split, split_text
from fastgpt.tokenizer import END_OF_TEXT, Tokenizer

HEAD = 256  # tokens shown of a long text


def train(
    *,
    corpus: Corpus,
    vocab_size: int,
    out: Path,
    special_tokens: tuple[str, ...] = (END_OF_TEXT,),
    pattern: Literal["gpt2", "cl100k"] = "gpt2",
) -> None:
    """Train a byte-level BPE on text files.

    Args:
        vocab_size: How many ids: 256 bytes, the merges, the special tokens.
        out: Folder to write tokenizer.json into.
        special_tokens: Tokens that no text makes by itself.
        pattern: How text is split into words, which no token crosses: as GPT-2 does, or as GPT-4's cl100k does.
    """
    if (out / "tokenizer.json").exists():
        raise UserError(f"{out} already holds a tokenizer: name another --out, or remove it")
    console = Console(highlight=False, soft_wrap=True)
    started = time.monotonic()
    skipped = Skipped()
    size = files = 0

    def count(_: Path) -> None:
        nonlocal files
        files += 1

    def texts() -> Iterator[str]:
        nonlocal size
        with counter(console, "reading", "characters") as reading:
            for document in read_pieces(corpus, count, skipped):
                size += len(document.text)
                reading(size)
                yield document.text
        if not size:
            raise skipped.nothing_left()

    with counter(console, "merging", "merges", vocab_size - 256 - len(special_tokens)) as merging:
        tokenizer = Tokenizer.train(texts(), vocab_size, special_tokens, merging, pattern)
    tokenizer.save_pretrained(out)
    skipped_line(console, skipped)
    words = (token.decode("utf-8", "replace") for token in tokenizer.vocab if any(chr(b).isalpha() for b in token))
    longest = sorted(words, key=len)[-6:]
    console.print(
        f"{tokenizer.vocab_size:,} ids from {size / 1e6:.1f} M characters in {files:,} file{'s' * (files != 1)}, "
        f"{time.monotonic() - started:.1f} s; saved in {out}"
    )
    console.print(f"the longest words: {', '.join(map(repr, longest))}", markup=False)


def show(text: str | None = None, /, *, tokenizer: tuple[str, ...], file: Path | None = None) -> None:
    """Show how a text splits into tokens, by one tokenizer or by several side by side.

    Args:
        text: The text; - reads it from standard input.
        tokenizer: Folders with a tokenizer.json, or with GPT-2's vocab.bpe and encoder.json.
        file: File to take the text from instead.
    """
    if text is None and file is None and len(tokenizer) > 1:  # --tokenizer tok/ "text": the option took both
        *folders, text = tokenizer
    else:
        folders = list(tokenizer)
    if not folders:
        raise UserError("name at least one --tokenizer")
    content = _content(text, file)
    splits = [(folder, split_text(Tokenizer.from_pretrained(folder), content)) for folder in folders]
    console = Console(highlight=False, soft_wrap=True)
    if len(splits) > 1:
        console.print(_comparison(splits))
    for folder, split in splits:
        if len(splits) > 1:
            console.print(f"\n{folder}", style="bold", markup=False)
        head = split.ids[:HEAD]
        console.print(token_text(split.tokenizer, head, console))
        console.print(id_text(head, console))
        if len(split.ids) > HEAD:
            console.print(f"... and {len(split.ids) - HEAD:,} tokens more")
            console.print(frequency_table(split.tokenizer, split.most_frequent(10), len(split.ids)))
        if len(splits) == 1:
            console.print(
                f"{len(split.ids):,} tokens, {split.characters:,} characters, {split.bytes:,} bytes, "
                f"{split.words:,} words; {split.bytes_per_token:.2f} bytes per token"
            )


def _content(text: str | None, file: Path | None) -> str:
    if file is not None and text is None:
        return read_text_file(file)
    if text is None or file is not None:
        raise UserError("give one text: as an argument, with --file, or - for standard input")
    if text != "-":
        return text
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is no UTF-8 text from byte {error.start:,} on") from None


def _comparison(splits: list[tuple[str, Split]]) -> Table:
    first = splits[0][1]
    table = Table(
        "tokenizer",
        "vocabulary",
        "words",
        "tokens",
        "bytes/token",
        "ratio",
        caption=f"{first.characters:,} characters, {first.bytes:,} bytes; ratio: tokens to the first's",
    )
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify = "right"
    for folder, split in splits:
        table.add_row(
            Text(folder),
            f"{split.tokenizer.vocab_size:,}",
            f"{split.words:,}",
            f"{len(split.ids):,}",
            f"{split.bytes_per_token:.2f}",
            f"{len(split.ids) / max(1, len(first.ids)):.3f}",
        )
    return table
