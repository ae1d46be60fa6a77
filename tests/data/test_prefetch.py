import threading
import time

import pytest

from fastgpt.data import Prefetched
from fastgpt.errors import UserError


class Numbers:
    """0, 1, 2, ..., but for those that are bad."""

    def __init__(self, bad=()):
        self.position, self.bad, self.threads = 0, bad, set()

    def next(self):
        self.threads.add(threading.current_thread())
        self.position += 1
        if self.position - 1 in self.bad:
            raise UserError(f"{self.position - 1} is bad")
        return self.position - 1

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


@pytest.fixture
def start():
    """Makes prefetched numbers; afterwards there is no thread more than before."""
    before = threading.active_count()
    made = []

    def make(bad=()):
        data = Numbers(bad)
        made.append(Prefetched(data.next, data))
        return data, made[-1]

    yield make
    for batches in made:
        batches.close()
    assert threading.active_count() == before


def wait_until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_batches_are_made_ahead_by_one_other_thread(start):
    data, batches = start()
    assert data.position == 0  # nothing before the first is asked for
    assert [batches.next_batch() for _ in range(5)] == list(range(5))
    wait_until(lambda: data.position == 5 + batches.AHEAD)
    time.sleep(0.01)
    assert data.position == 5 + batches.AHEAD  # and no more of them
    assert len(data.threads) == 1
    assert threading.current_thread() not in data.threads


def test_the_position_is_that_behind_the_batch_last_taken(start):
    data, batches = start()
    assert batches.state_dict() == {"position": 0}
    for n in range(1, 5):
        batches.next_batch()
        assert batches.state_dict() == {"position": n}
    batches.load_state_dict({"position": 20})
    assert batches.state_dict() == {"position": 20}
    assert [batches.next_batch() for _ in range(3)] == [20, 21, 22]
    batches.close()
    assert data.position == 23  # nothing is lost of what was made ahead
    assert batches.next_batch() == 23


def test_an_error_comes_out_once_where_its_batch_is_taken(start):
    data, batches = start(bad=(2,))
    assert [batches.next_batch() for _ in range(2)] == [0, 1]
    wait_until(lambda: data.position > 2)
    with pytest.raises(UserError, match="2 is bad"):
        batches.next_batch()
    assert batches.state_dict() == {"position": 2}
    assert [batches.next_batch() for _ in range(2)] == [3, 4]


def test_a_forgotten_one_leaves_no_thread():
    before = threading.active_count()
    data = Numbers()
    batches = Prefetched(data.next, data)
    batches.next_batch()
    assert threading.active_count() == before + 1
    del batches
    wait_until(lambda: threading.active_count() == before)
