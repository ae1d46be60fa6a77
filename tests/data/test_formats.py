"""Reading of compressed, columnar and huge input, standard input and datasets; and where texts are cut."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import regex
import zstandard
from corpora import texts
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastgpt import Tokenizer
from fastgpt.data import Corpus, read, read_pieces
from fastgpt.data.documents import Skipped
from fastgpt.errors import UserError
from fastgpt.tokenizer import CL100K_PATTERN, GPT2_PATTERN


def corpus_of(*paths, **options):
    return Corpus(input=tuple(map(str, paths)), **options)


def texts_of(*paths, **options):
    return [d.text for d in read_pieces(corpus_of(*paths, **options))]


def refused(words, *paths, **options):
    """What is wrong is one line, which says how to pass over it."""
    with pytest.raises(UserError, match=words) as caught:
        texts_of(*paths, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def skipping(*paths, **options):
    skipped = Skipped()
    found = [d.text for d in read_pieces(corpus_of(*paths, skip_bad=True, **options), skipped=skipped)]
    return found, skipped


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress], ids=["gz", "zst"])
def test_compressed_files_of_several_parts_and_damaged_ones(tmp_path, pack, monkeypatch):
    monkeypatch.setattr(read, "BATCH_BYTES", 2000)
    suffix = "gz" if pack is gzip.compress else "zst"
    found = texts(200)
    raw = "".join(json.dumps({"text": t}) + "\n" for t in found).encode()
    path = tmp_path / f"x.jsonl.{suffix}"
    path.write_bytes(pack(raw[:5000]) + pack(raw[5000:]))
    assert texts_of(path) == found
    path.write_bytes((pack(raw[:5000]) + pack(raw[5000:]))[:-30])
    words = rf"x.jsonl.{suffix} is damaged: .* \(of .*, (\d+) lines could be read\)"
    line = refused(words, path)
    assert "--skip-bad" in line
    before, skipped = skipping(path)
    assert len(before) == int(regex.search(words, line).group(1)) > 10
    assert before == found[: len(before)]
    assert skipped.count == 1
    path.write_bytes(b"nothing of the kind")
    refused(rf"x.jsonl.{suffix} is damaged: ", path)


def test_parquet(tmp_path):
    found = texts(500)
    table = pyarrow.table({"text": pyarrow.array(found, pyarrow.large_string()), "n": range(500)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=120)
    words = pyarrow.array(["one", None, "", "two"]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": words}), tmp_path / "b.parquet")
    assert texts_of(tmp_path) == [*found, "one", "two"]
    refused(
        r"a.parquet has no column 'body' \(it has 'text', 'n'\): name it with --text-key", tmp_path, text_key="body"
    )
    refused(r"a.parquet has no text in the column 'n' \(it has int64\)", tmp_path, text_key="n")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 is not enough")
    refused("a.parquet is damaged: ", tmp_path)
    assert skipping(tmp_path)[0] == ["one", "two"]


def test_a_name_that_does_not_tell_needs_the_format(tmp_path):
    (tmp_path / "data.log").write_text('{"text": "one"}\n')
    assert texts_of(tmp_path / "data.log") == ['{"text": "one"}\n']
    assert texts_of(tmp_path / "data.log", format="jsonl") == ["one"]


@pytest.mark.parametrize(("package", "name"), [("zstandard", "a.txt.zst"), ("pyarrow", "a.parquet")])
def test_a_missing_package_is_named_even_when_skipping(tmp_path, monkeypatch, package, name):
    (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, package, None)
    for skip_bad in (False, True):
        refused(rf"needs {package}: pip install 'fastgpt\[data\]'", tmp_path, skip_bad=skip_bad)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs datasets: pip install 'fastgpt\[datasets\]'"):
        list(read_pieces(Corpus(dataset="name")))


def test_what_to_read_must_be_clear(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    for corpus in (Corpus(), Corpus(input=("a",), dataset="b")):
        with pytest.raises(UserError, match="either --input or --dataset"):
            list(read_pieces(corpus))
    refused("standard input does not tell what it is: add --format", "-")
    refused("standard input is read alone", "-", tmp_path, format="text")


def test_standard_input():
    code = """
