"""Dialogues from the files that people have: Alpaca, ShareGPT, and OpenAI's `messages`, as JSON or JSON Lines.

    alpaca      {"instruction": "...", "input": "...", "output": "..."}           input may be empty or left out
    sharegpt    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}
    messages    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

Whatever the file, a dialogue is a list of {"role": "system" | "user" | "assistant", "content": str}, which is what
chat templates take. Alpaca's two fields become one user message, the input under a heading (`fastgpt.template.INPUT`):
every template then shows the whole task, and the alpaca template prints what was published.
"""

import json
from pathlib import Path
from typing import Any, Literal, get_args

from fastgpt.errors import UserError
from fastgpt.template import INPUT, Message

Format = Literal["alpaca", "sharegpt", "messages"]
_FIELD = {"alpaca": "instruction", "sharegpt": "conversations", "messages": "messages"}  # what tells them apart
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def read_records(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a file that holds one JSON list, or one object a line; each with its place, for errors.

    Raises:
        UserError: the file cannot be read, is no such JSON, or holds no records; names the row or line.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text: byte {error.start:,} is 0x{error.object[error.start]:02x}") from None
    records = []
    if text.lstrip().startswith("["):
        for i, record in enumerate(_parse(text, str(path)), 1):
            records.append((f"{path}, row {i}", record))
    else:
        for i, line in enumerate(text.split("\n"), 1):
            if line.strip():
                records.append((f"{path}, line {i}", _parse(line, f"{path}, line {i}")))
    if not records:
        raise UserError(f"{path} holds no records")
    for where, record in records:
        if not isinstance(record, dict):
            raise UserError(f"{where} is no JSON object but {_kind(record)}")
    return records


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no JSON: {error}") from None


def find_format(record: dict[str, Any], where: str) -> Format:
    """The format of a file by the fields of its first record."""
    for name in get_args(Format):
        if _FIELD[name] in record:
            return name
    have = ", ".join(map(repr, record)) or "none"
    raise UserError(
        f"{where} is in no format that is known: it needs a field 'instruction' (Alpaca), 'conversations' (ShareGPT) "
        f"or 'messages' (OpenAI), and has {have}"
    )


def to_dialogue(record: dict[str, Any], format: Format, where: str) -> list[Message]:
    """The messages of one record.

    Raises:
        UserError: a field is missing, is no text or is empty, or the roles' order makes no sense; names `where` it is.
    """
    if format == "alpaca":
        user = _text(record, "instruction", where)
        if record.get("input") is not None and (given := _text(record, "input", where, may_be_empty=True)):
            user += INPUT + given
        return [
            {"role": "user", "content": user},
            {"role": "assistant", "content": _text(record, "output", where)},
        ]
    field = _FIELD[format]
    role_field, text_field = ("from", "value") if format == "sharegpt" else ("role", "content")
    turns = get_field(record, field, where)
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: the field {field!r} must be a list of messages, it is {_kind(turns)}")
    messages: list[Message] = []
    for i, turn in enumerate(turns, 1):
        place = f"{where}, {field!r} {i}"
        if not isinstance(turn, dict):
            raise UserError(f"{place} is no JSON object but {_kind(turn)}")
        role = _text(turn, role_field, place)
        if format == "sharegpt":
            role = _SHAREGPT_ROLES.get(role, role)
        messages.append({"role": role, "content": _text(turn, text_field, place)})
    check_roles(messages, where)
    return messages


def check_roles(messages: list[Message], where: str) -> None:
    """Refuses an order of roles that makes no sense: it is system or not, then user and assistant in turn.

    Raises:
        UserError: names `where` and the message.
    """
    expected = "user"
    for i, message in enumerate(messages, 1):
        role = message["role"]
        if role not in ("system", "user", "assistant"):
            raise UserError(f"{where}, message {i}: the role {role!r} is none of system, user and assistant")
        if role == "system" and i == 1:
            continue
        if role != expected:
            after = "comes first" if i == 1 else f"follows {messages[i - 2]['role']}"
            raise UserError(
                f"{where}, message {i}: the order of roles makes no sense: {role} {after}, where {expected} should be"
            )
        expected = "assistant" if role == "user" else "user"
    if messages[-1]["role"] != "assistant":
        raise UserError(f"{where}: the last message is the {messages[-1]['role']}'s: no assistant answers it")


def read_dialogues(path: str | Path, format: Format | None = None) -> list[list[Message]]:
    """All dialogues of a file.

    Args:
        format: found by the first record's fields if not given.

    Raises:
        UserError: as for `read_records`, `find_format` and `to_dialogue`.
    """
    records = read_records(path)
    kind = format or find_format(records[0][1], records[0][0])
    return [to_dialogue(record, kind, where) for where, record in records]


def get_field(record: dict[str, Any], field: str, where: str) -> Any:
    """A record's field; a UserError that names `where` if it is missing."""
    if field not in record:
        have = ", ".join(map(repr, record)) or "none"
        raise UserError(f"{where}: the field {field!r} is missing (it has {have})")
    return record[field]


def _text(record: dict[str, Any], field: str, where: str, may_be_empty: bool = False) -> str:
    value = get_field(record, field, where)
    if not isinstance(value, str):
        raise UserError(f"{where}: the field {field!r} must be a text, it is {_kind(value)}")
    value = value.strip()
    if not value and not may_be_empty:
        raise UserError(f"{where}: the field {field!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half of a character, which no tokenizer can read
        raise UserError(f"{where}: the field {field!r} holds a lone surrogate, which is no character") from None
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return {"dict": "an object", "str": "a text", "bool": "true or false"}.get(type(value).__name__, "a number")
