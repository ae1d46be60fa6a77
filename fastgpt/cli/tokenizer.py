"""fastgpt tokenizer train, fastgpt tokenizer show"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.text import Text

from fastgpt.cli.progress import counter, skipped_line
from fastgpt.data import read_documents
from fastgpt.errors import UserError
from fastgpt.tokenizer import END_OF_TEXT, Tokenizer


def train(
    *,
    input: tuple[Path, ...],
    vocab_size: int,
    out: Path,
    include: str = "*",
    exclude: str = "",
    text_key: str = "text",
    special_tokens: tuple[str, ...] = (END_OF_TEXT,),
    pattern: Literal["gpt2", "cl100k"] = "gpt2",
    on_error: Literal["raise", "skip"] = "raise",
) -> None:
    """Train a byte-level BPE on text files.

    Args:
        input: Text files, .jsonl files, folders or globs; .gz of each.
        vocab_size: How many ids: 256 bytes, the merges, the special tokens.
        out: Folder to write tokenizer.json into.
        include: Patterns of the file names to take from folders, comma-separated.
        exclude: Patterns of names of files and folders to leave out, comma-separated.
        text_key: Field of a .jsonl line that holds the text.
        special_tokens: Tokens that no text makes by itself.
        pattern: How text is split into words, which no token crosses: as GPT-2 does, or as GPT-4's cl100k does.
        on_error: What to do with a file that is no UTF-8 text.
    """
    if (out / "tokenizer.json").exists():
        raise UserError(f"{out} already holds a tokenizer: name another --out, or remove it")
    console = Console(highlight=False, soft_wrap=True)
    started = time.monotonic()
    skipped: list[str] = []
    size = files = 0

    def count(_: Path) -> None:
        nonlocal files
        files += 1

    def texts() -> Iterator[str]:
        nonlocal size
        with counter(console, "reading", "characters") as reading:
            for document in read_documents(
                input,
                include=include,
                exclude=exclude,
                text_key=text_key,
                on_error=on_error,
                on_file=count,
                on_skip=skipped.append,
            ):
                size += len(document.text)
                reading(size)
                yield document.text

    with counter(console, "merging", "merges", vocab_size - 256 - len(special_tokens)) as merging:
        tokenizer = Tokenizer.train(texts(), vocab_size, special_tokens, merging, pattern)
    if not size:
        raise UserError(f"no text in {', '.join(map(str, input))}: the corpus is empty")
    tokenizer.save_pretrained(out)
    skipped_line(console, skipped)
    words = (token.decode("utf-8", "replace") for token in tokenizer.vocab if any(chr(b).isalpha() for b in token))
    longest = sorted(words, key=len)[-6:]
    console.print(
        f"{tokenizer.vocab_size:,} ids from {size / 1e6:.1f} M characters in {files:,} files, "
        f"{time.monotonic() - started:.1f} s; saved in {out}"
    )
    console.print(f"the longest words: {', '.join(map(repr, longest))}", markup=False)


def show(text: str, /, *, tokenizer: Path) -> None:
    """Show how a text splits into tokens.

    Args:
        text: The text.
        tokenizer: Folder with a tokenizer.json.
    """
    tok = Tokenizer.from_pretrained(tokenizer)
    ids = tok.encode(text)
    console = Console(highlight=False, soft_wrap=True)
    coloured, numbers = Text(), Text()
    for i, token_id in enumerate(ids):
        style = ("black on bright_cyan", "black on bright_yellow", "black on bright_green", "black on bright_magenta")[
            i % 4
        ]
        coloured.append(tok.token_bytes(token_id).decode("utf-8", "replace"), style)
        numbers.append(f" {token_id} ", style)
    console.print(coloured)
    console.print(numbers)
    per_token = len(text.encode("utf-8", "replace")) / max(1, len(ids))
    console.print(f"{len(ids)} tokens, {len(text)} characters, {per_token:.2f} bytes per token")
