"""Batches from token shards: tokens per second beside two usual ways, and a training step's wait for them.

`benchmarks/data.py` runs this. The shards are random ids in a temporary folder, read once before, so that all of it is
in the page cache. All take random windows and give inputs and targets as int64 on the CPU: `PackedDataset`; nanoGPT's
way (a slice of a memory map for each row, made int64, stacked); and torch's DataLoader over `WindowDataset` with two
worker processes. They make BATCHES batches each in turn, in another order each round; a ratio is the median of the
rounds' ratios.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader

from fastgpt import GPT, GPTConfig
from fastgpt.bench.timing import Call, interleave
from fastgpt.data import PackedDataset, Prefetched, TokenDataset, WindowDataset
from fastgpt.train import build_optimizer

OURS, NANOGPT, LOADER = "PackedDataset", "nanoGPT's get_batch", "DataLoader, 2 workers"
BATCHES = 32  # in a row: what the workers have ready when their turn comes is a small part of it
VOCABULARY = 8192
DOCUMENT = 500  # tokens


@dataclass
class Options:
    """Batches from token shards."""

    tokens: int = 120_000_000
    """Of two bytes each."""
    batch_size: int = 32
    block_sizes: tuple[int, ...] = (64, 1024)
    seconds: float = 5.0
    """For each contender and block size."""
    preset: str = "micro"
    """Model whose steps wait for batches, on this device."""
    steps: int = 40
    device: Literal["auto", "cpu", "cuda"] = "auto"


def write_shards(folder: Path, tokens: int) -> TokenDataset:
    """Random ids in one shard, as `fastgpt data prepare` would write them."""
    np.random.default_rng(0).integers(0, VOCABULARY, tokens, np.uint16).tofile(folder / "train_00000.bin")
    starts = np.arange(0, tokens, DOCUMENT, dtype="<u8")
    starts.tofile(folder / "train_documents.bin")
    part = {"documents": len(starts), "tokens": tokens, "shards": [{"file": "train_00000.bin", "tokens": tokens}]}
    meta = {"format": "fastgpt-shards-1", "dtype": "uint16", "vocab_size": VOCABULARY, "splits": {"train": part}}
    (folder / "meta.json").write_text(json.dumps(meta))
    return TokenDataset.open(folder, "train")


def get_batch(path: Path, B: int, T: int) -> tuple[Tensor, Tensor]:
    """As nanoGPT's train.py reads: it maps the file anew for each batch."""
    data = np.memmap(path, np.uint16, "r")
    starts = torch.randint(len(data) - T, (B,)).tolist()
    rows = [torch.from_numpy(data[i : i + T + 1].astype(np.int64)) for i in starts]
    return torch.stack([row[:-1] for row in rows]), torch.stack([row[1:] for row in rows])


def endless(loader: DataLoader[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def measure(console: Console, options: Options, folder: Path) -> dict[str, Any]:
    """Prints both tables and returns their rows."""
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    data = write_shards(folder, options.tokens)
    data.tokens(0, len(data)).max()  # into the page cache
    batches, waits = loader_rows(options, data), wait_rows(options, data)
    print_loaders(console, options, batches, waits)
    return {"loaders": batches, "wait": waits}


def loader_rows(options: Options, data: TokenDataset) -> list[dict[str, Any]]:
    """Tokens per second of each contender at each block size, and PackedDataset's as a multiple of it."""
    rows, B = [], options.batch_size
    for T in options.block_sizes:
        packed, masked = (PackedDataset(data, T, seed=0, document_masks=masks) for masks in (False, True))
        loader = DataLoader(WindowDataset(data, T, T), B, shuffle=True, num_workers=2)
        batches = endless(loader)
        ways: dict[str, Callable[[], object]] = {
            OURS: lambda packed=packed: packed.next_batch(B),
            f"{OURS}, document masks": lambda masked=masked: masked.next_batch(B),
            NANOGPT: lambda T=T: get_batch(data.folder / data.files[0], B, T),
            LOADER: lambda batches=batches: next(batches),
        }

        def take(way: Callable[[], object]) -> Call:
            return Call(lambda _: [way() for _ in range(BATCHES)] and None)

        found = interleave({name: take(way) for name, way in ways.items()}, "cpu", options.seconds)
        for name, timed in found.items():
            pairs = zip(timed.seconds, found[OURS].seconds, strict=True)
            rows.append(
                {
                    "what": name,
                    "batch_size": B,
                    "block_size": T,
                    "tokens_per_s": BATCHES * B * T / statistics.median(timed.seconds),
                    "ratio": statistics.median(theirs / ours for theirs, ours in pairs),
                }
            )
    return rows


def wait_rows(options: Options, data: TokenDataset) -> list[dict[str, Any]]:
    """The wait for a batch as a share of a training step, read when it is needed and ahead; steps taken in turn."""
    device = torch.device(options.device)
    model = GPT(GPTConfig.preset(options.preset, vocab_size=VOCABULARY)).to(device)
    optimizer = build_optimizer(model, lr=1e-4)
    B, T = options.batch_size, model.config.n_positions
    found: dict[str, dict[str, list[float]]] = {}
    reads: dict[str, Callable[[], tuple[Tensor, ...]]] = {}
    ahead = []
    for name in ("when needed", "ahead"):
        packed = PackedDataset(data, T, seed=0)

        def read(packed: PackedDataset = packed) -> tuple[Tensor, ...]:
            batch = packed.next_batch(B)
            return tuple(t.pin_memory() for t in batch) if device.type == "cuda" else batch

        reads[name] = read
        if name == "ahead":
            ahead.append(Prefetched(read, packed))
            reads[name] = ahead[0].next_batch
        found[name] = {"wait": [], "step": []}
    try:
        for i in range(options.steps):
            # Some of each in a row: a batch is made while a step of its own kind runs.
            for name in list(reads)[:: 1 if i % 2 else -1]:
                for _ in range(4):
                    start = time.perf_counter()
                    batch = reads[name]()
                    waited = time.perf_counter() - start
                    model.loss(*(t.to(device, non_blocking=True) for t in batch)).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    if i:  # the first ones warm up
                        found[name]["wait"].append(waited)
                        found[name]["step"].append(time.perf_counter() - start)
    finally:
        ahead[0].close()
    plain = statistics.median(found["when needed"]["step"])
    return [
        {
            "what": f"read {name}",
            "step_ms": statistics.median(f["step"]) * 1e3,
            "wait": sum(f["wait"]) / sum(f["step"]),
            "ratio": statistics.median(f["step"]) / plain,
        }
        for name, f in found.items()
    ]


def print_loaders(
    console: Console, options: Options, batches: list[dict[str, Any]], waits: list[dict[str, Any]]
) -> None:
    table = Table("", "batch", "tokens/s", f"{OURS} is so many times as fast")
    for row in batches:
        batch = f"{row['batch_size']} x {row['block_size']}"
        table.add_row(row["what"], batch, f"{row['tokens_per_s'] / 1e6:,.1f} M", f"{row['ratio']:.2f}")
    console.print(table)
    table = Table(f"batches of {options.preset}, {options.device}", "ms per step", "wait of it", "step, as a ratio")
    for row in waits:
        table.add_row(row["what"], f"{row['step_ms']:.1f}", f"{row['wait']:.3%}", f"{row['ratio']:.3f}")
    console.print(table)
