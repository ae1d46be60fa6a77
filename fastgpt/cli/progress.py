"""What the subcommands print while they work."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

if TYPE_CHECKING:
    from fastgpt.data.documents import Skipped
    from fastgpt.data.preparation import PrepareProgress


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


@contextmanager
def encoding(console: Console) -> Iterator[Callable[["PrepareProgress"], None]]:
    """A line on a terminal that tells how far `fastgpt.data.prepare` is, and how fast: its `progress`."""
    started = time.monotonic()
    with console.status("encoding") as status:

        def count(p: "PrepareProgress") -> None:
            seconds = time.monotonic() - started
            megabytes, tokens = (p.done.bytes - p.before.bytes) / 1e6, (p.done.tokens - p.before.tokens) / 1e6
            rates = f"{megabytes / seconds:.1f} MB/s, {tokens / seconds:.2f} M tokens/s"
            status.update(f"encoding: {p.done.documents:,} documents, {p.done.tokens:,} tokens, {rates}")

        yield count


@contextmanager
def receiving(console: Console) -> Iterator[Callable[[str, int, int | None], None]]:
    """A bar for each file on a terminal, with speed and time left: the `progress` of `fastgpt.data.download`."""
    columns = [BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()]
    bars: dict[str, TaskID] = {}
    with Progress(
        TextColumn("{task.description}"), *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:

        def count(name: str, received: int, total: int | None) -> None:
            if name not in bars:  # from where it resumes, which was not received at any speed
                bars[name] = progress.add_task(name, completed=received)
            progress.update(bars[name], completed=received, total=total)

        yield count


def skipped_line(console: Console, skipped: "Skipped") -> None:
    """How many files, lines and rows were passed over, and the first reason."""
    if skipped.count:
        more = f" (and {skipped.count - 1:,} more)" if skipped.count > 1 else ""
        console.print(f"skipped: {skipped.first}{more}", markup=False)
