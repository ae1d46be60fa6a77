"""fastgpt tokenizer show, as a user runs it."""

import io
import sys

import pytest

from fastgpt import Tokenizer


@pytest.fixture
def tok(tokenizer_dir):
    return Tokenizer.from_pretrained(tokenizer_dir)


@pytest.fixture
def typed(monkeypatch):
    """Gives bytes on standard input."""
    return lambda content: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_tokens_ids_and_counts(cli, tok, tokenizer_dir):
    text = "Ada sees\nthe sea."
    ids = tok.encode(text)
    for args in ([text, "--tokenizer", tokenizer_dir], ["--tokenizer", tokenizer_dir, text]):
        code, out, err = cli("tokenizer", "show", *args)
        assert code == 0, err
        *tokens, numbers, counts = out.splitlines()
        assert "".join(tokens).replace("│", "").replace("·", " ").replace("⏎", "\n") == text
        assert sum(line.count("│") for line in tokens) == len(ids) - len(tokens)  # none at a line's end
        assert numbers == " ".join(map(str, ids))
        assert counts.startswith(f"{len(ids)} tokens, 17 characters, 17 bytes, 6 words; ")


def test_colours_only_where_they_are_wanted(cli, tokenizer_dir, monkeypatch):
    show = ("tokenizer", "show", "Ada sees", "--tokenizer", tokenizer_dir)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b[" in cli(*show)[1]
    assert "│" not in cli(*show)[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "│" in cli(*show)[1]
    assert "\x1b[30;106m" not in cli(*show)[1]


def test_long_texts_show_a_head_and_all_counts(cli, tok, tokenizer_dir, corpus, typed):
    path = next(corpus.iterdir())
    ids = tok.encode(path.read_text())
    code, out, err = cli("tokenizer", "show", "--file", path, "--tokenizer", tokenizer_dir)
    assert code == 0, err
    assert f"... and {len(ids) - 256:,} tokens more" in out
    assert f"{len(ids):,} tokens" in out
    assert "most frequent" in out
    typed(path.read_bytes())
    assert cli("tokenizer", "show", "-", "--tokenizer", tokenizer_dir)[1] == out


def test_tokenizers_side_by_side(cli, tokenizer_dir, tmp_path):
    text = "Ada sees the sea."
    Tokenizer.train([text], vocab_size=257).save_pretrained(tmp_path)
    code, out, err = cli("tokenizer", "show", text, "--tokenizer", tmp_path, tokenizer_dir)
    assert code == 0, err
    ids = Tokenizer.from_pretrained(tokenizer_dir).encode(text)
    rows = [line.split("│")[2:-1] for line in out.splitlines() if line.count("│") == 7]
    numbers = [[cell.strip() for cell in row] for row in rows if row[0].strip()]
    assert numbers == [
        ["257", "5", "17", "1.00", "1.000"],
        ["290", "5", str(len(ids)), f"{17 / len(ids):.2f}", f"{len(ids) / 17:.3f}"],
    ]
    first, second = out.index(f"\n{tmp_path}\n"), out.index(f"\n{tokenizer_dir}\n")
    assert first < out.index("A│d│a│·│s│e│e│s") < second < out.index(" ".join(map(str, ids)))


def test_bad_input_gives_one_line(refused, tokenizer_dir, tmp_path, typed):
    show = ("tokenizer", "show", "--tokenizer", tokenizer_dir)
    assert "give one text" in refused(*show)
    assert "give one text" in refused("tokenizer", "show", "text", "--tokenizer", tokenizer_dir, "--file", "x")
    assert "name at least one --tokenizer" in refused("tokenizer", "show", "text", "--tokenizer")
    assert "cannot be read" in refused(*show, "--file", tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert "no UTF-8 text" in refused(*show, "--file", tmp_path / "latin.txt")
    typed(b"caf\xe9")
    assert "standard input is no UTF-8 text from byte 3 on" in refused(*show, "-")
    assert "no tokenizer at" in refused("tokenizer", "show", "text", "--tokenizer", tokenizer_dir, tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"model": {"type": "WordPiece", "vocab": {}}}', "type is 'WordPiece'"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}', "pre_tokenizer is 'none'"),
        (b'{"model": ', "is damaged: it is no JSON"),
        (b"\xff\xfe", "no UTF-8 text from byte 0 on"),
    ],
)
def test_what_is_no_byte_level_bpe_is_named(refused, tmp_path, content, words):
    from fastgpt import GPT, GPTConfig

    GPT(GPTConfig.preset("micro", vocab_size=300)).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(content)
    for command in (["tokenizer", "show", "text", "--tokenizer", tmp_path], ["generate", "--model", tmp_path]):
        line = refused(*command)
        assert words in line
        assert str(tmp_path / "tokenizer.json") in line
