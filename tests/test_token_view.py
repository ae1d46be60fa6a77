import re
import unicodedata

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt import Tokenizer
from fastgpt.token_view import BAR, MARKS, split_text, visible

WHITE_SPACE = {mark: character for character, mark in MARKS.items()}


def shown(token):
    return "".join(piece.shown for piece in visible(token))


def read_back(text):
    """The bytes of what `visible` shows."""
    found = b""
    for byte, character in re.findall("<([0-9a-f]{2})>|(.)", text, re.DOTALL):
        found += bytes.fromhex(byte) if byte else WHITE_SPACE.get(character, character).encode()
    return found


@given(st.binary(max_size=12) | st.text(max_size=12).map(str.encode) | st.text("<e2>·⏎│ \n\u0301a").map(str.encode))
@settings(max_examples=400, deadline=None)
def test_no_token_hides_anything_and_no_two_look_alike(token):
    text = shown(token)
    assert read_back(text) == token
    assert BAR not in text
    assert not any(unicodedata.category(c)[0] in "CZ" for c in text)


@pytest.mark.parametrize(
    ("token", "text"),
    [
        (" the", "·the"),
        ("\r\n\t", "␍⏎→"),
        (b"\xe2\x98", "<e2><98>"),
        (b"caf\xc3", "caf<c3>"),
        ("数", "数"),
        ("e\u0301", "e\u0301"),
        (" \u0301", "·<cc><81>"),  # the mark would stand on the dot
        ("\x1b[31m", "<1b>[31m"),  # no token reaches the terminal's controls
        ("\u202ea", "<e2><80><ae>a"),
        ("\u00a0·", "<c2><a0><c2><b7>"),
        ("<e2> <br>", "<3c>e2>·<br>"),
        ("│|", "<e2><94><82>|"),
    ],
)
def test_tokens_as_they_are_shown(token, text):
    assert shown(token if isinstance(token, bytes) else token.encode()) == text


def test_what_a_text_comes_to():
    tokenizer = Tokenizer.train(["low low lower"], vocab_size=260)
    text = "low lower \ud800 é low"
    split = split_text(tokenizer, text)
    assert split.ids == tokenizer.encode(text)
    assert (split.characters, split.words) == (17, len(regex.findall(tokenizer.pattern, text)))
    assert split.bytes == len("low lower \ufffd é low".encode())
    assert split.bytes_per_token == split.bytes / len(split.ids)
    counts = dict(split.most_frequent(1000))
    assert counts == {i: split.ids.count(i) for i in set(split.ids)}
    assert list(counts.values()) == sorted(counts.values(), reverse=True)
    assert split.most_frequent(2) == list(counts.items())[:2]
    assert split_text(tokenizer, "").bytes_per_token == 0
