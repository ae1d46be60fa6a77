import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt import Tokenizer
from fastgpt.data import Corpus, Document, TokenDataset, prepare, read_pieces
from fastgpt.data.shards import Writer
from fastgpt.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return Tokenizer.from_pretrained(tokenizer_dir)


@pytest.fixture(autouse=True, scope="module")
def without_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastgpt.files.fsync", lambda path: None)
        yield


def documents(texts):
    return [Document(f"doc {i}", text) for i, text in enumerate(texts)]


def texts_of(folder, split, tokenizer):
    data = TokenDataset.open(folder, split)
    starts = [*data.document_starts.tolist(), len(data)]
    found = []
    for a, b in pairwise(starts):
        ids = data.tokens(a, b).tolist()
        assert ids[-1] == tokenizer.eot_id
        found.append(tokenizer.decode(ids[:-1]))
    return found


def test_every_document_comes_back_from_one_split(shards, corpus, tokenizer):
    meta = json.loads((shards / "meta.json").read_text())
    train, val = (texts_of(shards, split, tokenizer) for split in ("train", "val"))
    assert sorted(train + val) == sorted(d.text for d in read_pieces([corpus]))
    assert train
    assert val
    for split, found in (("train", train), ("val", val)):
        part = meta["splits"][split]
        assert part["documents"] == len(found)
        assert part["bytes"] == sum(len(t.encode()) for t in found)
    assert meta["tokenizer_hash"] == tokenizer.hash == Tokenizer.from_pretrained(shards).hash
    assert meta["dtype"] == "uint16"


def test_the_files_are_flat_little_endian(shards):
    data = TokenDataset.open(shards, "train")
    raw = np.frombuffer((shards / "train_00000.bin").read_bytes(), "<u2")
    assert np.array_equal(data.tokens(0, len(data)), raw)


@given(st.lists(st.text("ab \n", min_size=1, max_size=20), min_size=2, max_size=12), st.integers(1, 9))
@settings(max_examples=25, deadline=None)
def test_shards_of_any_size_hold_the_same_tokens(tokenizer, tmp_path_factory, texts, shard_tokens):
    folder = tmp_path_factory.mktemp("s")
    prepare(documents(texts), tokenizer, folder / "cut", shard_tokens=shard_tokens)
    prepare(documents(texts), tokenizer, folder / "whole")
    for split in ("train", "val"):
        cut, whole = TokenDataset.open(folder / "cut", split), TokenDataset.open(folder / "whole", split)
        assert len(cut) == len(whole)
        assert all(Path(folder / "cut" / f).stat().st_size <= 2 * shard_tokens for f in cut.files)
        for a in range(0, len(cut), 3):
            b = min(len(cut), a + 7)
            assert np.array_equal(cut.tokens(a, b), whole.tokens(a, b))
            assert cut.file_of(a).name == f"{split}_{a // shard_tokens:05d}.bin"


@given(st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=12), st.data())
@settings(max_examples=30, deadline=None)
def test_a_writer_cut_back_goes_on_as_if_nothing_had_been(tmp_path_factory, batches, data):
    """Each batch is documents of these many tokens."""
    folder = tmp_path_factory.mktemp("w")
    direct, cut = (Writer(folder, split, np.dtype("<u2"), 7) for split in ("train", "val"))
    rng = np.random.default_rng(0)

    def add(writer, lengths, tokens):
        writer.add(tokens, np.array(lengths, np.int64), 2 * len(tokens))

    for lengths in batches:
        if data.draw(st.booleans()):
            before = replace(cut.written)
            add(cut, [9, 4], np.zeros(13, "<u2"))
            assert cut.cut(before)
        tokens = rng.integers(0, 1000, sum(lengths)).astype("<u2")
        add(direct, lengths, tokens)
        add(cut, lengths, tokens)
        cut.sync()
    assert cut.written == direct.written
    assert np.array_equal(cut.read(0, cut.written.tokens), direct.read(0, direct.written.tokens))
    direct.close()
    assert not cut.cut(replace(cut.written, documents=cut.written.documents + 1))
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.stat().st_size}
    for name in files:
        assert files[name] == files[name.replace("val", "train")]


def test_large_vocabularies_take_32_bits(tmp_path):
    vocab = {bytes([b]): b for b in range(256)}
    big = Tokenizer(vocab, [], {"<|endoftext|>": 70_000})
    meta = prepare(documents(["one", "two"]), big, tmp_path / "out")
    assert meta["dtype"] == "uint32"
    data = TokenDataset.open(tmp_path / "out", "train")
    assert data.tokens(len(data) - 1, len(data)).tolist() == [70_000]


