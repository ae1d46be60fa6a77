import numpy as np
import pytest
import torch

from fastgpt.data import PackedDataset, TokenDataset
from fastgpt.errors import UserError


class Counting(TokenDataset):
    """Tokens 0, 1, 2, ...: a window tells by itself where it is from."""

    def __init__(self, tokens, vocab_size=10**6):
        self.count, self.meta, self.split, self.folder = tokens, {"vocab_size": vocab_size}, "train", "here"

    def __len__(self):
        return self.count

    def tokens(self, start, stop):
        assert 0 <= start <= stop <= self.count
        return np.arange(start, stop, dtype=np.uint32)

    def file_of(self, position):
        return f"shard_of_{position}"


def test_targets_are_the_inputs_one_later():
    x, y = PackedDataset(Counting(100), 7, seed=0).next_batch(5)
    assert x.shape == y.shape == (5, 7)
    assert x.dtype == y.dtype == torch.int64
    assert torch.equal(y, x + 1)


def test_an_epoch_takes_every_window_once_and_the_next_in_another_order():
    data = PackedDataset(Counting(71), 7, seed=0)  # 10 windows
    firsts = torch.cat([data.next_batch(4)[0][:, 0] for _ in range(5)]).tolist()  # two epochs
    assert sorted(firsts[:10]) == sorted(firsts[10:]) == list(range(0, 70, 7))
    assert firsts[:10] != firsts[10:]
    assert firsts[:10] != sorted(firsts[:10])


def test_seeds_decide_the_order():
    def order(seed):
        return PackedDataset(Counting(1000), 7, seed=seed).next_batch(50)[0][:, 0].tolist()

    assert order(1) == order(1)
    assert order(1) != order(2)


@pytest.mark.parametrize("taken", [0, 1, 3, 7, 10, 25])
def test_a_position_is_gone_on_from(taken):
    whole, cut = (PackedDataset(Counting(71), 7, seed=3) for _ in range(2))
    for _ in range(taken):
        whole.next_batch(3)
        cut.next_batch(3)
    resumed = PackedDataset(Counting(71), 7, seed=3)
    resumed.load_state_dict(cut.state_dict())
    for _ in range(8):
        assert torch.equal(resumed.next_batch(3)[0], whole.next_batch(3)[0])


def test_a_position_of_other_data_is_refused():
    state = PackedDataset(Counting(71), 7, seed=0).state_dict()
    for other in (
        PackedDataset(Counting(71), 6, seed=0),
        PackedDataset(Counting(100), 7, seed=0),
        PackedDataset(Counting(71), 7, seed=1),
    ):
        with pytest.raises(UserError, match="position is of other data"):
            other.load_state_dict(state)


def test_sequential_batches_are_the_text_in_order_each_time():
    data = PackedDataset(Counting(72), 7, seed=0)
    data.next_batch(3)
    before = data.state_dict()
    for _ in range(2):
        batches = list(data.sequential_batches(4))
        assert [len(x) for x, _ in batches] == [4, 4, 2]
        assert torch.cat([x for x, _ in batches]).flatten().tolist() == list(range(70))
    some = torch.cat([x[:, 0] for x, _ in data.sequential_batches(3, max_batches=2)]).tolist()
    assert some == [0, 7, 21, 35, 42, 56]  # 6 of the 10 windows, spread evenly
    assert len(list(data.sequential_batches(4, max_batches=100))) == 3
    assert data.state_dict() == before


def test_too_short_for_a_window():
    assert PackedDataset(Counting(8), 7, seed=0).windows == 1
    with pytest.raises(UserError, match=r"has 7 tokens, fewer than one window of 8: .*smaller --block-size"):
        PackedDataset(Counting(7), 7, seed=0)


def test_an_id_beyond_the_vocabulary_names_its_shard():
    data = PackedDataset(Counting(100, vocab_size=50), 7, seed=0)
    with pytest.raises(UserError, match=r"shard shard_of_\d+ holds the id 98, but its vocabulary has 50"):
        data.next_batch(data.windows)
