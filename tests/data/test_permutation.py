import time
from collections import Counter
from math import factorial

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.data.permutation import Permutation


@given(st.integers(1, 5000), st.integers(0, 2**63), st.integers(0, 10**6))
def test_every_number_is_there_once(n, seed, epoch):
    assert sorted(Permutation(n, [seed, epoch])(0, n)) == list(range(n))


@given(st.integers(5000, 2**50), st.integers(0, 2**32), st.data())
def test_a_part_of_a_large_one_is_in_range_and_never_the_same_twice(n, seed, data):
    order = Permutation(n, [seed])
    parts = [data.draw(st.integers(0, n - 100)) for _ in range(3)]
    places = {place for start in parts for place in range(start, start + 100)}
    found = {number for start in parts for number in order(start, start + 100)}
    assert len(found) == len(places)
    assert 0 <= min(found) <= max(found) < n


@given(st.integers(1, 500), st.data())
def test_a_part_is_that_of_the_whole(n, data):
    start = data.draw(st.integers(0, n))
    stop = data.draw(st.integers(start, n))
    order = Permutation(n, [1, 2])
    assert order(start, stop) == order(0, n)[start:stop]


def test_all_of_the_key_counts():
    keys = ([0, 0], [0, 1], [1, 0], [2, 0])
    assert len({tuple(Permutation(100, key)(0, 100)) for key in keys}) == len(keys)


def test_all_orders_come_about_equally_often():
    found = Counter(tuple(Permutation(4, [seed])(0, 4)) for seed in range(4800))
    assert len(found) == factorial(4)
    assert all(140 < count < 260 for count in found.values())  # 200 expected


def test_neighbours_have_nothing_to_do_with_each_other():
    n = 10**5
    order = np.array(Permutation(n, [0])(0, n))
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.02
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.02
    # As many different steps from one to the next as of random numbers: 1 - 1/e of all.
    assert abs(len(np.unique(np.diff(order) % n)) / n - 0.632) < 0.01


def test_a_thousand_million_take_no_time():
    start = time.perf_counter()
    assert len(Permutation(10**9, [0, 0])(5 * 10**8, 5 * 10**8 + 1024)) == 1024
    assert time.perf_counter() - start < 1
