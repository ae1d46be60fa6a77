import csv
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.errors import UserError
from fastgpt.finetune.labelled import Example, balance, class_counts, divide, read_labelled, read_texts

ROWS = [("good", "a fine thing"), ("bad", 'it "broke", twice'), ("good", "works\u2028well"), ("bad", "never again")]


def write(folder, name, content):
    path = folder / name
    path.write_text(content, newline="")
    return path


def pairs(path, **columns):
    return [(e.label, e.text) for e in read_labelled(path, **columns)]


def test_a_tsv_without_names_has_its_label_where_values_repeat(tmp_path):
    path = write(tmp_path, "a.tsv", "".join(f" {label} \t{text}\r\n" for label, text in ROWS) + "\n")
    assert pairs(path) == ROWS
    assert read_labelled(path)[2].place == f"{path}, line 3"
    turned = write(tmp_path, "b.tsv", "".join(f"{text}\t{label}\n" for label, text in ROWS))
    assert pairs(turned) == ROWS
    assert pairs(turned, text_column="1", label_column="2") == ROWS


def test_named_columns_in_any_table(tmp_path):
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "Text", "Label"])
        writer.writerows([i, text + "\nsecond line", label] for i, (label, text) in enumerate(ROWS))
    assert pairs(tmp_path / "a.csv") == [(label, text + "\nsecond line") for label, text in ROWS]
    lines = [json.dumps({"sentence": text, "class": int(label == "good"), "more": [1]}) for label, text in ROWS]
    path = write(tmp_path, "a.jsonl", "\n".join(lines))
    assert [label for label, _ in pairs(path)] == ["1", "0", "1", "0"]
    assert pairs(path, text_column="sentence", label_column="class") == pairs(path)
    assert pairs(write(tmp_path, "a.json", f"[{','.join(lines)}]")) == pairs(path)


BAD = [
    ("a.xlsx", "", "is no table that can be read: give a file whose name ends in .tsv, .csv, .jsonl, .json"),
    ("a.csv", "", "is empty"),
    ("a.csv", "text,label\nx,y,z\n", "a.csv, line 2: the row has 3 fields, the others have 2"),
    ("a.csv", 'text,label\n"x,y\n', "a.csv, line 2: this is no CSV"),
    ("a.csv", "text,label\nx,y\n ,y\n", "a.csv, line 3: the field 'text' is empty"),
    ("a.csv", "text,other\nx,y\n", "no column is known to be the label: name it with --label-column (has text, other)"),
    ("a.tsv", "a\tb\tc\n", "no column is known to be the text"),
    ("a.jsonl", '{"text": "x", "label": "y"}\n{"text": "x"}\n', "a.jsonl, line 2: the field 'label' is missing"),
    ("a.jsonl", '{"text": "x", "label": 0.5}\n', "a.jsonl, line 1: the field 'label' is float"),
    ("a.jsonl", '{"text": ["x"], "label": 1}\n', "a.jsonl, line 1: the field 'text' is list"),
    ("a.jsonl", "nonsense\n", "a.jsonl, line 1 is no JSON"),
    ("a.jsonl", "[1]\n", "a.jsonl, row 1 is no JSON object but a number"),
]


@pytest.mark.parametrize(("name", "content", "words"), BAD)
def test_bad_tables_are_named(tmp_path, name, content, words):
    with pytest.raises(UserError) as error:
        read_labelled(write(tmp_path, name, content))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_columns_are_named(tmp_path):
    path = write(tmp_path, "a.csv", "text,label\nx,y\n")
    with pytest.raises(UserError, match=r"no column 'tekst' \(--text-column\): it has text, label"):
        read_labelled(path, text_column="tekst")
    with pytest.raises(UserError, match="'text' cannot be the text and the label"):
        read_labelled(path, label_column="text")
    with pytest.raises(UserError, match=r"gone\.csv cannot be read: No such file"):
        read_labelled(tmp_path / "gone.csv")


def test_texts_alone(tmp_path):
    assert read_texts(write(tmp_path, "a.txt", "one\ntwo\u2028and\r\n")) == ["one", "two\u2028and"]
    assert read_texts(write(tmp_path, "a.csv", "id,text\n1,one\n2,two\n")) == ["one", "two"]
    assert read_texts(write(tmp_path, "a.tsv", "one\ntwo\n")) == ["one", "two"]
    with pytest.raises(UserError, match=r"b\.txt, line 2: the text is empty"):
        read_texts(write(tmp_path, "b.txt", "one\n \ntwo\n"))
    with pytest.raises(UserError, match="has no text"):
        read_texts(write(tmp_path, "c.txt", ""))
    with pytest.raises(UserError, match="no column is known to be the text"):
        read_texts(write(tmp_path, "d.csv", "a,label\n1,2\n"))


examples = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 30)).map(lambda x: Example(f"text {x[1]}", x[0], "here:1")),
    min_size=1,
    max_size=200,
)


@settings(max_examples=60, deadline=None)
@given(examples, st.integers(0, 5))
def test_dividing_loses_nothing_and_keeps_equal_texts_together(given_examples, seed):
    parts = divide(given_examples, [0.1, 0.2], seed)
    assert sorted(repr(e) for part in parts for e in part) == sorted(map(repr, given_examples))
    texts = [{e.text for e in part} for part in parts]
    assert not texts[0] & texts[1]
    assert not (texts[0] | texts[1]) & texts[2]
    assert divide(given_examples, [0.1, 0.2], seed) == parts


def test_dividing_gives_each_class_its_share():
    many = [Example(f"text {i}", "rare" if i % 10 == 0 else "common", "here") for i in range(1000)]
    val, test, train = divide(many, [0.1, 0.2], seed=1)
    assert [class_counts(part) for part in (val, test, train)] == [
        {"common": 90, "rare": 10},
        {"common": 180, "rare": 20},
        {"common": 630, "rare": 70},
    ]
    assert divide(many, [0.1, 0.2], seed=2)[0] != val
    few = balance(many, seed=1)
    assert class_counts(few) == {"common": 100, "rare": 100}
    assert set(few) <= set(many)
    assert list(class_counts([Example("x", label, "here") for label in ("10", "9", "-1")])) == ["-1", "9", "10"]
