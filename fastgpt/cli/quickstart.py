"""fastgpt quickstart"""

import shlex
import sysconfig
import time
from pathlib import Path

import torch
from rich.console import Console

from fastgpt.cli import run
from fastgpt.errors import UserError

# What about fills its time: on two CPU cores a model that learns the most in two minutes, on a GPU a bigger one.
CPU = ["--preset", "mini", "--batch-size", "4", "--lr", "2e-3"]
GPU = ["--preset", "nano", "--batch-size", "64", "--lr", "6e-4"]


def quickstart(*, minutes: float = 2.0, seed: int = 0, out: Path | None = None) -> None:
    """The whole way once: text, tokenizer, shards, training, samples; on the source of Python's own standard library.

    Args:
        minutes: How long to train; the other steps take about half a minute more.
        seed: Of the split, the weights, the order of the data and the samples.
        out: Folder for all of it; runs/quickstart, or runs/quickstart-2 and so on where that exists, if not given.
    """
    if not minutes > 0:
        raise UserError(f"--minutes must be above 0, got {minutes}")
    if out is None:
        out = _free(Path("runs/quickstart"))
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: name another --out, or remove it")
    console = Console(highlight=False, soft_wrap=True)
    started = time.monotonic()

    def step(title: str, *command: str) -> None:
        console.print(f"\n[bold]{title}[/bold]")
        console.print(f"$ fastgpt {shlex.join(command)}", style="cyan", markup=False)
        run(list(command))

    stdlib = sysconfig.get_path("stdlib")
    # Tests are two thirds of it; encodings and pydoc_data are tables of numbers and documentation, not code.
    exclude = "test,tests,encodings,pydoc_data"
    text = ["--input", stdlib, "--include", "*.py", "--exclude", exclude, "--skip-bad"]
    tokenizer, data, seeded = str(out / "tokenizer"), str(out / "data"), ["--seed", str(seed)]
    size = GPU if torch.cuda.is_available() else CPU
    step("1. Train a tokenizer", "tokenizer", "train", *text, "--vocab-size", "4096", "--out", tokenizer)
    step(
        "2. Turn the text into shards of tokens",
        "data",
        "prepare",
        *text,
        "--tokenizer",
        tokenizer,
        *seeded,
        "--out",
        data,
    )
    step(
        "3. Train a GPT on them",
        "train",
        "--data",
        data,
        *size,
        "--minutes",
        f"{minutes:g}",
        *seeded,
        "--out",
        str(out),
    )
    step("4. Evaluate it", "eval", "--model", str(out), "--data", data, "--max-batches", "20")
    sampling = ["--prompt", "def", "--max-new-tokens", "100", "--num-samples", "3", *seeded]
    step("5. Let it speak", "generate", "--model", str(out), *sampling)
    console.print(f"\nAll of it took {(time.monotonic() - started) / 60:.1f} minutes and is in {out}/.")
    console.print("loss.png draws the loss; each folder in checkpoints/ opens in transformers as it is. Try next:")
    for command in (
        ["generate", "--model", str(out), "--prompt", "import", "--temperature", "0.5"],
        ["tokenizer", "show", "--tokenizer", tokenizer, "def main(argv: list[str]) -> None:"],
        ["train", "--out", str(out), "--resume", "--max-steps", "5000"],
        ["info"],
    ):
        console.print(f"  fastgpt {shlex.join(command)}", style="cyan", markup=False)


def _free(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, ... that is not there."""
    numbered = (path.with_name(f"{path.name}-{n}") for n in range(2, 10_000))
    return path if not path.exists() else next(p for p in numbered if not p.exists())
