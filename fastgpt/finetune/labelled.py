"""Labelled texts: read from a table, divided, balanced."""

import csv
import io
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt.data.read import read_text_file
from fastgpt.errors import UserError
from fastgpt.finetune.dialogues import read_records

# What the columns are usually called, the likeliest first.
TEXT_NAMES = (
    "text",
    "sentence",
    "message",
    "content",
    "review",
    "tweet",
    "comment",
    "body",
    "question",
    "title",
    "sms",
)
LABEL_NAMES = ("label", "labels", "class", "category", "target", "sentiment", "intent", "topic", "tag", "spam")
KINDS = (".tsv", ".csv", ".jsonl", ".json")


@dataclass(frozen=True)
class Example:
    """A text, its label, and where it stood: file and line."""

    text: str
    label: str
    place: str


def read_labelled(path: Path, text_column: str | None = None, label_column: str | None = None) -> list[Example]:
    """The examples of a .tsv, .csv, .jsonl or .json file, in its order, without spaces around texts and labels.

    Columns are found by their usual names. A table without such a first row has none: then of two columns the one with
    fewer different values is the label.

    Args:
        text_column, label_column: the columns' names, or numbers from 1 in a table without names.

    Raises:
        UserError: the file cannot be read, has no such columns, or a row lacks one of them; names file, row and field.
    """
    if path.suffix not in KINDS:
        raise UserError(f"{path} is no table that can be read: give a file whose name ends in {', '.join(KINDS)}")
    rows = read_records(path) if path.suffix in (".jsonl", ".json") else _table(path)
    if not rows:
        raise UserError(f"{path} is empty: give at least two examples of each class")
    header = list(rows[0][1])
    text = _column(path, header, text_column, "--text-column", TEXT_NAMES)
    label = _column(path, header, label_column, "--label-column", LABEL_NAMES)
    if text is None and label is None and len(header) == 2 and all(isinstance(name, int) for name in header):
        different = {name: len({row.get(name) for _, row in rows}) for name in header}
        label, text = sorted(header, key=lambda name: different[name])
    for wanted, found in (("text", text), ("label", label)):
        if found is None:
            have = ", ".join(map(str, header))
            raise UserError(
                f"{path}: no column is known to be the {wanted}: name it with --{wanted}-column (has {have})"
            )
    if text == label:
        raise UserError(f"{path}: {text!r} cannot be the text and the label: name both columns")
    return [Example(_field(place, row, text), _field(place, row, label), place) for place, row in rows]


def read_texts(path: Path, text_column: str | None = None) -> list[str]:
    """The texts to classify in a file: the text column of a table, or else the lines.

    Raises:
        UserError: as for `read_labelled`; or a line is empty.
    """
    if path.suffix not in KINDS:
        return check_texts(lines(read_text_file(path)), str(path))
    rows = read_records(path) if path.suffix in (".jsonl", ".json") else _table(path)
    header = list(rows[0][1]) if rows else []
    text = _column(path, header, text_column, "--text-column", TEXT_NAMES)
    if text is None and len(header) == 1:
        text = header[0]
    if text is None:
        raise UserError(f"{path}: no column is known to be the text: name it with --text-column")
    return [_field(place, row, text) for place, row in rows]


def check_texts(texts: list[str], source: str) -> list[str]:
    """The texts, of which none may be empty: it would have no class."""
    for i, text in enumerate(texts, 1):
        if not text.strip():
            raise UserError(f"{source}, line {i}: the text is empty, and has no class: take the line out")
    if not texts:
        raise UserError(f"{source} has no text: give a text, or lines of them")
    return texts


def lines(text: str) -> list[str]:
    """Lines as text editors count them; other characters that Unicode calls line ends are part of them."""
    found = [line.removesuffix("\r") for line in text.split("\n")]
    return found if found[-1] else found[:-1]


Row = dict[Any, Any]  # by the column's name, or by its number from 1 where the table has no names


