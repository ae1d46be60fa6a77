"""The learning rate at each step."""

import math


def cosine_lr(step: int, *, lr: float, min_lr: float, warmup_steps: int, max_steps: int) -> float:
    """Linear warm-up, then half a cosine down to `min_lr` (Loshchilov & Hutter 2017, arXiv:1608.03983).

    `step` counts from 0; the first step already moves, and from step `max_steps` on the rate is `min_lr`.
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if step >= max_steps:
        return min_lr
    done = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * done))
