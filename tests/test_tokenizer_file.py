"""Files that hold no byte-level BPE, or a damaged one: one line that names the file, whatever is wrong with it."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from two_files import write_two_files

from fastgpt import Tokenizer, UserError
from fastgpt.tokenizer_file import spell

TEXT = "It's the tokenizer's own text; user text, 3 lines.\n  Größe 数学\n" * 3


@pytest.fixture(scope="module")
def trained():
    return Tokenizer.train([TEXT], vocab_size=290, special_tokens=("<|endoftext|>", "<|user|>"))


@pytest.fixture(scope="module")
def content(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("valid")
    trained.save_pretrained(folder)
    return json.loads((folder / "tokenizer.json").read_text())


def refusal(folder, text):
    """What reading a folder with this tokenizer.json says."""
    path = folder / "tokenizer.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        Tokenizer.from_pretrained(folder)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def unigram(c):
    c["model"] = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["▁the", -3.5]]}


def llama_2(c):
    c["model"].update(byte_fallback=True, fuse_unk=True)
    c["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]}


def regex(pattern):
    return lambda c: c.update(
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }
    )


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda c: c["model"].update(type="WordPiece"), "type is 'WordPiece'"),
        (unigram, "type is 'Unigram'"),
        (llama_2, "byte_fallback is True"),
        (lambda c: c.update(normalizer={"type": "NFC"}), "normalizer is 'NFC'"),
        (lambda c: c["model"].update(dropout=0.1), "dropout is 0.1"),
        (lambda c: c["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix is '</w>'"),
        (lambda c: c["model"].pop("merges"), "merges should be a list, it is None"),
        (lambda c: c["model"].update(vocab=[]), "vocab should be an object, it is []"),
        (lambda c: c.update(model=3), "model should be an object, it is 3"),
        (lambda c: c.update(pre_tokenizer={"type": "Metaspace"}), "pre_tokenizer is 'Metaspace'"),
        (lambda c: c.update(pre_tokenizer=None), "pre_tokenizer is 'none'"),
        (lambda c: c["pre_tokenizer"].update(add_prefix_space=True), "add_prefix_space is true"),
        (regex("(?<"), "cannot be read"),
        (regex("[a-z]+"), "leaves out a part of the text"),
        (regex(r"[\s\S]*"), "leaves out a part of the text"),  # it matches nothing at the end, too
        (lambda c: c["model"]["vocab"].pop("A"), "no token for the single byte 0x41:"),
        (
            lambda c: c["model"].update(vocab=dict(list(c["model"]["vocab"].items())[:200]), merges=[]),
            "no token for the single byte 0x0c, 0x0d, 0x0e and 53 more",
        ),
        (lambda c: c["model"]["merges"].append("A zz"), "not in the vocabulary"),
        (lambda c: c["model"]["merges"].reverse(), "only a later merge makes"),
        (lambda c: c["model"]["merges"].append(c["model"]["merges"][0]), "two merges make the same token"),
        (lambda c: c["model"]["merges"].append("a b c"), "the merge 'a b c' is no pair"),
        (lambda c: c["model"]["merges"].append(["a", 1]), "the merge ['a', 1] is no pair"),
        (lambda c: c["model"]["vocab"].update({"数": 600}), "'数' of the token '数' stands for no byte"),
        (lambda c: c["model"]["vocab"].update({"": 600}), "a token is empty"),
        (lambda c: c["model"]["vocab"].update({"A": 66}), "two tokens have the same id 66: b'A' and b'c'"),
        (lambda c: c["model"]["vocab"].update({"A": -1}), "the token b'A' has the id -1"),
        (lambda c: c["model"]["vocab"].update({"A": 2**40}), "the token b'A' has the id 1099511627776"),
        (lambda c: c["model"]["vocab"].update({"A": 32.0}), "the token b'A' has the id 32.0"),
        (lambda c: c["model"]["vocab"].update({"A": True}), "the token b'A' has the id True"),
        (lambda c: c["added_tokens"][0].update(special=False), "'<|endoftext|>' is not special"),
        (lambda c: c["added_tokens"][0].update(content=""), "a special token is empty"),
        (lambda c: c["added_tokens"][0].update(content="A", id=32), "the special token 'A' is an ordinary token too"),
        (
            lambda c: c["added_tokens"][0].update(content="user", id=274),
            "the special token 'user' is an ordinary token",
        ),
        (lambda c: c["added_tokens"][0].update(content="\ud800"), "it has a lone surrogate"),
        (lambda c: c["added_tokens"][0].update(id="288"), "id should be a whole number, it is '288'"),
        (lambda c: c["added_tokens"][0].update(id=0), "'<|endoftext|>' has the id 0, and 288 in the vocabulary"),
        (lambda c: c["added_tokens"].append({**c["added_tokens"][0], "id": 7}), "has two ids, 288 and 7"),
        (
            lambda c: (c["model"].update(ignore_merges=True), c["model"]["vocab"].update({"zebra": 400})),
            "no merge makes the token b'zebra'",
        ),
    ],
)
def test_a_file_that_cannot_be_honoured_is_refused(content, tmp_path, edit, words):
    edited = copy.deepcopy(content)
    edit(edited)
    assert words in refusal(tmp_path, json.dumps(edited))


def test_an_ordinary_token_is_no_special_one(trained):
    token = max(trained.vocab, key=len).decode()
    for special in (token, spell(token.encode())):
        with pytest.raises(UserError, match="is an ordinary token too"):
            Tokenizer(trained.vocab, trained.merges, {special: 289})
    with pytest.raises(UserError, match="'q' is an ordinary token too"):
        Tokenizer.train([TEXT], vocab_size=280, special_tokens=("<|endoftext|>", "q"))


def test_text_that_is_no_json(content, tmp_path):
    text = json.dumps(content)
    assert "it is no JSON" in refusal(tmp_path, text[: len(text) // 2])
    assert "it is no JSON" in refusal(tmp_path, "")
    assert "it is no JSON" in refusal(tmp_path, "[" * 100_000)
    assert "it is no JSON object" in refusal(tmp_path, "[]")
    assert "no UTF-8 text from byte 1 on" in refusal(tmp_path, b"{\xff" + text.encode())
    assert "it is no JSON" in refusal(tmp_path, text.encode("utf-8-sig"))


def places(value, path=()):
    """The paths of all that can be changed in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def mutated(data, content):
    """`content` with some fields removed, replaced or doubled."""
    content = copy.deepcopy(content)
    for _ in range(data.draw(st.integers(1, 3))):
        every = list(places(content))
        shallow = [path for path in every if len(path) < 3 or ("vocab" not in path and "merges" not in path)]
        *parents, key = data.draw(st.sampled_from(shallow) | st.sampled_from(every))
        parent = content
        for name in parents:
            parent = parent[name]
        change = data.draw(st.sampled_from(["remove", "replace", "double"]))
        if change == "remove":
            del parent[key]
        elif change == "replace":
            parent[key] = data.draw(JUNK)
        elif isinstance(parent, list):
            parent.append(parent[key])
        else:
            parent[data.draw(st.text(max_size=3))] = parent[key]
    return content


