"""fastgpt bench kernels, fastgpt bench table"""

from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from fastgpt.errors import UserError
from fastgpt.files import explained


def kernels(
    *,
    op: tuple[str, ...] = (),
    device: Literal["auto", "cpu", "cuda"] = "auto",
    out: Path | None = None,
    machine: str | None = None,
    quick: bool = False,
) -> None:
    """Measure the ops against their references, torch.compile and the best kernels that torch ships.

    All in one process and in turn; on two CPU cores all ops take about ten minutes.

    Args:
        op: One or more ops; all of them if not given.
        device: cpu (fp32), cuda (bf16), or auto: a GPU if there is one.
        out: Folder of results: writes OUT/MACHINE/<op>.csv, .json and .png. Nothing is written if not given.
        machine: Name of its folder; made from the device's name if not given.
        quick: One tiny shape of each op, nothing compiled: shows that all of it works, in seconds.
    """
    from fastgpt.bench import measure, report
    from fastgpt.bench.kernels import KERNELS

    unknown = [name for name in op if name not in KERNELS]
    if unknown:
        raise UserError(f"--op {unknown[0]} is no op: take {', '.join(KERNELS)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this torch sees no GPU (see `fastgpt info`): take --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if out is not None:  # before ten minutes of measuring, not after
        if out.is_file():
            raise UserError(f"--out {out} is a file: name a folder")
        with explained(out):
            out.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False, width=max(100, Console().width))
    results = []
    for name in op or KERNELS:
        with console.status("") as status:
            result = measure.measure(name, device, quick, machine, status.update)
        results.append(result)
        report.print_result(result, console)
        if out is not None:
            files = report.write(result, out / result.machine)
            console.print(f"saved {', '.join(map(str, files))}", markup=False, soft_wrap=True)
        console.print()
        console.file.flush()  # in a file, too, a result is there when it is made
    console.print(report.LEGEND, style="dim", soft_wrap=True)
    if len(results) > 1:
        report.print_summary(results, console)


def table(*, results: tuple[Path, ...], readme: Path = Path("README.md")) -> None:
    """Write the README's table of kernels from results, between its two marks `kernels:begin` and `kernels:end`.

    Args:
        results: Folders that `fastgpt bench kernels --out` wrote; those below them count too.
        readme: The file to change.
    """
    from fastgpt.bench.table import update

    print(f"{readme}: the table of kernels is made from {update(readme, list(results))} results")


def train(
    *,
    preset: str = "gpt2",
    vs: tuple[str, ...] = (),
    device: Literal["auto", "cpu", "cuda"] = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    batch_size: int = 4,
    block_size: int = 256,
    n_layer: int | None = None,
    n_head: int | None = None,
    n_embd: int | None = None,
    vocab_size: int | None = None,
    rounds: int = 10,
    profile: bool = True,
    grow: bool = False,
    nanogpt_checkout: Path | None = None,
    out: Path | None = None,
    machine: str | None = None,
    quick: bool = False,
) -> None:
    """Train a GPT beside others: tokens/s, MFU, peak memory, and where a step's time goes.

    Each contender trains in a process of its own, from the same weights on the same random batches, and they make their
    steps in turn. The character model of nanoGPT is `--preset nano --vocab-size 65 --batch-size 16`.

    Args:
        preset: gpt2, gpt2-medium, gpt2-large, gpt2-xl, nano, mini or micro.
        vs: One or more of nanogpt, nanogpt-compile, transformers, torch-compile (they are in a clone's benchmarks/).
        device: cpu, cuda, or auto: a GPU if there is one.
        precision: fp32, bf16 (autocast), or auto: bf16 on a GPU, and on a CPU the faster.
        batch_size: Sequences a step.
        block_size: Tokens a sequence.
        n_layer: Layers, instead of the preset's.
        n_head: Heads, instead of the preset's.
        n_embd: Width, instead of the preset's.
        vocab_size: Token ids, instead of GPT-2's 50,257.
        rounds: How often each makes its turn, of one step or as many as take about a second.
        profile: Show the share of each op in fastgpt's step.
        grow: Show how tokens/s and memory grow with T, width and depth, from this model and batch; takes long.
        nanogpt_checkout: A clone of nanoGPT whose model.py is to be taken, instead of benchmarks/contenders/nanogpt.py.
        out: Folder of results: writes OUT/MACHINE/train_<model>_<precision>.json and .png. Nothing is written if not
            given.
        machine: Name of its folder; made from the device's name if not given.
        quick: A micro model and two rounds: shows that all of it works, in seconds.
    """
    from fastgpt.bench import train_report
    from fastgpt.bench.train import check_contenders, grown, job_of, measure

    if quick:
        preset, vocab_size, batch_size, block_size, rounds = "micro", 512, 2, 32, 2
    if rounds < 1:
        raise UserError(f"--rounds {rounds} is no number of rounds: take at least 1")
    if out is not None and out.is_file():
        raise UserError(f"--out {out} is a file: name a folder")
    check_contenders(vs, nanogpt_checkout)
    sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "vocab_size": vocab_size}
    job = job_of(preset, sizes, batch_size, block_size, device, precision, nanogpt_checkout)
    console = Console(highlight=False, width=max(100, Console().width))
    with console.status("") as status:
        if grow:
            found = grown(job, list(vs), rounds, machine, status.update)
            first = found["T"][0]
        else:
            first = measure(job, list(vs), rounds, machine, profile, status.update)
    name = f"train_{preset}_{job.precision}{'_grow' if grow else ''}"
    if grow:
        train_report.print_growth(found, console)
    else:
        train_report.print_result(first, console)
    if out is not None:
        files = train_report.write(name, out / first.machine, found if grow else first)
        console.print(f"saved {', '.join(map(str, files))}", markup=False, soft_wrap=True)
    console.print(train_report.LEGEND, style="dim", soft_wrap=True)