def test_the_same_input_and_seed_give_the_same_bytes(corpus, tokenizer, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        prepare(Corpus(input=(str(corpus),)), tokenizer, tmp_path / name, seed=seed, val_fraction=0.3)
    content = {n: [p.read_bytes() for p in sorted((tmp_path / n).iterdir())] for n in "abc"}
    assert content["a"] == content["b"]
    assert texts_of(tmp_path / "a", "val", tokenizer) != texts_of(tmp_path / "c", "val", tokenizer)


def test_more_documents_move_none_across(tokenizer, tmp_path):
    texts = [f"document number {i}\n" for i in range(400)]
    prepare(documents(texts[:200]), tokenizer, tmp_path / "few", val_fraction=0.1)
    prepare(documents(texts), tokenizer, tmp_path / "many", val_fraction=0.1)
    few, many = (set(texts_of(tmp_path / n, "val", tokenizer)) for n in ("few", "many"))
    assert few < many
    assert 20 < len(many) < 65  # 40 expected


@pytest.mark.parametrize("val_fraction", [1e-9, 0.5, 1 - 1e-9])
def test_small_corpora_leave_no_split_empty(tokenizer, tmp_path, val_fraction):
    prepare(documents(["one", "two", "three"]), tokenizer, tmp_path / "out", val_fraction=val_fraction)
    train, val = (texts_of(tmp_path / "out", split, tokenizer) for split in ("train", "val"))
    assert sorted(train + val) == ["one", "three", "two"]
    assert train
    assert val


def test_of_one_document_the_end_is_for_validation(tokenizer, tmp_path):
    text = "".join(f"line {i}\n" for i in range(1000))
    prepare(documents([text]), tokenizer, tmp_path / "out", val_fraction=0.1)
    (train,), (val,) = (texts_of(tmp_path / "out", split, tokenizer) for split in ("train", "val"))
    assert train + val == text
    assert train.endswith("\n")
    assert 0.09 < len(val) / len(text) < 0.12


@pytest.mark.parametrize(
    ("texts", "options", "words"),
    [
        ([], {}, "the corpus is empty"),
        (["x"], {}, "a single token"),
        (["one", "two"], {"val_fraction": 0.0}, "--val-fraction must be above 0"),
        (["one", "two"], {"seed": -1}, "--seed must be"),
        (["one", "two"], {"shard_tokens": 0}, "--shard-tokens must be"),
    ],
)
def test_what_cannot_be_prepared_leaves_nothing(tokenizer, tmp_path, texts, options, words):
    with pytest.raises(UserError, match=words):
        prepare(documents(texts), tokenizer, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_without_an_end_of_text(tmp_path):
    plain = Tokenizer.train(["text " * 9], vocab_size=257, special_tokens=())
    with pytest.raises(UserError, match="no end-of-text token"):
        prepare(documents(["one", "two"]), plain, tmp_path / "out")


@pytest.fixture
def own_shards(corpus, tokenizer, tmp_path):
    prepare(Corpus(input=(str(corpus),)), tokenizer, tmp_path / "data", val_fraction=0.2)
    return tmp_path / "data"


def test_damaged_folders_are_named(own_shards, tmp_path):
    def refused(words):
        with pytest.raises(UserError, match=words) as caught:
            TokenDataset.open(own_shards, "train")
        assert "prepare the data again" in str(caught.value)

    shard, meta = own_shards / "train_00000.bin", own_shards / "meta.json"
    content, text = shard.read_bytes(), meta.read_text()
    shard.write_bytes(content[:-2])
    refused(f"train_00000.bin has {len(content) - 2:,} bytes, meta.json says {len(content):,}")
    shard.unlink()
    refused("train_00000.bin is missing")
    shard.write_bytes(content)
    for broken in ("{", "[]", "{}", text.replace("uint16", "uint7")):
        meta.write_text(broken)
        refused("meta.json is damaged")
    meta.write_text(text.replace("fastgpt-shards-1", "fastgpt-shards-9"))
    refused("has the format 'fastgpt-shards-9'")
    meta.write_text(text)
    with pytest.raises(UserError, match="no split 'test': it has train, val"):
        TokenDataset.open(own_shards, "test")
    with pytest.raises(UserError, match=r"no token shards at .*/none: make them with"):
        TokenDataset.open(tmp_path / "none", "train")
    (own_shards / "train_documents.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"train_documents.bin has 0 bytes, meta.json says 64"):
        _ = TokenDataset.open(own_shards, "train").document_starts


def test_slices_outside_are_refused(shards):
    data = TokenDataset.open(shards, "val")
    assert data.tokens(5, 5).size == 0
    for a, b in ((-1, 3), (0, len(data) + 1), (4, 3)):
        with pytest.raises(IndexError):
            data.tokens(a, b)
