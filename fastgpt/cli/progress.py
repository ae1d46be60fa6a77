"""What the subcommands print while they work."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.status import Status


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


def skipped_line(console: Console, skipped: list[str]) -> None:
    """How many files were passed over, and the first reason."""
    if skipped:
        more = f" (and {len(skipped) - 1} more)" if len(skipped) > 1 else ""
        console.print(f"skipped: {skipped[0]}{more}", markup=False)
