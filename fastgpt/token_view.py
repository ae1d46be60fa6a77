"""What can be seen of a text's tokens, and what they come to."""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import regex

from fastgpt.tokenizer import Tokenizer

MARKS = {" ": "·", "\n": "⏎", "\r": "␍", "\t": "→"}
BAR = "│"  # between tokens where there are no colours


class Piece(NamedTuple):
    """A part of a token as it is shown; `stands_for` where it is a mark or a byte and not the text itself."""

    shown: str
    stands_for: bool


def visible(token: bytes) -> list[Piece]:
    """A token so that none of it is hidden, and no two tokens look alike.

    White space is shown by a mark. Bytes that are no whole character, and characters that would not show, would move
    what is around them (controls, directions, a combining mark without its letter) or are marks themselves, are shown
    as bytes: <e2><98>.
    """
    text = token.decode("utf-8", "surrogateescape")  # a byte of a broken character becomes a lone surrogate
    pieces: list[Piece] = []
    for i, character in enumerate(text):
        kind = unicodedata.category(character)[0]
        if character in MARKS:
            pieces.append(Piece(MARKS[character], True))
        elif (
            kind in "CZ"
            or (kind == "M" and (not pieces or pieces[-1].stands_for))
            or character in (BAR, *MARKS.values())
            or re.match("<[0-9a-f]{2}>", text[i : i + 4])
        ):
            spelled = character.encode("utf-8", "surrogateescape")
            pieces.append(Piece("".join(f"<{b:02x}>" for b in spelled), True))
        elif pieces and not pieces[-1].stands_for:
            pieces[-1] = Piece(pieces[-1].shown + character, False)
        else:
            pieces.append(Piece(character, False))
    return pieces


@dataclass
class Split:
    """A text as one tokenizer splits it.

    Attributes:
        words: pieces of the tokenizer's split pattern, which no token crosses.
    """

    tokenizer: Tokenizer
    ids: list[int]
    characters: int
    bytes: int
    words: int

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / max(1, len(self.ids))

    def most_frequent(self, count: int) -> list[tuple[int, int]]:
        """The ids that occur most often, each with how often; of ties the smaller id first."""
        return sorted(Counter(self.ids).items(), key=lambda item: (-item[1], item[0]))[:count]


def split_text(tokenizer: Tokenizer, text: str) -> Split:
    ids = tokenizer.encode(text)
    words = sum(1 for _ in regex.finditer(tokenizer.pattern, text))
    return Split(tokenizer, ids, len(text), len(tokenizer.decode_bytes(ids)), words)
