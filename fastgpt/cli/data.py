"""fastgpt data download, fastgpt data prepare, fastgpt data show"""

import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastgpt import data as token_data
from fastgpt.cli.colours import frequency_table, token_text
from fastgpt.cli.progress import encoding, receiving, skipped_line
from fastgpt.data import TokenDataset
from fastgpt.data import download as sets
from fastgpt.data.documents import Skipped
from fastgpt.data.read import Corpus
from fastgpt.data.statistics import (
    Part,
    Shards,
    count_tokens,
    document_lengths,
    document_window,
    draw_lengths,
    length_bars,
    window,
)
from fastgpt.errors import UserError
from fastgpt.tokenizer import Tokenizer


def download(name: str | None = None, /, *, out: Path | None = None) -> None:
    """Get a public text, data set or model that the lessons use, checked by its SHA-256; without a name, list them.

    Stopped before its end, it goes on where it was when it is run again. What is there already is not fetched again.

    Args:
        name: One of the list.
        out: Folder for its files; downloads/NAME if not given.
    """
    console = Console(highlight=False, soft_wrap=True)
    if name is None:
        table = Table("name", "size", "for", "licence")
        for each, files in sets.SETS.items():
            table.add_row(each, f"{files.size / 1e6:.1f} MB", files.purpose, files.licence)
        console.print(table)
        return
    wanted = sets.remote_set(name)
    folder = out or Path("downloads") / name
    console.print(f"{name}: {wanted.purpose}\nlicence: {wanted.licence}", markup=False)
    for file in wanted.files:
        with receiving(console) as count:
            received = sets.download(file, folder, count)
        how = "received" if received else "was there"
        console.print(f"{folder / file.name}: {how}, {file.size / 1e6:.1f} MB, SHA-256 checked", markup=False)


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


def show(
    *,
    data: Path,
    split: str = "train",
    at: int | None = None,
    document: int | None = None,
    length: int = 256,
    out: Path | None = None,
) -> None:
    """Show what a folder of token shards holds; with --at or --document, the text of a window of it.

    Args:
        data: Folder that `fastgpt data prepare` made.
        split: Which split to look into, train or val.
        at: Decode from this token of the split on.
        document: Decode this document, counted from 0.
        length: How many tokens to decode at the most.
        out: PNG file to draw the documents' lengths into.
    """
    console = Console(highlight=False, soft_wrap=True)
    shards = Shards.open(data)
    tokens = shards.split(split)
    if at is None and document is None:
        _statistics(shards, tokens, out, console)
    elif out is not None or (at is not None and document is not None):
        raise UserError("give --at, --document or --out, only one of them")
    elif at is not None:
        _window(shards.tokenizer, tokens, window(tokens, at, length), console)
    elif document is not None:
        _window(shards.tokenizer, tokens, document_window(tokens, document, length), console)


def _statistics(shards: Shards, tokens: TokenDataset, out: Path | None, console: Console) -> None:
    meta = shards.meta
    lengths, counts = document_lengths(tokens), count_tokens(tokens)
    if out is not None:
        draw_lengths(lengths, out, f"{shards.folder}, {tokens.split}: {lengths.documents:,} documents")
    console.print(
        f"{shards.folder}: {meta['format']}, {meta['dtype']}, {shards.disk_bytes / 1e6:,.1f} MB on the disk",
        markup=False,
    )
    console.print(
        f"tokenizer: {meta['vocab_size']:,} ids, hash {meta['tokenizer_hash'][:12]}, the folder's own; "
        f"end of text is {meta['eot_id']}"
    )
    table = Table("split", "documents", "tokens", "bytes", "bytes/token", "shards")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, part in meta["splits"].items():
        figures = [f"{part[key]:,}" for key in ("documents", "tokens", "bytes")]
        table.add_row(name, *figures, f"{part['bytes'] / part['tokens']:.2f}", f"{len(part['shards']):,}")
    console.print(table)
    of = "" if lengths.sampled == lengths.documents else f" (of {lengths.sampled:,} evenly spread)"
    console.print(
        f"\ndocuments of {tokens.split}, in tokens: shortest {lengths.shortest:,}, median {lengths.median:,.0f}{of}, "
        f"mean {lengths.mean:,.1f}, longest {lengths.longest:,}"
    )
    for line in length_bars(lengths):
        console.print(line)
    among, pieces = "", ""
    if counts.tokens < len(tokens):
        among, pieces = f"{counts.tokens:,} of ", f", read in {counts.blocks} evenly spread pieces"
    console.print(
        f"\n{counts.used:,} of {meta['vocab_size']:,} ids ({counts.used / meta['vocab_size']:.1%}) occur among "
        f"{among}the {len(tokens):,} tokens of {tokens.split}{pieces}"
    )
    console.print(frequency_table(shards.tokenizer, counts.most_frequent(10), counts.tokens))
    if out is not None:
        console.print(f"the lengths are drawn in {out}", markup=False)


def _window(tokenizer: Tokenizer, tokens: TokenDataset, parts: list[Part], console: Console) -> None:
    first = int(tokens.document_starts[parts[0].document]) + parts[0].offset
    count = sum(len(part.ids) for part in parts)
    console.print(f"tokens {first:,} to {first + count - 1:,} of {len(tokens):,} of {tokens.split}")
    for part in parts:
        last = part.offset + len(part.ids)
        whole = "" if len(part.ids) == part.length else f", tokens {part.offset:,} to {last - 1:,} of it"
        console.print(f"\ndocument {part.document:,}, {part.length:,} tokens with its end{whole}:", style="bold")
        console.print(token_text(tokenizer, part.ids, console))
