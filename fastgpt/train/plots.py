"""The pictures of runs: loss.png of one, and several overlaid."""

import io
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from fastgpt.files import atomic_write

Records = list[dict[str, Any]]
TRAIN, FAINT, VAL = "#08519c", "#9ecae1", "#d94801"


def draw_run(records: Records, path: Path, loss_unit: str) -> None:
    """Loss, learning rate, gradient norm and tokens/s against the tokens seen, as a PNG."""
    figure, panels = _panels()
    loss, lr, norm, rate = panels
    tokens, losses = _column(records, "loss")
    if tokens:
        smooth = _running_mean(losses)
        loss.plot(tokens, losses, color=FAINT, linewidth=0.8)
        loss.plot(tokens, smooth, color=TRAIN, linewidth=1.5, label=f"training, {smooth[-1]:.3f} at the end")
        loss.set_ylim(*_limits(losses, smooth, _column(records, "val_loss")[1]))
    val_tokens, val_losses = _column(records, "val_loss")
    if val_tokens:
        loss.plot(val_tokens, val_losses, "o-", color=VAL, markersize=4, label=_val_label(val_losses))
    if tokens or val_tokens:
        loss.legend(frameon=False)
    loss.set_ylabel(f"loss ({loss_unit})")
    lr.plot(*_column(records, "lr"), color=TRAIN, linewidth=1.5)
    for axes, name in ((norm, "grad_norm"), (rate, "tokens_per_s")):
        tokens, values = _column(records, name)
        if tokens:
            smooth = _running_mean(values)
            axes.plot(tokens, values, color=FAINT, linewidth=0.8)
            axes.plot(tokens, smooth, color=TRAIN, linewidth=1.5)
            axes.set_ylim(0, _limits(values, smooth, [])[1])
    _save(figure, path)


def draw_comparison(runs: Sequence[tuple[str, Records]], path: Path, loss_unit: str) -> None:
    """The same panels, with a colour a run: training losses (running means, faint) and validation losses."""
    figure, panels = _panels()
    loss, lr, norm, rate = panels
    for i, (name, records) in enumerate(runs):
        color = f"C{i % 10}"
        tokens, losses = _column(records, "loss")
        val_tokens, val_losses = _column(records, "val_loss")
        if tokens:
            loss.plot(tokens, _running_mean(losses), color=color, linewidth=1, alpha=0.4)
        loss.plot(val_tokens, val_losses, "o-", color=color, markersize=3, label=name)
        lr.plot(*_column(records, "lr"), color=color, linewidth=1.5)
        for axes, key in ((norm, "grad_norm"), (rate, "tokens_per_s")):
            tokens, values = _column(records, key)
            if tokens:
                axes.plot(tokens, _running_mean(values), color=color, linewidth=1.2)
    for axes in (norm, rate):
        axes.set_ylim(bottom=0)
    loss.legend(frameon=False, title="points: validation, lines: training", title_fontsize="small")
    loss.set_ylabel(f"loss ({loss_unit})")
    _save(figure, path)


def _panels() -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), dpi=120, layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=[2, 1])
    loss = figure.add_subplot(grid[0, :])
    panels = [loss]
    for i, name in enumerate(("learning rate", "gradient norm", "tokens/s")):
        axes = figure.add_subplot(grid[1, i])
        axes.set_title(name, fontsize="medium")
        axes.locator_params(axis="x", nbins=4)
        panels.append(axes)
    for axes in panels:
        axes.set_xlabel("tokens seen")
        axes.xaxis.set_major_formatter(_short)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[1].ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
    panels[3].yaxis.set_major_formatter(_short)
    return figure, panels


def _short(x: float, _: Any = None) -> str:
    """1500 -> "1.5k"."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:g}{unit}"
    return f"{x:g}"


def _column(records: Records, name: str) -> tuple[list[float], list[float]]:
    """The tokens seen and the figure, of the records that have it."""
    found = [(r["tokens"], r[name]) for r in records if name in r]
    return [t for t, _ in found], [v for _, v in found]


def _running_mean(values: Sequence[float]) -> list[float]:
    """Of a 25th of the values around each; of fewer near the start, where a loss falls fast."""
    n, half = len(values), len(values) // 50
    sums = [0.0, *accumulate(values)]
    ends = [(i - min(i, half), min(n, i + min(i, half) + 1)) for i in range(n)]
    return [(sums[b] - sums[a]) / (b - a) for a, b in ends]


def _limits(values: Sequence[float], smooth: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """A range that shows all but the highest and lowest 200th of the single steps, and the rest whole."""
    ordered = sorted(values)
    cut = len(ordered) // 200
    shown = [ordered[cut], ordered[-1 - cut], *smooth, *others]
    low, high = min(shown), max(shown)
    margin = 0.05 * (high - low) or abs(high) or 1.0
    return low - margin, high + margin


def _val_label(losses: Sequence[float]) -> str:
    best = min(losses)
    return f"validation, {losses[-1]:.3f} at the end" + (f", {best:.3f} at best" if best < losses[-1] else "")


def _save(figure: Any, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    atomic_write(path, buffer.getvalue())
