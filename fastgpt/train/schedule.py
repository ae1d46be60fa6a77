"""The learning rate at each step: linear warm-up, then one of three ways down.

    cosine   half a cosine down to min_lr (Loshchilov & Hutter 2017, arXiv:1608.03983)
    linear   a straight line down to min_lr (to zero it beats the cosine: Bergsma et al. 2025, arXiv:2502.15938)
    wsd      the peak rate, then down to min_lr over the last decay_steps as 1 - sqrt (warm-up, stable, decay)

The decay of wsd is the one that Hägele et al. 2024 (arXiv:2405.18392) found best: 1 - sqrt(x) ends lower than a line of
the same length, and a decay of a fifth of the run reaches the cosine. Before it, the rate does not depend on how long
the run is: go on with a larger max_steps from a checkpoint of the stable phase, and the steps are those that the longer
run would have made anyway.
"""

import math
from typing import Literal, get_args

Schedule = Literal["cosine", "wsd", "linear"]


def learning_rate(
    step: int,
    schedule: Schedule = "cosine",
    *,
    lr: float,
    min_lr: float,
    warmup_steps: int,
    max_steps: int,
    decay_steps: int | None = None,
) -> float:
    """The rate of step `step`, which counts from 0: the first step already moves.

    Args:
        lr: the peak rate.
        min_lr: the rate from step `max_steps` on.
        decay_steps: of wsd, at most what the warm-up leaves; a fifth of `max_steps` if None.

    Raises:
        ValueError: there is no such schedule.
    """
    if schedule not in get_args(Schedule):
        raise ValueError(f"schedule must be one of {', '.join(get_args(Schedule))}, got {schedule!r}")
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if step >= max_steps:
        return min_lr
    start = warmup_steps
    if schedule == "wsd":
        start = max(start, max_steps - (max_steps // 5 if decay_steps is None else decay_steps))
        if step < start:
            return lr
    done = (step - start) / (max_steps - start)
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "wsd": 1 - math.sqrt(done)}[schedule]
    return min_lr + (lr - min_lr) * left
