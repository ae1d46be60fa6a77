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
