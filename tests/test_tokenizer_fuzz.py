"""Any text and any bytes, through tokenizers of each kind: nothing is lost, nothing raises, nothing takes for ever."""

import time

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from two_files import write_two_files

from fastgpt import Tokenizer
from fastgpt.tokenizer import StreamDecoder

CORPUS = "It's  a test:\n\n\tna\u00efve \u6570\u5b66 \U0001f600\U0001f600 e\u0301 don't 123 \r\n" * 4
SPECIALS = ("<|endoftext|>", "<|end|>", "<|end|>\n", "<|", "\U0001f600|>")
# Surrogates too, which no file can hold; and what is hard: marks, joiners, directions, controls.
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=60) | st.text(
    "as 't\n\r\t\0\u0301\u200d\ufeff\u202e\u05d0\u0627\u6570\u00e9\ud83d\ude00\udcff\U0001f469\U0001f3fd\ufe0f",
    max_size=60,
)


def trained(folder):
    return Tokenizer.train([CORPUS], vocab_size=290)


def two_files(folder):
    return Tokenizer.from_pretrained(write_two_files(trained(folder), folder))


def specials_first(folder):
    """With special tokens that begin alike, and ids that are not in the order of the merges."""
    tokenizer = trained(folder)
    shift = len(SPECIALS)
    vocab = {token: shift + i for token, i in tokenizer.vocab.items()}
    Tokenizer(vocab, tokenizer.merges, {s: i for i, s in enumerate(SPECIALS)}).save_pretrained(folder)
    return Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=[trained, two_files, specials_first], ids=lambda make: make.__name__)
def tokenizer(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("tokenizer"))


def without_lone_surrogates(text):
    """Surrogates that pair are one character; any other becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@given(ANY_TEXT)
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids) == without_lone_surrogates(text).encode()
    assert not set(ids) & set(tokenizer.special_tokens.values())
    assert tokenizer.encode_batch([text]) == [ids]


@given(st.binary(max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_bytes_come_back(tokenizer, content):
    assert tokenizer.decode_bytes([tokenizer.vocab[bytes([b])] for b in content]) == content
    replaced = content.decode("utf-8", "replace")
    assert tokenizer.decode(tokenizer.encode(replaced)) == replaced
    escaped = content.decode("utf-8", "surrogateescape")  # as Python's arguments and file names hold them
    assert tokenizer.decode(tokenizer.encode(escaped)) == without_lone_surrogates(escaped)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_ids_decode_alike_one_by_one(tokenizer, data):
    """Ids that no text gave, too: characters that are broken off, special tokens in the middle of one."""
    ids = data.draw(st.lists(st.sampled_from(sorted([*tokenizer.vocab.values(), *tokenizer.special_tokens.values()]))))
    decoder = StreamDecoder(tokenizer)
    parts = [decoder.push(i) for i in ids]
    assert "".join(parts) + decoder.flush() == tokenizer.decode(ids)


@given(ANY_TEXT)
@settings(max_examples=100, deadline=None)
def test_streaming_gives_whole_characters_only(tokenizer, text):
    decoder = StreamDecoder(tokenizer)
    parts = [decoder.push(i) for i in tokenizer.encode(text)]
    assert "".join(parts) == without_lone_surrogates(text)
    assert decoder.flush() == ""


PIECES = st.sampled_from([*SPECIALS, "<|endoftext|", "|>", "end", "a", " ", "\n", "\U0001f600"])


@given(st.lists(PIECES, max_size=12).map("".join), st.sets(st.sampled_from(SPECIALS)))
@settings(max_examples=200, deadline=None)
def test_special_tokens_are_made_where_they_are_allowed(tokenizer, text, allowed):
    allowed &= set(tokenizer.special_tokens)
    ids = tokenizer.encode(text, allowed_special=allowed)
    assert tokenizer.decode(ids) == text
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    made = [names[i] for i in ids if i in names]
    longest_first = "|".join(regex.escape(s) for s in sorted(allowed, key=len, reverse=True))
    assert made == (regex.findall(longest_first, text) if allowed else [])


@pytest.mark.parametrize(
    "unit", [" ", "\n", "a", "\u00e9", "!", "'", "7", "\U0001f600", "\u0301", "\u3000", "\0", " a"]
)
def test_a_megabyte_of_one_character(unit, tmp_path):
    tokenizer = specials_first(tmp_path)
    started = time.monotonic()
    for end in ("", "a"):
        text = unit * (1_000_000 // len(unit.encode())) + end
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.monotonic() - started < 30  # quadratic would take hours


def test_a_megabyte_of_spaces_under_another_split_pattern(tmp_path):
    """The engine bears only so many steps back, and \\s+(?!\\S) takes one for each space."""
    base = trained(tmp_path)
    tokenizer = Tokenizer(base.vocab, base.merges, {}, r"[^\s\p{L}]?\p{L}+|[^\s\p{L}]+|\s+(?!\S)|\s+")
    for n in (1, 2, 3, 199, 200, 201, 202, 400, 401, 1_000_000):
        for end in ("", "a", "1"):
            text = " " * n + end
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            if n < 1000:
                pieces = regex.findall(tokenizer.pattern, text)
                assert ids == [i for piece in pieces for i in tokenizer.encode(piece)]
