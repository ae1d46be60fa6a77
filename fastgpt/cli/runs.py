"""fastgpt runs ..."""

from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from fastgpt.train import compare as comparison


def compare(runs: Annotated[tuple[Path, ...], tyro.conf.Positional], *, out: Path = Path("compare.png")) -> None:
    """Overlay runs in one picture, and show in tables what each came to and what they differ in.

    Args:
        runs: Run folders.
        out: Picture to write.
    """
    found, differences = comparison.compare(runs, out)
    console = Console(highlight=False, soft_wrap=True)
    columns = ("parameters", "steps", "tokens", "last val loss", "best val loss", "tokens/s", "MFU", "time")
    table = Table("run", *columns)
    for run in found:
        figures = (
            _show(run.parameters, ","),
            f"{run.steps:,}",
            f"{run.tokens:,}",
            _show(run.val_loss, ".4f"),
            _show(run.best_val_loss, ".4f"),
            _show(run.tokens_per_s, ",.0f"),
            _show(run.mfu, ".0%"),
            _time(run.seconds),
        )
        table.add_row(run.name, *figures)
    console.print(table)
    if differences:
        table = Table("setting", *(run.name for run in found), title="what differs", title_justify="left")
        for key, values in differences.items():
            table.add_row(key, *("-" if value is None else str(value) for value in values))
        console.print(table)
    console.print(f"drawn in {out}")


def _show(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def _time(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.1f} min" if hours < 2 else f"{hours:.1f} h"