def _table(path: Path) -> list[tuple[str, Row]]:
    if path.suffix == ".tsv":  # quotes are letters there: texts of one line each, as they are
        table = [(i, line.split("\t")) for i, line in enumerate(lines(read_text_file(path)), 1) if line.strip()]
    else:
        table = []
        csv.field_size_limit(2**31 - 1)
        reader = csv.reader(io.StringIO(read_text_file(path), newline=""), strict=True)
        try:
            for cells in reader:
                if any(cells):
                    table.append((reader.line_num, cells))
        except csv.Error as error:
            raise UserError(
                f"{path}, line {reader.line_num}: this is no CSV ({error}): mend the row's quotes"
            ) from None
    if not table:
        return []
    first = [cell.strip() for cell in table[0][1]]
    if any(cell.lower() in TEXT_NAMES + LABEL_NAMES for cell in first):
        names: list[Any] = first
        table = table[1:]
    else:
        names = list(range(1, len(first) + 1))
    rows = []
    for i, cells in table:
        if len(cells) != len(names):
            raise UserError(f"{path}, line {i}: the row has {len(cells)} fields, the others have {len(names)}: mend it")
        rows.append((f"{path}, line {i}", dict(zip(names, cells, strict=True))))
    return rows


def _column(path: Path, header: list[Any], wanted: str | None, option: str, usual: Sequence[str]) -> Any:
    if wanted is not None:
        found = next((name for name in header if str(name) == wanted), None)
        if found is None:
            raise UserError(f"{path} has no column {wanted!r} ({option}): it has {', '.join(map(str, header))}")
        return found
    return next((name for u in usual for name in header if str(name).lower() == u), None)


def _field(place: str, row: Row, name: Any) -> str:
    value = row.get(name)
    if value is None:
        raise UserError(f"{place}: the field {name!r} is missing: fill it in, or take the row out")
    if isinstance(value, bool | float | dict | list) or not isinstance(value, str | int):
        raise UserError(f"{place}: the field {name!r} is {type(value).__name__}, not a text or a whole number")
    text = str(value).strip().encode("utf-8", "replace").decode()  # JSON can spell half a character
    if not text:
        raise UserError(f"{place}: the field {name!r} is empty: fill it in, or take the row out")
    return text


def divide(examples: list[Example], fractions: Sequence[float], seed: int) -> list[list[Example]]:
    """The examples in as many parts as there are fractions, and the rest as the last part.

    Each class is divided by itself, so that all parts have it in the same share. Examples of the same text stay
    together: a text that was trained on tells nothing when it is tested.
    """
    by_text: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        by_text[example.text].append(example)
    by_label: dict[str, list[list[Example]]] = defaultdict(list)
    for group in by_text.values():
        by_label[group[0].label].append(group)
    rng = random.Random(seed)
    parts: list[list[Example]] = [[] for _ in range(len(fractions) + 1)]
    for label in sorted(by_label):
        groups = by_label[label]
        rng.shuffle(groups)
        total, done = sum(map(len, groups)), 0
        ends = [total * sum(fractions[: i + 1]) for i in range(len(fractions))]
        for group in groups:
            # By its middle, so that a class of few examples gives each part about its share.
            part = sum(done + len(group) / 2 > end for end in ends)
            parts[part] += group
            done += len(group)
    for found in parts:
        rng.shuffle(found)
    return parts


def balance(examples: list[Example], seed: int) -> list[Example]:
    """As many examples of each class as the rarest has, drawn by the seed."""
    by_label: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        by_label[example.label].append(example)
    least = min(map(len, by_label.values()))
    rng = random.Random(seed)
    kept = [example for label in sorted(by_label) for example in rng.sample(by_label[label], least)]
    rng.shuffle(kept)
    return kept


def class_counts(examples: list[Example]) -> dict[str, int]:
    """How many examples each class has, in the labels' order (numbers by their value)."""
    counts = Counter(example.label for example in examples)
    labels = sorted(counts)
    if all(label.lstrip("-").isdecimal() for label in labels):
        labels.sort(key=int)
    return {label: counts[label] for label in labels}
