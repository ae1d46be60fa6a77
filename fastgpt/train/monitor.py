"""What watches a run's loss: steps that went wrong, and spikes."""

import json
from collections import deque
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

from fastgpt.files import atomic_write

# So many steps in a row without a finite gradient are no accident of a batch: --skip-nan gives up on them.
SKIPPED_IN_A_ROW = 10


class SpikeDetector:
    """Says when a loss spike begins. It only warns: most spikes heal by themselves.

    A loss is a spike if it is above the median of the last 64 losses by 8 of their standard deviations, and by a tenth
    of that median. The deviation is estimated by the median absolute deviation, which a spike in the window hardly
    moves. Nothing is judged before 32 losses, so a run's start, where the loss falls, gives no alarm; nor is a loss
    that stays high told again: after half a window it is what is usual.

    Args:
        losses: of the steps before, in order; so a resumed run goes on judging as it did.
    """

    WINDOW, LEAST = 64, 32
    DEVIATIONS, SHARE = 8.0, 0.1

    def __init__(self, losses: Iterable[float] = ()) -> None:
        self._losses: deque[float] = deque(maxlen=self.WINDOW)
        self._is_high = False
        for loss in list(losses)[-2 * self.WINDOW :]:
            self.see(loss)

    def see(self, loss: float) -> float | None:
        """Takes the next step's loss; returns the usual one, the median, if a spike begins with it."""
        usual, was_high = 0.0, self._is_high
        if len(self._losses) >= self.LEAST:
            usual = median(self._losses)
            deviation = 1.4826 * median(abs(x - usual) for x in self._losses)  # the factor makes it a Gaussian's sigma
            self._is_high = loss - usual > max(self.DEVIATIONS * deviation, self.SHARE * abs(usual))
        self._losses.append(loss)
        return usual if self._is_high and not was_high else None


def skipped_in_a_row(records: list[dict[str, Any]]) -> int:
    """How many of the last steps in metrics.jsonl were stepped over."""
    count = 0
    for record in reversed(records):
        if "loss" in record:
            break
        count += "skipped" in record
    return count


def write_bad_step(run: Path, rows: list[list[Any]], step: int, loss: float, grad_norm: float) -> Path:
    """Writes nan_step_<n>.json: the loss, the gradient's norm, and the rows of each batch of the step; returns it.

    Args:
        rows: of each rank, of each of its batches.
    """
    path = run / f"nan_step_{step}.json"
    found = {
        "step": step,
        "loss": str(loss),  # JSON has no nan
        "grad_norm": str(grad_norm),
        "batches": [list(chain(*parts)) for parts in zip(*rows, strict=True)],
    }
    atomic_write(path, json.dumps(found) + "\n")
    return path
