"""The same ids as tiktoken, tokenizers and transformers give, on texts made to tell them apart."""

import sys
import unicodedata
from itertools import groupby
from pathlib import Path

import pytest
import regex
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from two_files import write_two_files

from fastgpt import Tokenizer
from fastgpt.tokenizer import GPT2_PATTERN

SHARED = Path(__file__).parents[1].parent / "shared/data"
HAS_GPT2 = (SHARED / "gpt2/vocab.bpe").exists()
needs_gpt2 = pytest.mark.skipif(not HAS_GPT2, reason="needs GPT-2's vocab.bpe and encoder.json")
# Without any special token spelled out: transformers would make the token of it.
TEXT = (
    Path(__file__).read_text().replace("<|", "{") + "Größe naïve 数学 数字 😀 'll we've 3.14159  \t\r\n\n\n  end " * 5
)


def spread(items, count):
    """At most `count` of the items, evenly spread."""
    return items[:: max(1, len(items) // count)]


def neighbourhoods(characters):
    """Each character where a split pattern may treat it differently."""
    return "".join(f"{c} {c}a{c}{c}1{c}'{c}s  {c}\n{c}." for c in characters)


def by_category():
    """The characters of each general category but the surrogates: assigned or not, all planes."""
    found: dict[str, list[str]] = {}
    for c in map(chr, range(sys.maxunicode + 1)):
        found.setdefault(unicodedata.category(c), []).append(c)
    del found["Cs"]
    return found


def by_script(letters):
    """The first letters of each script: by the first word of their names."""
    for _, group in groupby(letters, lambda c: unicodedata.name(c, "?").split()[0]):
        yield from list(group)[:4]


def torture():
    """Name -> text: hard for a split pattern, for Unicode tables, for the merging of bytes."""
    categories = by_category()
    texts = {f"category {name}": neighbourhoods(spread(found, 150)) for name, found in sorted(categories.items())}
    letters = sorted(c for name in ("Lu", "Ll", "Lt", "Lm", "Lo") for c in categories[name])
    digits = [c for name in ("Nd", "Nl", "No") for c in categories[name]]
    marks = [c for name in ("Mn", "Mc", "Me") for c in categories[name]]
    spaces = [c for c in map(chr, range(0x3001)) if c.isspace() or regex.match(r"\s", c)] + ["\u180e", "\ufeff"]
    contractions = [
        f"{word}{apostrophe}{end}{tail}"
        for word in ("we", "WE", " ", "", "é", "1")
        for apostrophe in "'\u2019\u02bc\uff07`"
        for end in (
            "s",
            "t",
            "re",
            "ve",
            "m",
            "ll",
            "d",
            "S",
            "T",
            "Re",
            "rE",
            "VE",
            "M",
            "LL",
            "lL",
            "D",
            "\u017f",
            "x",
        )
        for tail in ("", "s", " ")
    ]
    return texts | {
        "scripts": neighbourhoods(by_script(letters)),
        "digits": "".join(digits) + " ".join(digits),
        "whitespace": "".join(f"{a}{b}x{b}{a}{a} {b}" for a in spaces for b in spaces),
        "runs of whitespace": "".join(f"{c * n}x" for c in spaces for n in (1, 2, 3, 9)),
        "combining": "".join(f"e{a}{b}  {a}{b}{a}" for a, b in zip(marks, reversed(marks), strict=True)),
        "contractions": "|".join(contractions) + "".join(contractions),
        "long runs": "".join(c * n for c in "a é数😀\u0301\n\t'1!\0" for n in (2, 63, 64, 65, 1000)),
        "emoji": "👩‍👩‍👧‍👦🏳️‍🌈 🇩🇪🇫🇷 ☎️ 1️⃣ 👍🏽 \U000e0067 ♀️",
        "right to left": "مرحبا بالعالم، ١٢٣. שלום עולם\u200f \u202eabc\u202c 'ה",
        "marks of byte order": "\ufeffa\ufeff \ufeff\ufffe \uffff\n\ufeff",
        "control": "".join(map(chr, [*range(0x20), *range(0x7F, 0xA0)])) * 2 + "\0\0a\0 \0",
        "line ends": "\r\n\r\nCRLF\r\n\n\r \n\t x  \n  y\u2028z\u0085w ",
        "numbers": "1e-5 0x1F 3,141.59 ½ⅷ²٣ 100000000 1a1",
        "empty": "",
        "space": " ",
    }


TORTURE = torture()
# Characters that this Python does not know yet are letters in one library and none in another, by their tables' age.
UNASSIGNED = "category Cn"


class Three:
    """One tokenizer of two files, as we read it, as tiktoken does, and as the tokenizers library does."""

    def __init__(self, folder):
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks
        from tiktoken_ext.openai_public import r50k_pat_str

        files = (str(folder / "vocab.bpe"), str(folder / "encoder.json"))
        self.ours = Tokenizer.from_gpt2_files(*files)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TIKTOKEN_CACHE_DIR", "")
            ranks = data_gym_to_mergeable_bpe_ranks(*files)
        self.tiktoken = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
        self.tokenizers = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(files[1], files[0]))
        self.tokenizers.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    tokenizer = Tokenizer.train([TEXT, *spread(list(TORTURE.values()), 10)], vocab_size=600)
    return Three(write_two_files(tokenizer, tmp_path_factory.mktemp("trained")))


@pytest.fixture(scope="module", params=["trained", pytest.param("gpt2", marks=needs_gpt2)])
def three(request, trained):
    return trained if request.param == "trained" else Three(SHARED / "gpt2")


@pytest.fixture(scope="module")
def auto(trained, tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("auto")
    trained.ours.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_the_torture_set_has_all_of_it():
    together = "".join(TORTURE.values())
    assert {unicodedata.category(c) for c in together} == {
        unicodedata.category(c) for c in map(chr, range(0x110000))
    } - {"Cs"}
    scripts = {unicodedata.name(c, "?").split()[0] for c in together if c.isalpha()}
    assert {"LATIN", "GREEK", "CYRILLIC", "HEBREW", "ARABIC", "DEVANAGARI", "THAI", "HANGUL", "CJK", "GOTHIC"} < scripts
    assert len(scripts) > 140
    assert max(together) > "\U00100000"


@pytest.mark.parametrize("name", TORTURE)
def test_ids_are_tiktokens_and_the_tokenizers_librarys(three, name):
    text = TORTURE[name]
    ids = three.ours.encode(text)
    assert three.ours.decode(ids) == text
    assert three.ours.encode_batch([text, text]) == [ids, ids]
    assert three.tiktoken.encode_ordinary(text) == ids
    if name != UNASSIGNED:
        assert three.tokenizers.encode(text).ids == ids


@pytest.mark.parametrize("name", TORTURE)
def test_ids_of_a_trained_tokenizer_are_transformers(trained, auto, name):
    if name != UNASSIGNED:
        assert auto(TORTURE[name])["input_ids"] == trained.ours.encode(TORTURE[name])
        assert auto.decode(trained.ours.encode(TORTURE[name])) == TORTURE[name]


@given(st.text(max_size=80) | st.text("abetionsr 's\n\t0é数😀", max_size=120))
@settings(max_examples=200, deadline=None)
def test_ids_of_any_text_are_tiktokens(three, text):
    assert three.tiktoken.encode_ordinary(text) == three.ours.encode(text)


@given(st.text("abetionsrVEL \u3000'\u2019s\n\r\t0½é数😀\u0301\0", max_size=120))
@settings(max_examples=200, deadline=None)
def test_ids_of_any_text_are_the_tokenizers_librarys(three, text):
    assert three.tokenizers.encode(text).ids == three.ours.encode(text)


def test_the_split_pattern_without_backtracking_splits_alike(trained):
    """Against the pattern as GPT-2 published it, in the regex package."""
    for name, text in TORTURE.items():
        if name != UNASSIGNED:
            pieces = regex.findall(GPT2_PATTERN, text)
            assert trained.ours.encode(text) == [i for piece in pieces for i in trained.ours.encode(piece)], name


@needs_gpt2
def test_gpt2s_published_facts():
    gpt2 = Tokenizer.from_pretrained(SHARED / "gpt2")
    assert gpt2.vocab_size == 50257
    assert gpt2.eot_id == 50256
    assert gpt2.encode("Hello, world!") == [15496, 11, 995, 0]


@needs_gpt2
@pytest.mark.skipif(not (SHARED / "tiny_shakespeare.txt").exists(), reason="needs tiny_shakespeare.txt")
def test_shakespeares_ids_are_gpt2s():
    gpt2 = Three(SHARED / "gpt2")
    text = (SHARED / "tiny_shakespeare.txt").read_bytes().decode()
    ids = gpt2.ours.encode(text)
    assert ids == gpt2.tiktoken.encode_ordinary(text) == gpt2.tokenizers.encode(text).ids
    assert gpt2.ours.decode(ids) == text
    # What nanoGPT's data/shakespeare says of this text.
    assert len(gpt2.ours.encode(text.rstrip("\n") + "\n")) == 301_966 + 36_059
