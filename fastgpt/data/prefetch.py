"""Batches that are made while the ones before are used."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Generic, Protocol, TypeVar

Batch = TypeVar("Batch")


class Positioned(Protocol):
    """Data whose position a checkpoint keeps."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Prefetched(Generic[Batch]):
    """Batches made on a thread of their own, `AHEAD` of them before they are asked for.

    The position is that behind the batch last taken, as if none were made ahead. An error in making one comes out where
    that one is taken.

    Args:
        make: the next batch of `data`; called on the thread.
        data: what `make` moves on in; not to be used beside this.
        begin: called first on the thread.
    """

    AHEAD = 2  # one to be ready when it is asked for, another while a slow one is made

    def __init__(self, make: Callable[[], Batch], data: Positioned, begin: Callable[[], object] = lambda: None) -> None:
        self._make, self._data, self._begin = make, data, begin
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: deque[Future[tuple[Batch, dict[str, Any]]]] = deque()
        self._state = data.state_dict()

    def next_batch(self) -> Batch:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "batches", self._begin)
        while len(self._ahead) <= self.AHEAD:
            self._ahead.append(self._thread.submit(lambda: (self._make(), self._data.state_dict())))
        batch, self._state = self._ahead.popleft().result()
        return batch

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.close()
        self._data.load_state_dict(state)
        self._state = state

    def close(self) -> None:
        """Ends the thread and goes back behind the batch last taken; `next_batch` starts it again."""
        for batch in self._ahead:
            batch.cancel()
        wait(self._ahead)
        self._ahead.clear()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
            self._data.load_state_dict(self._state)
