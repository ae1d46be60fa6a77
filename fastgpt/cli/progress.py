"""What the subcommands print while they work."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.status import Status

if TYPE_CHECKING:
    from fastgpt.data.documents import Skipped
    from fastgpt.data.preparation import Progress


@contextmanager
def counter(console: Console, verb: str, unit: str) -> Iterator[Callable[[int], None]]:
    """A line that counts up on a terminal (nothing elsewhere) and is gone at the end: call it with the count."""
    status: Status | None = None

    def count(n: int) -> None:
        nonlocal status
        if not console.is_terminal:
            return
        if status is None:
            status = console.status("")
            status.start()
        if n < 100 or n % 50 == 0:
            status.update(f"{verb}: {n:,} {unit}")

    try:
        yield count
    finally:
        if status is not None:
            status.stop()


@contextmanager
def encoding(console: Console) -> Iterator[Callable[["Progress"], None]]:
    """A line on a terminal that tells how far `fastgpt.data.prepare` is, and how fast: its `progress`."""
    started = time.monotonic()
    with console.status("encoding") as status:

        def count(p: "Progress") -> None:
            seconds = time.monotonic() - started
            megabytes, tokens = (p.done.bytes - p.before.bytes) / 1e6, (p.done.tokens - p.before.tokens) / 1e6
            rates = f"{megabytes / seconds:.1f} MB/s, {tokens / seconds:.2f} M tokens/s"
            status.update(f"encoding: {p.done.documents:,} documents, {p.done.tokens:,} tokens, {rates}")

        yield count


def skipped_line(console: Console, skipped: "Skipped") -> None:
    """How many files, lines and rows were passed over, and the first reason."""
    if skipped.count:
        more = f" (and {skipped.count - 1:,} more)" if skipped.count > 1 else ""
        console.print(f"skipped: {skipped.first}{more}", markup=False)