def loads_or_is_refused(folder, path):
    try:
        tokenizer = Tokenizer.from_pretrained(folder)
    except UserError as error:
        line = str(error)
    else:
        assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
        tokenizer.save_pretrained(folder)
        assert Tokenizer.from_pretrained(folder).hash == tokenizer.hash
        return
    assert str(path) in line
    assert "\n" not in line
    assert len(line) < len(str(path)) + 300


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_change_to_a_file_loads_or_is_refused_in_one_line(content, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "mutated"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(mutated(data, content)))
    loads_or_is_refused(folder, folder / "tokenizer.json")


@given(st.integers(0, 10**4), st.binary(max_size=3))
@settings(max_examples=100, deadline=None)
def test_any_bytes_in_a_file_load_or_are_refused_in_one_line(content, tmp_path_factory, place, written):
    folder = tmp_path_factory.getbasetemp() / "overwritten"
    folder.mkdir(exist_ok=True)
    raw = json.dumps(content, ensure_ascii=False).encode()
    place %= len(raw)
    (folder / "tokenizer.json").write_bytes(raw[:place] + written + raw[place + len(written) :])
    loads_or_is_refused(folder, folder / "tokenizer.json")


@given(JUNK | st.fixed_dictionaries({"chat_template": JUNK | st.lists(JUNK | st.just({"name": "default"}))}))
@settings(max_examples=60, deadline=None)
def test_any_tokenizer_config_loads_or_is_refused_in_one_line(content, tmp_path_factory, config):
    folder = tmp_path_factory.getbasetemp() / "configured"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    loads_or_is_refused(folder, folder / "tokenizer_config.json")


@pytest.mark.parametrize("names", [("vocab.bpe", "encoder.json"), ("merges.txt", "vocab.json")])
def test_folders_of_two_files_open(names, tmp_path):
    tokenizer = Tokenizer.train([TEXT], vocab_size=290)
    write_two_files(tokenizer, tmp_path, *names)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    for opened in (Tokenizer.from_pretrained(tmp_path), Tokenizer.from_gpt2_files(*(tmp_path / n for n in names))):
        assert opened.hash == tokenizer.hash
        assert opened.chat_template == "{{ messages }}"
    merges = tmp_path / names[0]
    merges.write_bytes(merges.read_bytes().replace(b"\n", b"\r\n"))  # as Windows' tools write it
    assert Tokenizer.from_pretrained(tmp_path).hash == tokenizer.hash
    Tokenizer.train([TEXT], vocab_size=280).save_pretrained(tmp_path)  # a tokenizer.json goes before them
    assert Tokenizer.from_pretrained(tmp_path).vocab_size == 280


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("vocab.bpe", "a b c\n", "vocab.bpe: the merge 'a b c' is no pair"),
        ("vocab.bpe", "a zebra\n", "vocab.bpe with encoder.json: the merge of b'a' and b'zebra' names a token"),
        ("vocab.bpe", "数 学\n", "vocab.bpe: the character '数'"),
        ("encoder.json", "{}", "no token for the single byte 0x00, 0x01, 0x02 and 253 more"),
        ("encoder.json", '{"a": ', "encoder.json is damaged"),
        ("encoder.json", '{"<|endoftext|>": "x"}', "has the id 'x'"),
    ],
)
def test_two_files_that_cannot_be_honoured_are_refused(trained, tmp_path, name, text, words):
    write_two_files(trained, tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert words in str(caught.value)


def test_missing_files(trained, tmp_path):
    for path in (tmp_path / "no-folder", tmp_path, tmp_path / "vocab.bpe"):
        with pytest.raises(UserError, match=f"no tokenizer at {path}: there is no tokenizer.json"):
            Tokenizer.from_pretrained(path)
    with pytest.raises(UserError, match=r"no tokenizer at .*: File name too long"):
        Tokenizer.from_pretrained("a text instead of a folder " * 100)
    with pytest.raises(UserError, match=r"other.json is missing"):
        Tokenizer.from_pretrained(tmp_path / "other.json")
    with pytest.raises(UserError, match=r"encoder.json is missing"):
        Tokenizer.from_gpt2_files(tmp_path / "vocab.bpe", tmp_path / "encoder.json")
