"""fastgpt tokenizer train, fastgpt tokenizer show"""

import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

from fastgpt.cli.progress import counter, skipped_line
from fastgpt.data.documents import Skipped
from fastgpt.data.read import Corpus, read_documents
from fastgpt.errors import UserError
from fastgpt.tokenizer import END_OF_TEXT, Tokenizer


def train(
    *,
    corpus: Corpus,
    vocab_size: int,
    out: Path,
    special_tokens: tuple[str, ...] = (END_OF_TEXT,),
) -> None:
    """Train a byte-level BPE on text files.

    Args:
        vocab_size: How many ids: 256 bytes, the merges, the special tokens.
        out: Folder to write tokenizer.json into.
        special_tokens: Tokens that no text makes by itself.
    """
    if (out / "tokenizer.json").exists():
        raise UserError(f"{out} already holds a tokenizer: name another --out, or remove it")
    console = Console(highlight=False, soft_wrap=True)
    started = time.monotonic()
    skipped = Skipped()
    size = files = 0

    with counter(console, "reading", "files") as reading, counter(console, "merging", "merges") as merging:

        def count(_: Path) -> None:
            nonlocal files
            files += 1
            reading(files)

        def texts():  # type: ignore[no-untyped-def]
            nonlocal size
            for document in read_documents(corpus, count, skipped):
                size += len(document.text)
                yield document.text

        tokenizer = Tokenizer.train(texts(), vocab_size, special_tokens, merging)
    if not size:
        raise UserError("the corpus is empty: no file has any text")
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
