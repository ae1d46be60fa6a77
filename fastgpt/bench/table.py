"""The README's table of kernels, made from results."""

from pathlib import Path

from fastgpt.bench.kernels import KERNELS
from fastgpt.bench.measure import Result
from fastgpt.bench.report import comparison, duration, environment_line, groups, ours_of, read
from fastgpt.errors import UserError
from fastgpt.files import atomic_write

BEGIN, END = "<!-- kernels:begin -->", "<!-- kernels:end -->"
COLUMNS = ["op", "shape", "machine", "pass", "time", "times as fast as", "of the roofline", "of its memory"]


def markdown(results: list[Result]) -> str:
    """One row for each shape that has a target, by op; below it the machines, and the devices without results."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|---|---|---|--:|---|--:|--:|"]
    order = list(KERNELS)
    for result in sorted(results, key=lambda r: (order.index(r.op) if r.op in order else len(order), r.device)):
        for group in groups(result.rows):
            ours = ours_of(group)
            if not ours.headline:
                continue
            speed, memory = comparison(group)
            cells = [
                f"`{ours.op}`",
                f"{ours.shape}, {ours.dtype}",
                result.machine,
                ours.direction,
                duration(ours.median_ms),
            ]
            cells += [speed, f"{ours.roofline:.0%}", memory]
            lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for machine in sorted({result.machine for result in results}):
        here = [result for result in results if result.machine == machine]
        newest = max(here, key=lambda result: str(result.environment["date"]))
        lines.append(f"{machine}: {environment_line(newest)}.")
    for device in ("cpu", "cuda"):
        if not any(result.device == device for result in results):
            command = f"fastgpt bench kernels --device {device} --out benchmarks/results"
            lines.append(f"{device}: not measured yet (`{command}` does it).")
    return "\n".join(lines)


def update(readme: Path, folders: list[Path]) -> int:
    """Replaces what stands between the two marks in `readme` by the table of the folders' results.

    Returns:
        how many results went in.

    Raises:
        UserError: the file or one of its marks is not there, or a folder has no results.
    """
    results = [result for folder in folders for result in read(folder)]
    if not readme.is_file():
        raise UserError(f"{readme} is no file: name the README with --readme")
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"{readme} must have the lines `{BEGIN}` and `{END}` once each, in that order")
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    atomic_write(readme, f"{before}\n{markdown(results)}\n{after}")
    return len(results)
