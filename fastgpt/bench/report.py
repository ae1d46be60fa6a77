"""What a measurement says to people (tables, a plot) and to programs (CSV, JSON)."""

import csv
import io
import json
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from fastgpt.bench.measure import OURS, Result, Row
from fastgpt.errors import UserError
from fastgpt.files import atomic_write, explained

LEGEND = """\
A contender's column: how many times as fast as it fastgpt is. spread: half of p80 - p20. roof: share of
what the copy and matmul rates of the same rounds allow. MiB: peak of one call, and the fastest library
kernel's. On a CPU freed memory is kept for the next call: new pages would take longer than most ops."""
COLORS = ["#08519c", "#d94801", "#238b45", "#6a51a3", "#b8860b", "#c51b8a"]


def duration(ms: float) -> str:
    """Three digits: "6.10 us", "152 us", "1.52 ms", "2.31 s"."""
    value, unit = (ms * 1e3, "us") if ms < 1 else (ms, "ms") if ms < 1e3 else (ms / 1e3, "s")
    return f"{value:.{max(0, 3 - len(str(int(value))))}f} {unit}"


def rate(row: Row) -> str:
    value, units = (row.gb_per_s, "GB/s TB/s") if row.memory_bound else (row.tflop_per_s * 1e3, "GFLOP/s TFLOP/s")
    small, large = units.split()
    return f"{value:.3g} {small}" if value < 1000 else f"{value / 1e3:.3g} {large}"


def factor(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.0f}x"


def mebibytes(n: int | None) -> str:
    if n is None:
        return "?"
    return f"{n / 2**20:,.0f}" if n >= 10 << 20 else f"{n / 2**20:.2f}"


def spread(row: Row) -> str:
    return f"±{50 * (row.p80_ms - row.p20_ms) / row.median_ms:.0f}%"


def groups(rows: list[Row]) -> list[list[Row]]:
    """The rows of one shape and pass together, in the order that they were measured in."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.op, row.shape, row.direction), []).append(row)
    return list(found.values())


def ours_of(group: list[Row]) -> Row:
    return next(row for row in group if row.contender == OURS)


def best_library(group: list[Row]) -> Row | None:
    """The fastest of the library's kernels; None where none of them takes the shape."""
    return min((row for row in group if row.library), key=lambda row: row.median_ms, default=None)


def environment_line(result: Result) -> str:
    e = result.environment
    parts = [str(e["device_name"]), f"{e['threads']} threads" if result.device == "cpu" else "", f"torch {e['torch']}"]
    return ", ".join([*filter(None, parts), str(e["date"])])


def print_result(result: Result, console: Console) -> None:
    """All shapes and passes of an op, and the fine print."""
    others = list(dict.fromkeys(row.contender for row in result.rows if row.contender != OURS))
    table = simple_table("shape", "pass", right=["time", "spread", *map(_heading, others), "rate", "roof", "MiB"])
    shape = ""
    for group in groups(result.rows):
        ours, library = ours_of(group), best_library(group)
        by_name = {row.contender: row for row in group}
        table.add_row(
            ours.shape if ours.shape != shape else "",
            ours.direction,
            duration(ours.median_ms),
            spread(ours),
            *(factor(by_name[name].ratio) if name in by_name else "" for name in others),
            rate(ours),
            f"{ours.roofline:.0%}",
            mebibytes(ours.peak_bytes) + (f" / {mebibytes(library.peak_bytes)}" if library else ""),
        )
        shape = ours.shape
    console.print(f"[bold]{result.op}[/bold] on {result.device} ({result.implementation}), {result.rows[0].dtype}")
    console.print(environment_line(result), markup=False)
    console.print(table)
    for note in result.notes:
        console.print(note, markup=False)


def print_summary(results: list[Result], console: Console) -> None:
    """One line for each shape that has a target."""
    table = simple_table("op, shape", "pass", right=["time", "roof", "memory"])
    table.add_column("times as fast as")
    for result in results:
        table.add_row(result.op)
        for group in groups(result.rows):
            ours = ours_of(group)
            if ours.headline:
                speed, memory = comparison(group)
                time = duration(ours.median_ms)
                table.add_row(f"  {ours.shape}", ours.direction, time, f"{ours.roofline:.0%}", memory, speed)
    console.print(table)


def comparison(group: list[Row]) -> tuple[str, str]:
    """How many times as fast as the fastest library kernel (or the reference, if there is none), of its memory."""
    ours = ours_of(group)
    other = best_library(group) or next(row for row in group if row.contender == "reference")
    memory = "-"
    if ours.peak_bytes is not None and other.peak_bytes:
        memory = factor(ours.peak_bytes / other.peak_bytes)
    return f"{factor(other.ratio)} {other.contender}", memory


def _heading(name: str) -> str:
    """A contender's name in lines of about nine letters."""
    lines = [""]
    for piece in re.split(r"(?<=[ ,_=])|(?<=\w{4})(?=[.(])", name):
        if len(lines[-1] + piece.strip()) > 9:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.strip() for line in lines if line)


