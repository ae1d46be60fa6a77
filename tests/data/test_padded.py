import json

import numpy as np
import pytest
import torch

from fastgpt.data import DocumentDataset, TokenDataset
from fastgpt.data.padded import SORTED_TOGETHER
from fastgpt.errors import UserError

EOT = 299


@pytest.fixture
def data(tmp_path):
    """500 documents of up to 60 tokens, most of them short; some are empty. Each ends with the end-of-text."""
    rng = np.random.default_rng(0)
    lengths = (60 * rng.random(500) ** 3).astype(int)
    tokens = np.concatenate([[*rng.integers(0, EOT, n), EOT] for n in lengths])
    tokens.astype("<u2").tofile(tmp_path / "train_00000.bin")
    starts = np.append(0, (lengths + 1).cumsum()[:-1])
    starts.astype("<u8").tofile(tmp_path / "train_documents.bin")
    meta = {"format": "fastgpt-shards-1", "dtype": "uint16", "vocab_size": 300}
    shards = [{"file": "train_00000.bin", "tokens": len(tokens)}]
    meta["splits"] = {"train": {"documents": 500, "tokens": len(tokens), "shards": shards}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    return TokenDataset.open(tmp_path, "train")


def documents(data):
    """Those of more than the end-of-text, by a search for it."""
    tokens = data.tokens(0, len(data)).tolist()
    ends = [i for i, token in enumerate(tokens) if token == EOT]
    found = [tokens[a:b] for a, b in zip([0, *[e + 1 for e in ends]], [e + 1 for e in ends], strict=False)]
    return [ids for ids in found if len(ids) > 1]


def epoch(data):
    """Each row's ids and targets, without the padding; and the batches."""
    batches = []
    while not batches or data.position < len(data._batches):
        batches.append(data.next_batch())
    rows = []
    for ids, targets, mask in batches:
        assert ids.dtype == targets.dtype == torch.int64
        assert ids.shape == targets.shape == mask.shape
        assert mask[:, 0].all()
        assert mask.sum(1).max() == ids.size(1)
        assert (mask.int().diff(dim=1) <= 0).all()  # filled on the right
        assert (ids[~mask] == data.pad_id).all()
        assert (targets[~mask] == -100).all()
        rows += [(i[m].tolist(), t[m].tolist()) for i, t, m in zip(ids, targets, mask, strict=True)]
    return rows, batches


def test_every_document_is_a_row_once_an_epoch_in_another_order_each(data):
    loader = DocumentDataset(data, 8, 100, seed=0, pad_id=7)
    first, _ = epoch(loader)
    expected = [(ids[:-1], ids[1:]) for ids in documents(data)]
    assert sorted(first) == sorted(expected)
    second, _ = epoch(loader)
    assert loader.epoch == 1
    assert sorted(second) == sorted(first)
    assert second != first


@pytest.mark.parametrize("too_long", ["cut", "split"])
def test_long_documents_are_cut_or_split(data, too_long):
    rows, _ = epoch(DocumentDataset(data, 8, 16, seed=0, too_long=too_long))
    expected = []
    for ids in documents(data):
        pieces = [(ids[i : i + 17][:-1], ids[i + 1 : i + 17]) for i in range(0, len(ids) - 1, 16)]
        expected += pieces if too_long == "split" else pieces[:1]
    assert sorted(rows) == sorted(expected)


def test_little_is_padding(data):
    loader = DocumentDataset(data, 8, 100, seed=0)
    share = loader.padding()
    _, batches = epoch(loader)
    padded = sum((~mask).sum().item() for *_, mask in batches) / sum(mask.numel() for *_, mask in batches)
    assert share == pytest.approx(padded)
    assert share < 0.1  # in the shuffled order it is over 0.5
    assert len(loader._batches) > SORTED_TOGETHER  # not all of them sorted together


def test_a_position_is_gone_on_from(data):
    whole = DocumentDataset(data, 8, 30, seed=3)
    for _ in range(70):  # into the second epoch
        whole.next_batch()
    resumed = DocumentDataset(data, 8, 30, seed=3)
    resumed.load_state_dict(whole.state_dict())
    for _ in range(60):
        assert all(torch.equal(a, b) for a, b in zip(resumed.next_batch(), whole.next_batch(), strict=True))
    for other in (
        DocumentDataset(data, 8, 30, seed=4),
        DocumentDataset(data, 4, 30, seed=3),
        DocumentDataset(data, 8, 31, seed=3),
        DocumentDataset(data, 8, 30, seed=3, too_long="split"),
    ):
        with pytest.raises(UserError, match="position is of other data"):
            other.load_state_dict(whole.state_dict())


def test_a_padded_rows_loss_is_that_of_its_document_alone(data):
    from fastgpt import GPT, GPTConfig

    model = GPT(GPTConfig(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=2)).eval()
    ids, targets, mask = DocumentDataset(data, 8, 60, seed=0).next_batch()
    losses = model.loss(ids, targets, "none")
    assert not mask.all()
    for row, row_targets, loss, own in zip(ids, targets, losses, mask, strict=True):
        alone = model.loss(row[None, own], row_targets[None, own], "none")[0]
        torch.testing.assert_close(loss[own], alone, rtol=0, atol=1e-5)
        assert not loss[~own].any()


def test_wrong_sizes_are_refused(data):
    for sizes in ((0, 5), (5, 0)):
        with pytest.raises(UserError, match="batch_size and max_length must be at least 1"):
            DocumentDataset(data, *sizes, seed=0)
