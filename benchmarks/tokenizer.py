"""Training a byte-level BPE here against Hugging Face tokenizers: time, peak memory, and the tokens that are learnt.

    python benchmarks/tokenizer.py                            # 32,768 ids from 100 MB of Python's and packages' sources
    python benchmarks/tokenizer.py --input books/ --include "*.txt" --out benchmarks/results

Both get the same texts, which are in memory before the clock starts, split them as GPT-2 does, and may use the same
cores. They train in turn, each time in a new process. Peak memory is what training adds to the process's resident
memory, texts not counted. Both break ties alike, so all tokens should be the same; the last line says whether they are.
"""

import json
import multiprocessing
import os
import statistics
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import tokenizers
import tyro
from rich.console import Console
from rich.table import Table

from fastgpt import Tokenizer
from fastgpt.bench.environment import Neighbours, environment, machine_name
from fastgpt.cpus import cpus
from fastgpt.files import atomic_write
from fastgpt.tokenizer import CHARACTER, END_OF_TEXT

OURS, THEIRS = "fastgpt", "tokenizers"


@dataclass
class Options:
    """Training a byte-level BPE here against Hugging Face tokenizers."""

    input: tuple[Path, ...] = (Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib")))
    """Folders of text files."""
    include: str = "*.py"
    megabytes: int = 100
    """How much of them to take, at the most."""
    vocab_size: int = 32768
    rounds: int = 5
    out: Path | None = None
    """Folder of results: writes OUT/MACHINE/tokenizer.json."""


@dataclass
class Trained:
    seconds: float
    peak_bytes: int | None  # None where the system does not tell
    tokens: set[str]


def read(options: Options) -> Iterator[str]:
    left = options.megabytes * 10**6
    for path in dict.fromkeys(p.resolve() for folder in options.input for p in sorted(folder.rglob(options.include))):
        try:
            content = path.read_bytes()
            text = content.decode()
        except (OSError, UnicodeDecodeError):
            continue
        left -= len(content)
        if left < 0:
            return
        yield text


def train(name: str, options: Options) -> Trained:
    """To be called in a process of its own."""
    texts = list(read(options))
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = resident("VmRSS")
    except OSError:
        before = None
    start = time.perf_counter()
    tokens = ours(texts, options.vocab_size) if name == OURS else theirs(texts, options.vocab_size)
    seconds = time.perf_counter() - start
    return Trained(seconds, None if before is None else resident("VmHWM") - before, tokens)


def resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def ours(texts: list[str], vocab_size: int) -> set[str]:
    vocab = Tokenizer.train(texts, vocab_size).vocab
    return {"".join(CHARACTER[b] for b in token) for token in vocab}


def theirs(texts: list[str], vocab_size: int) -> set[str]:
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=byte_level.alphabet(),
        min_frequency=0,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return set(tokenizer.get_vocab()) - {END_OF_TEXT}


def in_new_process(name: str, options: Options) -> Trained:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(train, name, options).result()


def main() -> None:
    options = tyro.cli(Options)
    os.environ |= {"RAYON_NUM_THREADS": str(cpus()), "TOKENIZERS_PARALLELISM": "true"}
    console = Console(soft_wrap=True, highlight=False)
    megabytes = sum(len(text.encode()) for text in read(options)) / 1e6
    found: dict[str, list[Trained]] = {OURS: [], THEIRS: []}
    neighbours = Neighbours()
    with console.status("") as status:
        for i in range(options.rounds):
            for name in list(found)[:: 1 if i % 2 else -1]:
                status.update(f"round {i + 1} of {options.rounds}: {name}")
                found[name].append(in_new_process(name, options))
    others = neighbours.cores()
    ratios = [b.seconds / a.seconds for a, b in zip(found[OURS], found[THEIRS], strict=True)]
    shared = len(found[OURS][0].tokens & found[THEIRS][0].tokens) / len(found[OURS][0].tokens)
    table = Table("", "seconds", "MB/s", "peak memory", "times as fast")
    peaks: dict[str, int | None] = {}
    for name, runs in found.items():
        median = statistics.median(run.seconds for run in runs)
        peaks[name] = None if runs[0].peak_bytes is None else max(run.peak_bytes or 0 for run in runs)
        table.add_row(
            name,
            f"{median:.2f}",
            f"{megabytes / median:.1f}",
            "unknown" if peaks[name] is None else f"{(peaks[name] or 0) / 2**20:,.0f} MiB",
            f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})" if name == OURS else "1",
        )
    console.print(f"{options.vocab_size:,} ids from {megabytes:.1f} MB of text, {cpus()} cores, medians of rounds")
    console.print(table)
    console.print(f"the same tokens: {shared:.2%}")
    if others is not None and others > 0.2:
        console.print(f"others took {others:.1f} cores meanwhile: measure again when the machine is quiet")
    if options.out is not None:
        path = options.out / machine_name("cpu") / "tokenizer.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "options": {**asdict(options), "input": None, "out": None},
            "environment": {**environment("cpu"), "tokenizers": tokenizers.__version__},
            "cores_of_others": others,
            "megabytes": megabytes,
            "times_as_fast": statistics.median(ratios),
            "ratios": ratios,
            "same_tokens": shared,
            "contenders": {
                name: {"seconds": [run.seconds for run in runs], "peak_bytes": peaks[name]}
                for name, runs in found.items()
            },
        }
        atomic_write(path, json.dumps(result, indent=1) + "\n")
        console.print(f"saved {path}")


if __name__ == "__main__":
    main()
