"""Preparing data here against tiktoken alone, and batches of it against other ways of making them.

    python benchmarks/data.py                     # 100 MB of this Python's own sources, on this machine
    python benchmarks/data.py --parts loaders     # benchmarks/loaders.py alone; on a GPU if there is one
    python benchmarks/data.py --out benchmarks/results

Preparing: the whole command `fastgpt data prepare`, its start, reading and writing included, beside tiktoken's
`encode_ordinary_batch` on texts that are in memory already, with the same tokenizer and as many threads as the command
has workers. They take turns, and the ratio is the median of the rounds' ratios of throughput. Memory is the largest
that was resident, of the command's process and of any of its workers.
"""

import json
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro
from loaders import Options as LoaderOptions
from loaders import measure as measure_loaders
from rich.console import Console
from rich.table import Table

from fastgpt.bench.environment import Neighbours, environment, machine_name
from fastgpt.cpus import cpus
from fastgpt.files import atomic_write
from fastgpt.tokenizer import Tokenizer


@dataclass
class Options:
    """Preparing data here against tiktoken alone, and batches of it against other ways of making them."""

    parts: tuple[Literal["prepare", "loaders"], ...] = ("prepare", "loaders")
    megabytes: int = 100
    """Of text, from the Python installation's and its packages' own sources."""
    rounds: int = 5
    vocab_size: int = 8192
    """Of the tokenizer, which is trained on the first megabytes."""
    tokenizer: Path | None = None
    """Folder of a tokenizer to take in place of that."""
    loaders: LoaderOptions = field(default_factory=LoaderOptions)
    out: Path | None = None
    """Folder of results: writes OUT/MACHINE/data.json."""


def sources(megabytes: int) -> Iterator[tuple[Path, str]]:
    """Python's own sources and their texts, until there are so many bytes of them."""
    size = 0
    for name in ("stdlib", "purelib"):
        for path in sorted(Path(sysconfig.get_path(name)).rglob("*.py")):
            try:
                text = path.read_bytes().decode()
            except (OSError, UnicodeDecodeError):
                continue
            if text and "\0" not in text:
                yield path, text
                size += len(text.encode())
                if size >= megabytes * 10**6:
                    return


def write_corpora(options: Options, folder: Path) -> dict[str, tuple[Path, list[str]]]:
    """Two corpora of the same sources, and their documents: the files as they are, and their paragraphs as .jsonl."""
    files: list[str] = []
    (folder / "files").mkdir()
    for i, (path, text) in enumerate(sources(options.megabytes)):
        (folder / "files" / f"{i:06d}.txt").symlink_to(path.resolve())
        files.append(text)
    short = [part for text in files for part in text.split("\n\n") if part]
    lines = (json.dumps({"text": part}) + "\n" for part in short)
    (folder / "short.jsonl").write_text("".join(lines))
    return {"text files": (folder / "files", files), ".jsonl": (folder / "short.jsonl", short)}


def command(corpus: Path, tokenizer: Path, out: Path, peaks: dict[str, int] | None = None) -> float:
    """Seconds of `fastgpt data prepare`; with `peaks`, its processes' peaks of resident memory in bytes."""
    args = ["--input", corpus, "--tokenizer", tokenizer, "--out", out]
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "fastgpt", "data", "prepare", *args], stdout=subprocess.DEVNULL)
    while peaks is not None and process.poll() is None:
        threads = Path(f"/proc/{process.pid}/task").glob("*/children")
        try:
            children = " ".join(path.read_text() for path in threads).split()
            for kind, pids in (("command", [str(process.pid)]), ("worker", children)):
                for pid in pids:
                    peaks[kind] = max(peaks.get(kind, 0), resident_peak(pid))
        except (OSError, StopIteration):  # it has just ended
            pass
        time.sleep(0.05)
    if process.wait():
        raise SystemExit("fastgpt data prepare failed")
    return time.perf_counter() - start


