"""What a measurement of training says to people (tables, a picture) and to programs (JSON)."""

import io
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from fastgpt.bench.report import COLORS, mebibytes, simple_table
from fastgpt.bench.train import TrainBench, Trained
from fastgpt.files import atomic_write, explained

LEGEND = """\
tokens/s: median over the rounds. fastgpt is: how many times as fast as the contender, median of the rounds' ratios
(least to greatest). MFU: share of the matmul rate that was measured in the same rounds, and of the data sheet's where
it is known. MiB: peak of the process above what was there before the model; of it: fastgpt's peak over its."""
AXES = {"T": "tokens a sequence", "width": "width", "depth": "layers"}


def _size(result: TrainBench) -> str:
    m = result.model
    return (
        f"{m['n_layer']} layers, {m['n_head']} heads, {m['n_embd']} wide, vocabulary {m['vocab_size']:,}: "
        f"{result.parameters / 1e6:.1f} M parameters; {result.batch_size} x {result.block_size} tokens, "
        f"{result.precision} on {result.device}"
    )


def _machine(result: TrainBench) -> str:
    e = result.environment
    threads = f", {e['threads']} threads" if result.device == "cpu" else ""
    rate = (
        f"{result.matmul_flops / 1e9:,.0f} GFLOP/s"
        if result.matmul_flops < 1e12
        else f"{result.matmul_flops / 1e12:,.0f} TFLOP/s"
    )
    return f"{e['device_name']}{threads}, torch {e['torch']}, {e['date']}; {rate} ({result.matmul})"


def _ratio(trained: Trained) -> str:
    assert trained.ratio is not None
    assert trained.ratios is not None
    low, high = trained.ratios
    return "" if low == high == 1 else f"{trained.ratio:.2f}x ({low:.2f} to {high:.2f})"


def _mfu(trained: Trained) -> str:
    sheet = "" if trained.mfu_data_sheet is None else f" / {trained.mfu_data_sheet:.0%}"
    return f"{trained.mfu:.0%}{sheet}"


def print_result(result: TrainBench, console: Console) -> None:
    console.print(f"[bold]{_size(result)}[/bold]", soft_wrap=True)
    console.print(_machine(result), markup=False, soft_wrap=True)
    table = simple_table("", right=["tokens/s", "fastgpt is", "MFU", "MiB", "of it", "first loss", "last loss"])
    for trained in result.contenders:
        if trained.failed is None:
            table.add_row(
                trained.name,
                f"{trained.tokens_per_s:,.0f}",
                _ratio(trained),
                _mfu(trained),
                mebibytes(trained.peak_bytes),
                "" if trained.memory_ratio in (None, 1) else f"{trained.memory_ratio:.2f}",
                f"{trained.losses[0]:.4f}",
                f"{trained.losses[-1]:.4f}",
            )
    console.print(table)
    for trained in result.contenders:
        text = f"left out: {trained.failed}" if trained.failed is not None else trained.about
        console.print(f"{trained.name}: {text}", markup=False, soft_wrap=True)
    if result.shares:
        shares = ", ".join(f"{op} {share:.1%}" for op, share in result.shares.items())
        console.print(f"fastgpt's step: {shares}", markup=False, soft_wrap=True)
    for note in result.notes:
        console.print(note, markup=False, soft_wrap=True)


def _value(axis: str, result: TrainBench) -> int:
    return {"T": result.block_size, "width": result.model["n_embd"], "depth": result.model["n_layer"]}[axis]


def print_growth(found: dict[str, list[TrainBench]], console: Console) -> None:
    first = next(iter(found.values()))[0]
    console.print(_machine(first), markup=False, soft_wrap=True)
    table = simple_table("grows", "", "contender", right=["M parameters", "tokens/s", "fastgpt is", "MFU", "MiB"])
    for axis, results in found.items():
        for result in results:
            for i, trained in enumerate(result.contenders):
                head = (axis, f"{_value(axis, result):,}") if i == 0 else ("", "")
                if trained.failed is not None:
                    table.add_row(*head, trained.name, "", "left out")
                    continue
                table.add_row(
                    *head,
                    trained.name,
                    f"{result.parameters / 1e6:.1f}",
                    f"{trained.tokens_per_s:,.0f}",
                    _ratio(trained),
                    _mfu(trained),
                    mebibytes(trained.peak_bytes),
                )
    console.print(table)
    notes = dict.fromkeys(note for results in found.values() for result in results for note in result.notes)
    for note in notes:
        console.print(note, markup=False, soft_wrap=True)


