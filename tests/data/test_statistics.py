import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt import Tokenizer
from fastgpt.data import Corpus, Document, prepare, statistics
from fastgpt.data.statistics import (
    Shards,
    count_tokens,
    document_lengths,
    document_window,
    draw_lengths,
    length_bars,
    window,
)
from fastgpt.errors import UserError


@pytest.fixture(scope="module")
def made(tokenizer_dir, tmp_path_factory):
    """Documents of many lengths in shards of 100 tokens, so that most windows cross some border."""
    out = tmp_path_factory.mktemp("made") / "data"
    texts = ["Ada sees the sea. " * (i * i % 23) + f"{i}.\n" for i in range(60)]
    tokenizer = Tokenizer.from_pretrained(tokenizer_dir)
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    prepare(documents, tokenizer, out, val_fraction=0.2, shard_tokens=100)
    return Shards.open(out)


def ids_by_document(data):
    ids = data.tokens(0, len(data)).tolist()
    return [ids[a:b] for a, b in pairwise([*data.document_starts.tolist(), len(data)])]


def test_opening_says_what_is_there(made):
    assert list(made.splits) == ["train", "val"]
    assert made.tokenizer.hash == made.meta["tokenizer_hash"]
    assert made.disk_bytes == sum(path.stat().st_size for path in made.folder.iterdir())
    with pytest.raises(UserError, match="no split 'test': it has train, val"):
        made.split("test")


@pytest.mark.parametrize("block", [1, 7, 2**20])
def test_lengths_are_the_documents(made, monkeypatch, block):
    monkeypatch.setattr(statistics, "BLOCK", block)
    data = made.split("train")
    expected = [len(ids) - 1 for ids in ids_by_document(data)]
    found = document_lengths(data)
    assert (found.documents, found.sampled) == (len(expected), len(expected))
    assert (found.shortest, found.longest) == (min(expected), max(expected))
    assert found.median == np.median(expected)
    assert found.mean == pytest.approx(np.mean(expected))
    assert found.counts == [sum(2**i <= n < 2 ** (i + 1) for n in expected) for i in range(max(expected).bit_length())]


