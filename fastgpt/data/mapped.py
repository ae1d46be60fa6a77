"""A file of numbers, read through a memory map."""

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgpt.errors import UserError


class MappedNumbers:
    """A file that holds `count` numbers and nothing else.

    Raises:
        UserError: it is missing or has another length.
    """

    def __init__(self, path: Path, dtype: "np.dtype[Any]", count: int) -> None:
        self.path, self._bytes = path, count * dtype.itemsize
        if not path.is_file():
            raise UserError(f"{path} is missing: prepare the data again")
        if path.stat().st_size != self._bytes:
            raise UserError(
                f"{path} has {path.stat().st_size:,} bytes, meta.json says {self._bytes:,}: prepare the data again"
            )
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._array = np.frombuffer(self._map, dtype)

    def __call__(self) -> npt.NDArray[Any]:
        """All of them: what is looked at is read.

        Raises:
            UserError: the file was cut short since it was opened.
        """
        if self._map.size() < self._bytes:  # looking at what is gone would end the process (SIGBUS)
            raise UserError(f"{self.path} was cut short while it was in use: prepare the data again")
        return self._array

    def will_need(self, start: int, stop: int) -> None:
        """Has the system read [start, stop) from the disk meanwhile."""
        size = self._array.itemsize
        first = start * size // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(mmap.MADV_WILLNEED, first, stop * size - first)
