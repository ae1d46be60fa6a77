import gzip
import json
import re

import pytest

from fastgpt.data import Corpus, find_files, read_pieces
from fastgpt.data.documents import Skipped
from fastgpt.errors import UserError


@pytest.fixture
def tree(tmp_path):
    for name, content in {
        "b.txt": "bee",
        "a.txt": "a\r\nline\r\n",
        "code.py": "x = 1\n",
        "sub/c.txt": "sea",
        "sub/deep/d.txt": "dee",
        "tests/t.txt": "no",
        "site-packages/p.txt": "no",
        "__pycache__/q.txt": "no",
        ".hidden/r.txt": "no",
        ".s.txt": "no",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(content.encode())
    return tmp_path


def names(root, **options):
    return [str(p.relative_to(root)) for p in find_files([root], **options)]


def test_folders_are_read_in_order_without_caches_and_hidden_files(tree):
    assert names(tree) == ["a.txt", "b.txt", "code.py", "sub/c.txt", "sub/deep/d.txt", "tests/t.txt"]
    assert names(tree, include="*.py") == ["code.py"]
    assert names(tree, include="*.txt, *.py", exclude="tests,deep") == ["a.txt", "b.txt", "code.py", "sub/c.txt"]


def test_files_and_globs_are_taken_as_named(tree):
    assert find_files([tree / ".s.txt", tree / "b.txt"]) == [tree / ".s.txt", tree / "b.txt"]
    assert find_files([f"{tree}/*.txt", tree / "a.txt"]) == [tree / "a.txt", tree / "b.txt"]
    (tree / "odd[1].txt").write_text("x")
    assert find_files([tree / "odd[1].txt"]) == [tree / "odd[1].txt"]


def test_text_is_read_as_it_is(tree):
    documents = list(read_pieces([tree / "a.txt", tree / "b.txt"]))
    assert [d.text for d in documents] == ["a\r\nline\r\n", "bee"]
    assert documents[0].name == str(tree / "a.txt")


def test_jsonl_and_gzip(tmp_path):
    lines = b'{"text": "one", "n": 1}\n\n{"text": "two\\nlines"}\n{"text": ""}'
    (tmp_path / "x.jsonl").write_bytes(lines)
    with gzip.open(tmp_path / "y.jsonl.gz", "wb") as file:
        file.write(json.dumps({"body": "three"}).encode())
    with gzip.open(tmp_path / "z.txt.gz", "wb") as file:
        file.write("vier ü".encode())
    assert [(d.name, d.text) for d in read_pieces([tmp_path / "x.jsonl"])] == [
        (f"{tmp_path}/x.jsonl:1", "one"),
        (f"{tmp_path}/x.jsonl:3", "two\nlines"),
    ]
    corpus = Corpus(input=(f"{tmp_path}/y.jsonl.gz",), text_key="body")
    assert [d.text for d in read_pieces(corpus)] == ["three"]
    assert [d.text for d in read_pieces([tmp_path / "z.txt.gz"])] == ["vier ü"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert [d.text for d in read_pieces([tmp_path])] == ["hello"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"good \xff bad", r"a.txt is no UTF-8 text: byte 5 is 0xff"),
        ("a.txt", b"\x7fELF\x00\x00", r"a.txt is binary, not text: it has a zero at byte 4"),
        ("a.jsonl", b'{"text": "x"}\n{"tex', r"a.jsonl:2 is no JSON"),
        ("a.jsonl", b'{"body": "x"}', r"a.jsonl:1 has no text in a field 'text' \(it has 'body'\): name .* --text-key"),
        ("a.jsonl", b"[1]", r"a.jsonl:1 has no text in a field 'text' \(it has list\)"),
        ("a.txt.gz", b"no gzip", r"a.txt.gz is damaged"),
        ("a.txt.gz", gzip.compress(b"hello" * 100, mtime=0)[:-9], r"a.txt.gz is damaged"),
    ],
)
def test_bad_files_are_named_or_skipped(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "good.txt").write_text("good")
    with pytest.raises(UserError, match=words + ".*--skip-bad"):
        list(read_pieces([tmp_path]))
    skipped = Skipped()
    texts = [d.text for d in read_pieces(Corpus(input=(str(tmp_path),), skip_bad=True), skipped=skipped)]
    assert texts[-1] == "good"
    assert skipped.count == 1
    assert re.search(words, skipped.first)


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match=r"no such file or folder: .*/missing"):
        list(read_pieces([tmp_path / "missing"]))
    with pytest.raises(UserError, match=r"no file matches '\*.py'"):
        list(read_pieces(Corpus(input=(str(tmp_path),), include="*.py")))
