"""fastgpt data prepare"""

import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastgpt import data as token_data
from fastgpt.cli.progress import encoding, skipped_line
from fastgpt.data.documents import Skipped
from fastgpt.data.read import Corpus
from fastgpt.tokenizer import Tokenizer


def prepare(
    *,
    corpus: Corpus,
    tokenizer: Path,
    out: Path,
    val_fraction: float = 0.05,
    seed: int = 0,
    shard_tokens: int = 100_000_000,
    workers: int | None = None,
) -> None:
    """Turn text into token shards.

    Stopped before its end, it goes on where it was when it is run again.

    Args:
        tokenizer: Folder with a tokenizer.json.
        out: Folder to make; it appears when all is done.
        val_fraction: How much of the documents goes to the validation split.
        seed: Of that division; a document's side depends on its text and this alone.
        shard_tokens: Tokens in one file at the most.
        workers: Processes that encode; by default one for each CPU that may be used.
    """
    console = Console(highlight=False, soft_wrap=True)
    started = time.monotonic()
    skipped = Skipped()
    with encoding(console) as count:
        meta = token_data.prepare(
            corpus,
            Tokenizer.from_pretrained(tokenizer),
            out,
            val_fraction=val_fraction,
            seed=seed,
            shard_tokens=shard_tokens,
            workers=workers,
            skipped=skipped,
            progress=count,
            note=console.print,
        )
    skipped_line(console, skipped)
    table = Table("split", "documents", "tokens", "bytes per token", "shards")
    for split, part in meta["splits"].items():
        per_token = part["bytes"] / part["tokens"]
        row = (f"{part['documents']:,}", f"{part['tokens']:,}", f"{per_token:.2f}", str(len(part["shards"])))
        table.add_row(split, *row)
    console.print(table)
    console.print(f"{meta['dtype']} shards in {out}, {time.monotonic() - started:.1f} s")