def test_the_median_of_many_documents_is_of_a_sample(made, monkeypatch):
    data = made.split("train")
    expected = [len(ids) - 1 for ids in ids_by_document(data)]
    monkeypatch.setattr(statistics, "SAMPLED_LENGTHS", len(expected) // 3)
    for block in (1, 2, 5, 2**20):
        monkeypatch.setattr(statistics, "BLOCK", block)
        found = document_lengths(data)
        assert found.sampled <= len(expected) // 3
        assert found.median == np.median(expected[:: -(-len(expected) // (len(expected) // 3))])
        assert found.mean == pytest.approx(np.mean(expected))


def test_tokens_are_counted(made, monkeypatch):
    data = made.split("train")
    ids = data.tokens(0, len(data)).tolist()
    expected = Counter(ids)
    for block in (64, 2**20):
        monkeypatch.setattr(statistics, "BLOCK", block)
        found = count_tokens(data)
        assert found.tokens == len(ids)
        assert found.used == len(expected)
        assert dict(found.most_frequent(1000)) == expected
        assert [n for _, n in found.most_frequent(5)] == sorted(expected.values(), reverse=True)[:5]
    monkeypatch.setattr(statistics, "BLOCK", 10)
    monkeypatch.setattr(statistics, "TOKEN_BLOCKS", 3)
    found = count_tokens(data)
    assert (found.tokens, found.blocks) == (30, 3)
    every = -(-len(ids) // 10)
    places = [i * every // 3 * 10 for i in range(3)]
    assert dict(found.most_frequent(99)) == Counter(i for place in places for i in ids[place : place + 10])


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_window_is_the_documents_tokens(made, data):
    split = made.split(data.draw(st.sampled_from(["train", "val"])))
    at, length = data.draw(st.integers(0, len(split) - 1)), data.draw(st.integers(1, 300))
    parts = window(split, at, length)
    assert [i for part in parts for i in part.ids] == split.tokens(at, min(at + length, len(split))).tolist()
    documents = ids_by_document(split)
    for part in parts:
        whole = documents[part.document]
        assert part.ids == whole[part.offset : part.offset + len(part.ids)]
        assert part.length == len(whole)
    assert [part.document for part in parts] == list(range(parts[0].document, parts[-1].document + 1))


def test_a_documents_window_is_its_beginning(made):
    data = made.split("val")
    for i, ids in enumerate(ids_by_document(data)):
        (part,) = document_window(data, i, 50)
        assert (part.document, part.offset, part.ids) == (i, 0, ids[:50])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda data: window(data, -1, 5), "--at must be at least 0 and below"),
        (lambda data: window(data, len(data), 5), "--at must be at least 0 and below"),
        (lambda data: window(data, 0, 0), "--length must be at least 1"),
        (lambda data: document_window(data, -1, 5), "--document must be at least 0 and below"),
        (lambda data: document_window(data, 10**9, 5), "--document must be at least 0 and below"),
    ],
)
def test_what_is_not_there_is_refused(made, call, words):
    with pytest.raises(UserError, match=words):
        call(made.split("train"))


def test_the_bars_show_the_counts(made):
    lengths = document_lengths(made.split("train"))
    bars = length_bars(lengths, width=20)
    counts = lengths.counts[lengths.counts.index(next(filter(None, lengths.counts))) :]
    assert len(bars) == len(counts)
    longest = max(range(len(bars)), key=lambda i: bars[i].count("█"))
    assert counts[longest] == max(counts)
    assert bars[longest].count("█") == 20
    for bar, count in zip(bars, counts, strict=True):
        assert bar.partition("│")[2].split()[1:2] == ([f"{count:,}"] if count else [])


def test_the_picture_is_a_png_and_replaces_nothing(made, tmp_path):
    lengths = document_lengths(made.split("train"))
    draw_lengths(lengths, tmp_path / "lengths.png", "made")
    content = (tmp_path / "lengths.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    with pytest.raises(UserError, match="exists already"):
        draw_lengths(lengths, tmp_path / "lengths.png", "other")
    assert (tmp_path / "lengths.png").read_bytes() == content
    with pytest.raises(UserError, match=r"--out must end in .png"):
        draw_lengths(lengths, tmp_path / "lengths.jpg", "made")


@pytest.fixture
def own(corpus, tokenizer_dir, tmp_path):
    prepare(Corpus(input=(str(corpus),)), Tokenizer.from_pretrained(tokenizer_dir), tmp_path / "data", val_fraction=0.2)
    return tmp_path / "data"


def refused(folder):
    """What is said of a damaged folder, by whatever finds it."""

    def read_all():
        for data in Shards.open(folder).splits.values():
            document_lengths(data)
            count_tokens(data)

    with pytest.raises(UserError) as caught:
        read_all()
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_a_damaged_folder_is_named(own):
    Shards.open(own)
    starts = own / "val_documents.bin"
    whole = starts.read_bytes()
    starts.write_bytes(whole[::-1])
    assert "val_documents.bin does not match the shards" in refused(own)
    starts.write_bytes(whole)
    shard = own / "train_00000.bin"
    ids = np.fromfile(shard, "<u2")
    ids[7] = 60_000
    ids.tofile(shard)
    assert "train_00000.bin holds the id 60,000, but its vocabulary has 290" in refused(own)
    Tokenizer.train(["abc " * 10], vocab_size=257).save_pretrained(own)
    assert "is not the one that its shards were made with" in refused(own)
    (own / "tokenizer.json").unlink()
    assert "no tokenizer at" in refused(own)


def fields(value, path=()):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from fields(inner, (*path, key))


def test_any_field_of_meta_that_is_lost_or_wrong_is_named(own):
    path = own / "meta.json"
    text = path.read_text()
    for place in fields(json.loads(text)):
        if place[0] in ("seed", "val_fraction"):  # how it was made; nothing depends on it
            continue
        for value in ("lost", None, -1, "x", [], {}):
            meta = json.loads(text)
            *parents, key = place
            parent = meta
            for name in parents:
                parent = parent[name]
            parent[key] = value
            if value == "lost":
                del parent[key]
            path.write_text(json.dumps(meta))
            if (place, value) == (("splits", "val"), "lost"):
                assert list(Shards.open(own).splits) == ["train"]
            else:
                refused(own)
