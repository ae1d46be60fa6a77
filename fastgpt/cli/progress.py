"""What the subcommands print while they work."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


@contextmanager
def counter(console: Console, verb: str, unit: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """A line that counts up on a terminal (nothing elsewhere), with a bar where the total is known: call it with the
    count. It appears with the first count and is gone at the end."""
    count_column = "{task.completed:,}" + (" of {task.total:,}" if total else "")
    columns = [TextColumn(verb), *([BarColumn()] if total else []), TextColumn(f"{count_column} {unit}")]
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(verb, total=total)
    shown = 0.0

    def count(n: int) -> None:
        nonlocal shown
        if (now := time.monotonic()) - shown >= 0.05 or n == total:
            shown = now
            bar.start()
            bar.update(task, completed=n)

    try:
        yield count
    finally:
        bar.stop()


def skipped_line(console: Console, skipped: list[str]) -> None:
    """How many files were passed over, and the first reason."""
    if skipped:
        more = f" (and {len(skipped) - 1} more)" if len(skipped) > 1 else ""
        console.print(f"skipped: {skipped[0]}{more}", markup=False)
