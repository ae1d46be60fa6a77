"""Tokens in alternating colours, or with a bar between them where there are none."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastgpt.token_view import BAR, visible
from fastgpt.tokenizer import Tokenizer

_COLOURS = ("black on bright_cyan", "black on bright_yellow", "black on bright_green", "black on bright_magenta")


def has_colours(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def token_text(tokenizer: Tokenizer, ids: Iterable[int], console: Console) -> Text:
    """The tokens one after another; a line ends behind each that ends one."""
    coloured, text = has_colours(console), Text()
    specials = set(tokenizer.special_tokens.values())
    line_starts = True
    for n, token_id in enumerate(ids):
        token = tokenizer.token_bytes(token_id)
        style = _COLOURS[n % len(_COLOURS)] if coloured else ""
        if not coloured and not line_starts:
            text.append(BAR)
        if token_id in specials:
            style += " bold reverse"
        for piece in visible(token):
            text.append(piece.shown, f"{style} dim" if piece.stands_for else style)
        if line_starts := b"\n" in token:
            text.append("\n")
    text.rstrip()
    return text


def id_text(ids: Iterable[int], console: Console) -> Text:
    """The ids, each in its token's colour."""
    if not has_colours(console):
        return Text(" ".join(map(str, ids)))
    text = Text()
    for n, token_id in enumerate(ids):
        text.append(f" {token_id} ", _COLOURS[n % len(_COLOURS)])
    return text


def frequency_table(tokenizer: Tokenizer, counts: Sequence[tuple[int, int]], total: int) -> Table:
    """The most frequent tokens: pairs of an id and how often it occurs among `total`."""
    table = Table("most frequent", "id", "count", "share")
    for column in table.columns[1:]:
        column.justify = "right"
    for token_id, count in counts:
        token = "".join(piece.shown for piece in visible(tokenizer.token_bytes(token_id)))
        table.add_row(Text(token), str(token_id), f"{count:,}", f"{count / total:.2%}")
    return table