def write(name: str, folder: Path, content: TrainBench | dict[str, list[TrainBench]]) -> list[Path]:
    """Writes <name>.json and <name>.png into the folder, which is made; other files there stay."""
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if isinstance(content, TrainBench):
        plain: Any = asdict(content)
        picture = draw(content)
    else:
        plain = {axis: [asdict(result) for result in results] for axis, results in content.items()}
        picture = draw_growth(content)
    paths = [folder / f"{name}.json", folder / f"{name}.png"]
    atomic_write(paths[0], json.dumps(plain, indent=1) + "\n")
    atomic_write(paths[1], picture)
    return paths


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def draw(result: TrainBench) -> bytes:
    """A PNG: tokens/s and peak memory of each contender, and where the time of our step goes."""
    from matplotlib.figure import Figure

    made = [t for t in result.contenders if t.failed is None]
    figure = Figure(figsize=(11, 1.6 + 0.55 * max(len(made), 4)), dpi=110, layout="constrained")
    panels = figure.subplots(1, 3)
    names = [t.name for t in made]
    _bars(panels[0], names, [t.tokens_per_s for t in made], "tokens/s", [f"{t.tokens_per_s:,.0f}" for t in made])
    memory = [(t.peak_bytes or 0) / 2**20 for t in made]
    _bars(panels[1], names, memory, "peak memory, MiB", [mebibytes(t.peak_bytes) for t in made])
    if result.shares:
        shown = {op: share for op, share in result.shares.items() if share >= 0.001}
        _bars(
            panels[2],
            list(shown),
            [100 * s for s in shown.values()],
            "% of fastgpt's step",
            [f"{s:.1%}" for s in shown.values()],
        )
    else:
        panels[2].set_axis_off()
    figure.suptitle(f"{_size(result)}\n{_machine(result)}", fontsize=9)
    return _png(figure)


def _bars(panel: Any, names: list[str], values: list[float], title: str, labels: list[str]) -> None:
    bars = panel.barh(names, values, color=[COLORS[0], *["#9e9e9e"] * (len(names) - 1)])
    panel.bar_label(bars, labels, padding=3, fontsize=8)
    panel.set_xlim(0, 1.25 * max(values, default=1) or 1)
    panel.invert_yaxis()
    panel.set_title(title, fontsize=10)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def draw_growth(found: dict[str, list[TrainBench]]) -> bytes:
    """A PNG: tokens/s above, peak memory below, against T, width and depth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), dpi=110, layout="constrained")
    panels = figure.subplots(2, len(found), squeeze=False)
    measures: list[tuple[str, Callable[[Trained], float]]] = [
        ("tokens/s", lambda t: t.tokens_per_s),
        ("peak memory, MiB", lambda t: (t.peak_bytes or 0) / 2**20),
    ]
    for j, (axis, results) in enumerate(found.items()):
        for i, (title, measure) in enumerate(measures):
            panel = panels[i][j]
            for color, name in zip(COLORS, [t.name for t in results[0].contenders], strict=False):
                points = [
                    (_value(axis, r), measure(t))
                    for r in results
                    for t in r.contenders
                    if t.name == name and not t.failed
                ]
                panel.plot(*zip(*points, strict=True), "o-", color=color, label=name) if points else None
            panel.set_xscale("log")
            values = [_value(axis, r) for r in results]
            panel.set_xticks(values, [f"{v:,}" for v in values])
            panel.minorticks_off()
            panel.set_ylim(0, 1.05 * panel.get_ylim()[1])
            panel.set_xlabel(AXES[axis], fontsize=9)
            panel.set_ylabel(title, fontsize=9)
            panel.tick_params(labelsize=8)
            panel.grid(alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].legend(frameon=False, fontsize=9)
    middle = found["depth"][-2] if len(found["depth"]) > 1 else found["depth"][-1]
    figure.suptitle(f"{_size(middle)}, and one of T, width and depth varied\n{_machine(middle)}", fontsize=9)
    return _png(figure)
