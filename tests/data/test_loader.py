import json
import os
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastgpt import GPT, GPTConfig
from fastgpt.data import PackedDataset, TokenDataset, WindowDataset
from fastgpt.errors import UserError


class Counting(TokenDataset):
    """Tokens 0, 1, 2, ...: a window tells by itself where it is from."""

    def __init__(self, tokens, vocab_size=10**6, documents=(0,)):
        self.count, self.meta, self.split, self.folder = tokens, {"vocab_size": vocab_size}, "train", "here"
        self.documents = np.array(documents, np.uint64)

    def __len__(self):
        return self.count

    def windows(self, starts, length):
        assert all(0 <= start <= self.count - length for start in starts)
        return np.stack([np.arange(start, start + length, dtype=np.uint32) for start in starts])

    def tokens(self, start, stop):
        return self.windows([start], stop - start)[0]

    def file_of(self, position):
        return f"shard_of_{position}"

    @property
    def document_starts(self):
        return self.documents


@pytest.fixture
def folder(tmp_path):
    """Random tokens in two shards, of documents of 1 to 20."""
    rng = np.random.default_rng(0)
    starts = np.concatenate([[0], rng.integers(1, 21, 100).cumsum()])
    tokens = rng.integers(0, 300, int(starts[-1]) + 5)
    shards = []
    for i, part in enumerate((tokens[:600], tokens[600:])):
        part.astype("<u2").tofile(tmp_path / f"train_{i:05d}.bin")
        shards.append({"file": f"train_{i:05d}.bin", "tokens": len(part)})
    starts.astype("<u8").tofile(tmp_path / "train_documents.bin")
    meta = {"format": "fastgpt-shards-1", "dtype": "uint16", "vocab_size": 300}
    meta["splits"] = {"train": {"documents": len(starts), "tokens": len(tokens), "shards": shards}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    return tmp_path


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


@given(st.integers(1, 60), st.lists(st.tuples(st.sampled_from([1, 2, 3]), st.integers(1, 5)), min_size=1, max_size=8))
def test_ranks_share_an_epoch_and_another_number_of_them_goes_on_with_it(windows, parts):
    """By parts of a run: so many ranks, each of which takes that many batches."""

    def make(rank=0, ranks=1):
        return PackedDataset(Counting(7 * windows + 1), 7, seed=1, rank=rank, ranks=ranks)

    seen, state = [], make().state_dict()
    for ranks, batches in parts:
        group = [make(rank, ranks) for rank in range(ranks)]
        for data in group:
            data.load_state_dict(state)
        for _ in range(batches):
            seen += [window for data in group for window in data.next_windows(2)]
        (state,) = {tuple(data.state_dict().items()) for data in group}
        state = dict(state)
    assert seen == make().next_windows(len(seen))
    for epoch in range(state["epoch"]):
        assert sorted(w for e, w in seen if e == epoch) == list(range(windows))


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


def test_shards_are_read_across_their_ends(folder):
    data = TokenDataset.open(folder, "train")
    packed = PackedDataset(data, 40, seed=0)
    x, y = packed.batch(list(range(packed.windows)))
    whole = torch.from_numpy(data.tokens(0, len(data)).astype("int64"))
    assert torch.equal(x.flatten(), whole[: packed.windows * 40])
    assert torch.equal(y.flatten(), whole[1 : packed.windows * 40 + 1])


def test_a_shard_that_is_cut_short_meanwhile_ends_no_process(folder):
    data = PackedDataset(TokenDataset.open(folder, "train"), 40, seed=0)
    os.truncate(folder / "train_00001.bin", 100)
    data.batch([0, 13])  # in the other shard
    with pytest.raises(UserError, match=r"train_00001.bin was cut short while it was in use: prepare the data again"):
        data.batch([0, 14])


def test_document_boundaries_are_where_a_search_for_them_finds_them(folder):
    data = TokenDataset.open(folder, "train")
    packed = PackedDataset(data, 16, seed=0, document_masks=True)
    starts = set(data.document_starts.tolist())
    for _ in range(10):
        windows = [window for _, window in packed.next_windows(5)]
        *_, cu_seqlens = packed.batch(windows)
        expected = [
            row * 16 + i
            for row, window in enumerate(windows)
            for i in range(16)
            if i == 0 or 16 * window + i + 1 in starts
        ]
        assert cu_seqlens.dtype == torch.int32
        assert cu_seqlens.tolist() == [*expected, 5 * 16]


def test_with_document_masks_a_rows_loss_is_that_of_its_documents_alone(folder):
    data = TokenDataset.open(folder, "train")
    packed = PackedDataset(data, 40, seed=0, document_masks=True)
    model = GPT(GPTConfig(vocab_size=300, n_positions=40, n_embd=32, n_layer=2, n_head=2)).eval()
    ids, targets, cu_seqlens = packed.batch([3, 5])
    found = model.loss(ids, targets, "none", cu_seqlens).flatten()
    assert len(cu_seqlens) > 6
    for a, b in pairwise(cu_seqlens.tolist()):
        alone = model.loss(ids.flatten()[None, a:b], targets.flatten()[None, a:b], "none")[0]
        torch.testing.assert_close(found[a:b], alone, rtol=0, atol=1e-5)
    assert not torch.allclose(found, model.loss(ids, targets, "none").flatten(), atol=1e-3)


def test_documents_of_other_shards_are_refused(folder):
    path = folder / "train_documents.bin"
    starts = np.fromfile(path, "<u8")
    shuffled = starts.copy()
    shuffled[40:60] = starts[59:39:-1]
    for changed in (starts + np.uint64(1), np.append(starts[:-1], np.uint64(10**6)), shuffled):
        changed.tofile(path)
        data = PackedDataset(TokenDataset.open(folder, "train"), 40, seed=0, document_masks=True)
        with pytest.raises(UserError, match=r"train_documents.bin does not match the shards: prepare the data again"):
            data.next_batch(20)


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 25))
def test_windows_slide_by_their_stride(tokens, max_length, stride):
    ids = torch.arange(tokens)
    starts = range(0, tokens - max_length, stride)  # as the loop in a textbook has it
    if not starts:
        with pytest.raises(UserError, match="fewer than one window"):
            WindowDataset(ids, max_length, stride)
        return
    data = WindowDataset(ids, max_length, stride)
    assert [x[0].item() for x, _ in data] == list(starts)
    assert len(data) == len(starts)
    for x, y in data:
        assert x.shape == (max_length,)
        assert torch.equal(y, x + 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_windows_of_shards_in_a_data_loader(folder, workers):
    data = TokenDataset.open(folder, "train")
    loader = torch.utils.data.DataLoader(WindowDataset(data, 32, 16), batch_size=4, num_workers=workers)
    x, y = (torch.cat(parts) for parts in zip(*loader, strict=True))
    plain = WindowDataset(data.tokens(0, len(data)).tolist(), 32, 16)
    assert x.dtype == torch.int64
    assert torch.equal(x, torch.stack([a for a, _ in plain]))
    assert torch.equal(y, torch.stack([b for _, b in plain]))


def test_a_data_loaders_workers_map_the_shards_themselves(folder):
    """Where they are not forked, the data comes to them pickled."""
    data = WindowDataset(TokenDataset.open(folder, "train"), 32, 16)
    sent = pickle.dumps(data)
    assert len(sent) < 1000
    assert all(torch.equal(a, b) for a, b in zip(pickle.loads(sent)[5], data[5], strict=True))


def test_windows_outside_and_wrong_sizes_are_refused(folder):
    data = WindowDataset(list(range(20)), 4, 4)
    for i in (-1, len(data)):
        with pytest.raises(IndexError, match=f"window {i} of 4"):
            data[i]
    for sizes in ((0, 1), (1, 0)):
        with pytest.raises(UserError, match="max_length and stride must be at least 1"):
            WindowDataset([1, 2, 3], *sizes)
