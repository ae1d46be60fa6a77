import math
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from fastgpt.train import cosine_lr


def test_known_points():
    def at(step):
        return cosine_lr(step, lr=1.0, min_lr=0.1, warmup_steps=10, max_steps=110)

    assert at(0) == 0.1
    assert at(9) == 1.0
    assert at(10) == 1.0
    assert math.isclose(at(60), 0.55)
    assert at(110) == 0.1
    assert at(1000) == 0.1


@given(warmup=st.integers(0, 50), steps=st.integers(1, 500), min_lr=st.floats(0, 1))
def test_rises_then_falls_and_stays_between(warmup, steps, min_lr):
    rates = [cosine_lr(s, lr=1.0, min_lr=min_lr, warmup_steps=warmup, max_steps=steps) for s in range(steps + 2)]
    top = warmup
    assert all(a <= b + 1e-12 for a, b in pairwise(rates[:top]))
    assert all(a >= b - 1e-12 for a, b in pairwise(rates[top:]))
    assert all(0 < r <= 1 for r in rates[:warmup])
    assert all(min_lr - 1e-12 <= r <= 1 for r in rates[top:])
    assert rates[-1] == min_lr or warmup > steps