from fastgpt.data import Corpus, read_pieces
print([d.text for d in read_pieces(Corpus(input=("-",), format="jsonl"))])
"""
    lines = "".join(json.dumps({"text": t}) + "\n" for t in texts(5000))
    done = subprocess.run(
        [sys.executable, "-c", code], input=lines, capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout == f"{texts(5000)}\n", done.stderr
    done = subprocess.run(
        [sys.executable, "-c", code], input="{}", capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert "standard input:1 has no text in a field 'text'" in done.stderr


def test_a_dataset_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    pytest.importorskip("datasets")
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": t, "n": 1}) + "\n" for t in texts(600)))
    (folder / "test.jsonl").write_text('{"text": "tested", "n": 1}\n')
    assert [d.text for d in read_pieces(Corpus(dataset=str(folder)))] == texts(600)
    assert [d.text for d in read_pieces(Corpus(dataset=str(folder), dataset_split="test"))] == ["tested"]
    for options, words in (
        ({"text_key": "body"}, r"has no column 'body' \(it has 'text', 'n'\)"),
        ({"text_key": "n"}, r"has no text in the column 'n' \(it has int\)"),
        ({"dataset_split": "dev"}, r"cannot be read: .*dev"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            list(read_pieces(Corpus(dataset=str(folder), **options)))
        assert "\n" not in str(caught.value)


def test_odd_bytes_in_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "a\\u0000b"}\r\n{"text": "\\ud800"}\n\xef\xbb\xbf{"text": "caf\xc3\xa9"}\n{"text": "\xe9"}\n'
    )
    found, skipped = skipping(path)
    assert found == ["a\0b", "\ud800", "café"]
    assert skipped.first.endswith("a.jsonl:4 is no UTF-8 text: byte 10 is 0xe9")
    path.write_bytes(b'{"text": null}\n{"text": "one"}\n{"text": 5}')
    found, skipped = skipping(path)
    assert found == ["one"]
    assert skipped.first.endswith("a.jsonl:3 has no text in its field 'text', but int")
    path.write_bytes(b"[" * 100_000)
    refused("a.jsonl:1 is no JSON", path)


def test_a_line_without_an_end_is_refused_and_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "BATCH_BYTES", 100)
    monkeypatch.setattr(read, "LINE_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "' + "x" * 50_000 + '"}\n{"text": "two"}\n' + "\n" * 300 + "{}")
    refused("a.jsonl:2 is longer than 1,000 bytes", path)
    found, skipped = skipping(path)
    assert found == ["one", "two"]
    assert skipped.count == 2
    path.write_text('{"text": "one"}\n{}\n' + "x" * 5000)
    assert skipping(path)[1].count == 2


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.txt").write_text("y")
    real = Path.open

    def fail(self, *args, **options):
        if self.name == "a.txt":
            raise PermissionError(13, "Permission denied")
        return real(self, *args, **options)

    monkeypatch.setattr(Path, "open", fail)
    refused("a.txt cannot be read: Permission denied", tmp_path)
    assert skipping(tmp_path)[0] == ["y"]


# Where a text is cut

CHARACTERS = st.sampled_from("aZ ſé'sTlLd1٣½.,!-\n\r\t\v\u00a0\u2028\u3000日本ァ。，、ักü€𝄞🙂\u0301_\x1c\ufeff")
TEXTS = st.text(CHARACTERS, min_size=1, max_size=80)


@given(TEXTS)
@example("don't stop")
@example("a  b")
@settings(max_examples=1000, deadline=None)
def test_no_split_pattern_sees_the_cut(text):
    raw = bytearray(text.encode())
    cut = read._cut(raw, 0)
    left, right = raw[:cut].decode(), raw[cut:].decode()
    for pattern in (GPT2_PATTERN, CL100K_PATTERN):
        assert regex.findall(pattern, text) == regex.findall(pattern, left) + regex.findall(pattern, right)


@given(st.lists(TEXTS, min_size=1, max_size=8).map("".join), st.integers(8, 40))
@settings(max_examples=150, deadline=None)
def test_pieces_have_the_ids_of_the_whole(tmp_path_factory, text, batch_bytes):
    tokenizer = _tokenizer()
    text = text.lstrip("\ufeff") + " end"
    path = tmp_path_factory.mktemp("t") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read, "BATCH_BYTES", batch_bytes)
        patch.setattr(read, "TEXT_BYTES", 1000)
        pieces = texts_of(path)
    assert "".join(pieces) == text
    ids, lengths = tokenizer.encode_to_numpy(pieces)
    assert ids.tolist() == tokenizer.encode(text)
    assert lengths.tolist() == [len(tokenizer.encode(piece)) for piece in pieces]


_made: list[Tokenizer] = []


def _tokenizer():
    if not _made:
        _made.append(Tokenizer.train(texts(200), vocab_size=300))
    return _made[0]


def test_long_texts_come_in_pieces_in_either_script(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "BATCH_BYTES", 1000)
    for text in ("some words, " * 1000, "日本語、中文。" * 1000):
        (tmp_path / "a.txt").write_text(text)
        pieces = texts_of(tmp_path)
        assert "".join(pieces) == text
        assert 8 < len(pieces) < 60
        assert max(len(p.encode()) for p in pieces) < 2000


def test_surrogates_become_what_tiktoken_makes_of_them():
    tokenizer = _tokenizer()
    for text in ("a\ud800b", "\ud83d\ude00", "\udfff\ud800"):
        ids, _ = tokenizer.encode_to_numpy([text])
        assert ids.tolist() == tokenizer.encode(text)
    assert tokenizer.encode_to_numpy([])[0].tolist() == []