def simple_table(*left: str, right: list[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in left:
        table.add_column(name, no_wrap=name != "shape", min_width=11 if name == "shape" else None)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def write(result: Result, folder: Path) -> list[Path]:
    """Writes <op>.csv, <op>.json and <op>.png into the folder, which is made; other ops' files there stay."""
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    head = {"device": result.device, "machine": result.machine}
    head |= {key: str(result.environment[key]) for key in ("date", "threads", "torch")}
    text = io.StringIO()
    writer = csv.DictWriter(text, [*head, *(field.name for field in fields(Row))], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**head, **asdict(row)} for row in result.rows)
    contents: dict[str, str | bytes] = {
        ".csv": text.getvalue(),
        ".json": json.dumps(asdict(result), indent=1) + "\n",
        ".png": draw(result),
    }
    for suffix, content in contents.items():
        atomic_write(folder / f"{result.op}{suffix}", content)
    return [folder / f"{result.op}{suffix}" for suffix in contents]


def read(folder: Path) -> list[Result]:
    """The results in a folder and in those below it, by path; other .json files there are passed over.

    Raises:
        UserError: there are none, or one cannot be read.
    """
    results = []
    for path in sorted(folder.rglob("*.json")):
        try:
            content = json.loads(path.read_text())
            if isinstance(content, dict) and {"op", "rows"} <= content.keys():
                results.append(Result(**{**content, "rows": [Row(**row) for row in content["rows"]]}))
        except (ValueError, TypeError):
            raise UserError(
                f"{path} is no result of this version's `fastgpt bench kernels`: measure it again"
            ) from None
    if not results:
        raise UserError(f"{folder} has no results: `fastgpt bench kernels --out {folder}` makes them")
    return results


def draw(result: Result) -> bytes:
    """A PNG: achieved rate against size, a row of panels for each series and a panel for each pass."""
    from matplotlib.figure import Figure

    series = list(dict.fromkeys(row.series for row in result.rows))
    directions = list(dict.fromkeys(row.direction for row in result.rows))
    contenders = list(dict.fromkeys(row.contender for row in result.rows))
    size = (1.5 + 3.6 * max(2, len(directions)), 1.3 + 2.9 * len(series))
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    panels = figure.subplots(len(series), len(directions), squeeze=False)
    for i, name in enumerate(series):
        for j, direction in enumerate(directions):
            rows = [row for row in result.rows if row.series == name and row.direction == direction]
            panel = panels[i][j]
            if not rows:
                panel.set_axis_off()
                continue
            _panel(panel, rows, contenders)
            panel.set_title(f"{name}, {direction}".removeprefix(", "), fontsize=10)
    found = {
        label: line for panel in panels.flat for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    handles = {name: found[name] for name in [*contenders, "roofline"] if name in found}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    figure.suptitle(f"{result.op}, {result.rows[0].dtype}: {environment_line(result)}", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _panel(panel: Any, rows: list[Row], contenders: list[str]) -> None:
    from matplotlib.ticker import LogLocator

    memory = sum(row.memory_bound for row in rows) * 2 > len(rows)
    small = max(row.tflop_per_s for row in rows) < 1

    def value(row: Row, ms: float) -> float:
        work = row.gb_per_s if memory else row.tflop_per_s * (1e3 if small else 1)
        return work * row.median_ms / ms

    for contender in reversed(contenders):  # ours last, on top
        mine = sorted((row for row in rows if row.contender == contender), key=lambda row: row.size)
        ours = contender == OURS
        color = COLORS[contenders.index(contender) % len(COLORS)]
        x = [row.size for row in mine]
        panel.plot(
            x,
            [value(r, r.median_ms) for r in mine],
            "o-",
            color=color,
            linewidth=2.4 if ours else 1.3,
            label=contender,
            markersize=5 if ours else 3.5,
        )
        panel.fill_between(
            x,
            [value(r, r.p80_ms) for r in mine],
            [value(r, r.p20_ms) for r in mine],
            color=color,
            alpha=0.15,
            linewidth=0,
        )
        if ours:
            panel.plot(x, [value(r, r.floor_ms) for r in mine], "--", color="black", linewidth=1.2, label="roofline")
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel(rows[0].size_name, fontsize=9)
    panel.set_ylabel("GB/s" if memory else "GFLOP/s" if small else "TFLOP/s", fontsize=9)
    sizes = sorted({row.size for row in rows})
    panel.set_xticks(sizes, [_count(size) for size in sizes])
    panel.minorticks_off()
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    panel.tick_params(labelsize=8)
    panel.grid(alpha=0.3, which="major")
    panel.spines[["top", "right"]].set_visible(False)


def _count(n: int) -> str:
    for unit, factor in (("M", 10**6), ("k", 10**3)):
        if n >= 10 * factor or (n >= factor and unit == "M"):
            return f"{n / factor:.3g}{unit}"
    return f"{n}"
