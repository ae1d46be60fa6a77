import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.train import learning_rate

SCHEDULES = ("cosine", "wsd", "linear")
KNOWN = {  # step -> rate, of a run of 110 steps from 1 to 0.1 after 10 of warm-up; wsd decays over the last 40
    "cosine": {10: 1.0, 60: 0.55, 85: 0.55 - 0.45 * math.sqrt(0.5)},
    "linear": {10: 1.0, 60: 0.55, 85: 0.325},
    "wsd": {10: 1.0, 60: 1.0, 70: 1.0, 80: 0.55, 109: 1 - 0.9 * math.sqrt(39 / 40)},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_known_points(schedule):
    for step, rate in {0: 0.1, 9: 1.0, **KNOWN[schedule], 110: 0.1, 1000: 0.1}.items():
        found = learning_rate(step, schedule, lr=1.0, min_lr=0.1, warmup_steps=10, max_steps=110, decay_steps=40)
        assert found == pytest.approx(rate), step


@given(
    schedule=st.sampled_from(SCHEDULES),
    warmup=st.integers(0, 50),
    steps=st.integers(1, 500),
    decay=st.none() | st.integers(0, 600),
    min_lr=st.floats(0, 1),
)
def test_rises_then_falls_and_stays_between(schedule, warmup, steps, decay, min_lr):
    rates = [
        learning_rate(s, schedule, lr=1.0, min_lr=min_lr, warmup_steps=warmup, max_steps=steps, decay_steps=decay)
        for s in range(steps + 2)
    ]
    assert all(a <= b + 1e-12 for a, b in pairwise(rates[:warmup]))
    assert all(a >= b - 1e-12 for a, b in pairwise(rates[warmup:]))
    assert all(0 < r <= 1 for r in rates[:warmup])
    assert all(min_lr - 1e-12 <= r <= 1 for r in rates[warmup:])
    assert rates[-1] == min_lr or warmup > steps


@given(steps=st.integers(10, 400), more=st.integers(0, 400), decay=st.integers(0, 200))
def test_the_stable_phase_of_wsd_does_not_know_how_long_the_run_is(steps, more, decay):
    """So a run may go on from it to another max_steps as if that had been planned."""
    options = {"lr": 1.0, "min_lr": 0.0, "warmup_steps": 5, "decay_steps": decay}
    short, long = (
        [learning_rate(s, "wsd", max_steps=total, **options) for s in range(steps)] for total in (steps, steps + more)
    )
    stable = max(5, steps - decay)
    assert short[:stable] == long[:stable]
    assert all(rate == 1.0 for rate in short[5:stable])


@given(steps=st.integers(2, 400), decay=st.integers(1, 200))
def test_wsd_decays_for_as_long_as_it_says(steps, decay):
    options = {"lr": 1.0, "min_lr": 0.0, "warmup_steps": 0, "max_steps": steps, "decay_steps": decay}
    below = [s for s in range(steps) if learning_rate(s, "wsd", **options) < 1.0]
    assert below == list(range(max(0, steps - decay) + 1, steps))


def test_wsd_decays_over_a_fifth_of_the_run_if_nothing_is_said():
    rates = [learning_rate(s, "wsd", lr=1.0, min_lr=0.0, warmup_steps=10, max_steps=200) for s in range(200)]
    assert rates[10:161] == [1.0] * 151
    assert rates[161] < 1.0


def test_an_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="one of cosine, wsd, linear, got 'step'"):
        learning_rate(0, "step", lr=1.0, min_lr=0.0, warmup_steps=0, max_steps=1)
