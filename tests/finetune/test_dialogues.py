import json
from pathlib import Path

import pytest

from fastgpt import UserError
from fastgpt.finetune.dialogues import read_dialogues
from fastgpt.template import INPUT

REAL = Path(__file__).parents[2].parent / "shared/data/instruction-data.json"
HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
ALPACA = {"instruction": "Hi", "input": "", "output": "Ho"}
SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
MESSAGES = {"messages": HI}


def write(path, records):
    if path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1))
    else:
        path.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("record", [ALPACA, SHAREGPT, MESSAGES], ids=["alpaca", "sharegpt", "messages"])
def test_the_three_formats_give_the_same_dialogues(tmp_path, record, suffix):
    assert read_dialogues(write(tmp_path / f"data{suffix}", [record, record])) == [HI, HI]


def test_an_input_stands_below_its_instruction(tmp_path):
    records = [{**ALPACA, "input": " 1 2 "}, {"instruction": " Hi\n", "output": " Ho "}, {**ALPACA, "input": None}]
    dialogues = read_dialogues(write(tmp_path / "data.json", records))
    assert dialogues[0][0]["content"] == "Hi" + INPUT + "1 2"
    assert dialogues[1:] == [HI, HI]


def test_longer_dialogues_with_a_system_message(tmp_path):
    turns = [("system", "Be brief."), ("human", "Hi"), ("gpt", "Ho"), ("human", "Who?"), ("gpt", " Ada. ")]
    record = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    [dialogue] = read_dialogues(write(tmp_path / "data.json", [record]))
    assert [m["role"] for m in dialogue] == ["system", "user", "assistant", "user", "assistant"]
    assert dialogue[-1]["content"] == "Ada."


def test_a_named_format_is_taken(tmp_path):
    path = write(tmp_path / "data.json", [{**MESSAGES, "instruction": "of something else"}])
    assert read_dialogues(path, "messages") == [HI]
    with pytest.raises(UserError, match="row 1: the field 'output' is missing \\(it has 'messages', 'instruction'\\)"):
        read_dialogues(path)


def roles(*names):
    return {"messages": [{"role": name, "content": "text"} for name in names]}


@pytest.mark.parametrize(
    ("record", "line"),
    [
        ({"text": "Hi"}, "row 2: the field 'messages' is missing (it has 'text')"),
        ({"messages": []}, "row 2: the field 'messages' must be a list of messages, it is an empty list"),
        ({"messages": "Hi"}, "row 2: the field 'messages' must be a list of messages, it is a text"),
        ({"messages": ["Hi"]}, "row 2, 'messages' 1 is no JSON object but a text"),
        ({"messages": [{"role": "user"}]}, "row 2, 'messages' 1: the field 'content' is missing (it has 'role')"),
        ({"messages": [{"content": "Hi"}]}, "row 2, 'messages' 1: the field 'role' is missing"),
        (
            {"messages": [HI[0], {**HI[1], "content": None}]},
            "'messages' 2: the field 'content' must be a text, it is null",
        ),
        ({"messages": [HI[0], {**HI[1], "content": " \n"}]}, "row 2, 'messages' 2: the field 'content' is empty"),
        (
            {"messages": [HI[0], {**HI[1], "content": "\ud83d"}]},
            "'messages' 2: the field 'content' holds a lone surrogate",
        ),
        (roles("assistant", "user"), "row 2, message 1: the order of roles makes no sense: assistant comes first"),
        (
            roles("user", "user"),
            "message 2: the order of roles makes no sense: user follows user, where assistant should",
        ),
        (roles("user", "assistant", "assistant"), "message 3: the order of roles makes no sense: assistant follows"),
        (roles("user", "system", "assistant"), "message 2: the order of roles makes no sense: system follows user"),
        (roles("user", "tool"), "row 2, message 2: the role 'tool' is none of system, user and assistant"),
        (roles("user"), "row 2: the last message is the user's: no assistant answers it"),
        (roles("system"), "row 2: the last message is the system's"),
        (["Hi"], "row 2 is no JSON object but a list"),
    ],
)
def test_a_bad_record_is_named_with_file_row_and_field(tmp_path, record, line):
    path = write(tmp_path / "data.json", [MESSAGES, record])
    with pytest.raises(UserError) as error:
        read_dialogues(path)
    assert line in str(error.value)
    assert str(error.value).startswith(f"{path}, row 2")
    assert "\n" not in str(error.value)


def test_a_bad_alpaca_record(tmp_path):
    for change, line in [
        ({"output": " "}, "line 2: the field 'output' is empty"),
        ({"input": 3}, "line 2: the field 'input' must be a text, it is a number"),
        ({"instruction": True}, "line 2: the field 'instruction' must be a text, it is true or false"),
    ]:
        with pytest.raises(UserError, match=line):
            read_dialogues(write(tmp_path / "data.jsonl", [ALPACA, {**ALPACA, **change}]))


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "holds no records"),
        (b" []\n", "holds no records"),
        (b"[{}", "is no JSON: "),
        (b'{"messages": 1}\n{"mess', "line 2 is no JSON: "),
        (b"5", "line 1 is no JSON object but a number"),
        (b"[" * 100_000, "is no JSON: "),
        (b'[{"text": "Hi"}]', "row 1 is in no format that is known: .* has 'text'"),
        (b"[{}]", "row 1 is in no format that is known: .* has none"),
        (b'{"instruction": "caf\xe9"}', "is no UTF-8 text: byte 20 is 0xe9"),
    ],
)
def test_a_file_that_is_none(tmp_path, content, line):
    (tmp_path / "data.json").write_bytes(content)
    with pytest.raises(UserError, match=line):
        read_dialogues(tmp_path / "data.json")
    with pytest.raises(UserError, match="no such file: "):
        read_dialogues(tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot be read: "):
        read_dialogues(tmp_path)


@pytest.mark.skipif(not REAL.exists(), reason="needs the Alpaca-format file")
def test_a_real_file():
    dialogues = read_dialogues(REAL)
    assert len(dialogues) == 1100
    assert sum(INPUT in dialogue[0]["content"] for dialogue in dialogues) == 325
