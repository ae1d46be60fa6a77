"""SIGINT and SIGTERM, as a run takes them: it ends its step, saves, and says how to go on."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from fastgpt.train import parallel


class Interrupted(Exception):
    """A signal came in the middle of something that may be left."""


class StopSignals:
    """Notes SIGINT and SIGTERM while it is entered, so that the loop can end its step first.

    A second Ctrl-C is at once. Where it is not the main thread's, whoever runs us there handles signals.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._may_interrupt = False
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return bool(self.received)

    def any_rank(self) -> int:
        """The signal that came to any rank, 0 for none: all ranks ask at the same step, and stop at the same one."""
        return parallel.highest(self.received[0] if self.received else 0)

    def __enter__(self) -> "StopSignals":
        with suppress(ValueError):
            self._before = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: Any) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received.append(number)
        if self._may_interrupt:
            raise Interrupted

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """A block that a signal, also one that came before, ends by `Interrupted`: one that can be done again."""
        self._may_interrupt = True
        try:
            if self.received:
                raise Interrupted
            yield
        finally:
            self._may_interrupt = False
