"""fastgpt data prepare"""

import time
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from fastgpt import data as token_data
from fastgpt.cli.progress import counter, skipped_line
from fastgpt.tokenizer import Tokenizer


def prepare(
    *,
    input: tuple[Path, ...],
    tokenizer: Path,
    out: Path,
    val_fraction: float = 0.05,
    seed: int = 0,
    include: str = "*",
    exclude: str = "",
    text_key: str = "text",
    on_error: Literal["raise", "skip"] = "raise",
    shard_tokens: int = 100_000_000,
) -> None:
    """Turn text files into token shards.

    Args:
        input: Text files, .jsonl files, folders or globs; .gz of each.
        tokenizer: Folder with a tokenizer.json.
        out: Folder to make; it appears when all is done.
        val_fraction: How much of the documents goes to the validation split.
        seed: Of that division; a document's side depends on its text and this alone.
        include: Patterns of the file names to take from folders, comma-separated.
        exclude: Patterns of names of files and folders to leave out, comma-separated.
        text_key: Field of a .jsonl line that holds the text.
        on_error: What to do with a file that is no UTF-8 text.
        shard_tokens: Tokens in one file at the most.
    """
    console = Console(highlight=False, soft_wrap=True)
    started = time.monotonic()
    skipped: list[str] = []
    documents = token_data.read_documents(
        input, include=include, exclude=exclude, text_key=text_key, on_error=on_error, on_skip=skipped.append
    )
    with counter(console, "encoding", "documents") as count:
        meta = token_data.prepare(
            documents,
            Tokenizer.from_pretrained(tokenizer),
            out,
            val_fraction=val_fraction,
            seed=seed,
            shard_tokens=shard_tokens,
            progress=count,
        )
    skipped_line(console, skipped)
    table = Table("split", "documents", "tokens", "bytes per token", "shards")
    for split, part in meta["splits"].items():
        per_token = part["bytes"] / part["tokens"]
        row = (f"{part['documents']:,}", f"{part['tokens']:,}", f"{per_token:.2f}", str(len(part["shards"])))
        table.add_row(split, *row)
    console.print(table)
    console.print(f"{meta['dtype']} shards in {out}, {time.monotonic() - started:.1f} s")