def resident_peak(pid: str) -> int:
    line = next(s for s in Path(f"/proc/{pid}/status").read_text().splitlines() if s.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def prepare_rows(options: Options, tokenizer: Path, folder: Path) -> list[dict[str, Any]]:
    """Of each corpus, the seconds of both in each round."""
    encoding = Tokenizer.from_pretrained(tokenizer)._encoding
    rows = []
    for name, (corpus, documents) in write_corpora(options, folder).items():
        seconds: dict[str, list[float]] = {"fastgpt": [], "tiktoken": []}

        def ours(i: int, corpus: Path = corpus) -> float:
            return command(corpus, tokenizer, folder / f"{corpus.stem}_{i}")

        def theirs(i: int, documents: list[str] = documents) -> float:
            start = time.perf_counter()
            encoding.encode_ordinary_batch(documents, num_threads=cpus())
            return time.perf_counter() - start

        for i in range(options.rounds):
            for contender, run in [("fastgpt", ours), ("tiktoken", theirs)][:: 1 if i % 2 else -1]:
                seconds[contender].append(run(i))
        ratios = [b / a for a, b in zip(seconds["fastgpt"], seconds["tiktoken"], strict=True)]
        megabytes = sum(len(text.encode()) for text in documents) / 1e6
        row = {"corpus": name, "documents": len(documents), "megabytes": megabytes, "seconds": seconds}
        rows.append({**row, "ratio": statistics.median(ratios), "ratios": ratios})
    return rows


def memory_rows(tokenizer: Path, folder: Path) -> list[dict[str, Any]]:
    """The peaks on the .jsonl, and on one four times as large."""
    rows = []
    text = (folder / "short.jsonl").read_bytes()
    for times in (1, 4):
        corpus = folder / f"times_{times}.jsonl"
        with corpus.open("wb") as file:
            for _ in range(times):
                file.write(text)
        peaks: dict[str, int] = {}
        command(corpus, tokenizer, folder / f"memory_{times}", peaks)
        rows.append({"megabytes": corpus.stat().st_size / 1e6, "peaks": peaks})
        corpus.unlink()
    return rows


def print_prepare(console: Console, rows: list[dict[str, Any]], memory: list[dict[str, Any]]) -> None:
    table = Table("corpus", "MB", "documents", "fastgpt MB/s", "tiktoken MB/s", "ratio", "of the rounds")
    for row in rows:
        speeds = [row["megabytes"] / statistics.median(row["seconds"][name]) for name in ("fastgpt", "tiktoken")]
        span = f"{min(row['ratios']):.2f} to {max(row['ratios']):.2f}"
        cells = [f"{row['megabytes']:.0f}", f"{row['documents']:,}", *(f"{speed:.1f}" for speed in speeds)]
        table.add_row(row["corpus"], *cells, f"{row['ratio']:.2f}", span)
    console.print(table)
    table = Table(".jsonl of MB", "the command's peak", "a worker's peak")
    for row in memory:
        peaks = (f"{row['peaks'][kind] / 2**20:.0f} MiB" for kind in ("command", "worker"))
        table.add_row(f"{row['megabytes']:.0f}", *peaks)
    console.print(table)


def measure_prepare(console: Console, options: Options, folder: Path) -> dict[str, Any]:
    """Prints both tables and returns their rows."""
    tokenizer = options.tokenizer or folder / "tokenizer"
    if options.tokenizer is None:
        Tokenizer.train((text for _, text in sources(10)), options.vocab_size).save_pretrained(tokenizer)
    rows = prepare_rows(options, tokenizer, folder)
    memory = memory_rows(tokenizer, folder)
    print_prepare(console, rows, memory)
    return {"prepare": rows, "prepare_memory": memory}


def main() -> None:
    options = tyro.cli(Options)
    console = Console(soft_wrap=True, highlight=False)
    found: dict[str, Any] = {}
    neighbours = Neighbours()
    with tempfile.TemporaryDirectory() as name:
        if "prepare" in options.parts:
            with console.status(f"preparing and encoding {options.megabytes} MB, {options.rounds} times each"):
                found |= measure_prepare(console, options, Path(name))
        if "loaders" in options.parts:
            with console.status("making batches"):
                found |= measure_loaders(console, options.loaders, Path(name))
    others = neighbours.cores()
    if others is not None and others > 0.2:
        console.print(f"others took {others:.1f} cores meanwhile: measure again when the machine is quiet")
    if options.out is not None:
        device = "cuda" if "loaders" in options.parts and options.loaders.device == "cuda" else "cpu"
        path = options.out / machine_name(device) / "data.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "options": {**asdict(options), "tokenizer": str(options.tokenizer or ""), "out": None},
            "environment": environment(device),
            "cores_of_others": others,
            **found,
        }
        atomic_write(path, json.dumps(result, indent=1) + "\n")
        console.print(f"saved {path}")


if __name__ == "__main__":
    main()
