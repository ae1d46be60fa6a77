import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import regex
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt import Tokenizer, UserError, bpe
from fastgpt.bpe import PATTERNS, character_classes, learn_merges
from fastgpt.tokenizer import _FAST_PATTERN, BYTE_IDS, CHARACTER

native = pytest.mark.skipif(bpe._bpe is None, reason="needs fastgpt._bpe")
linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
both_patterns = pytest.mark.parametrize("pattern", PATTERNS)


def textbook(texts, pattern, merges):
    """The algorithm as it is taught: count every pair again, merge the most frequent, of ties the smallest."""
    words = Counter(word for text in texts for word in regex.findall(PATTERNS[pattern], text))
    spelled = {word: [BYTE_IDS[b] for b in word.encode("utf-8", "replace")] for word in words}
    made = []
    while len(made) < merges:
        pairs = Counter()
        for word, ids in spelled.items():
            for pair in pairwise(ids):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        made.append(best)
        for word, ids in spelled.items():
            out = []
            for i in ids:
                if out and (out[-1], i) == best:
                    out[-1] = 255 + len(made)
                    continue
                out.append(i)
            spelled[word] = out
    return made


CORPORA = {
    "overlaps": "aaaa aaa aa aaaaa baaab abab ababab " + "a" * 37 + " " + "ab" * 21 + "aab" * 9,
    "words": "low low low lower lower newest newest newest newest widest widest " * 3,
    "unicode": "Größe größer 数学 数学 数字 😀😀 e\u0301 naïve naive\n" * 2,
    "code": "if x:\n    return 1234567  # don't\n\n\tDON'T('\u017f')\r\n" * 3,
    "long words": "abcabcabdabcd" * 40 + " " + "".join(random.Random(1).choices("abc", k=400)),
    "random": "".join(random.Random(0).choices("abc \n", k=3000)),
    "empty": "",
}
TEXTS = st.lists(st.text(max_size=40) | st.text("abé S's \n\r1", max_size=60), max_size=8)


@pytest.fixture(params=["C++", "Python"])
def trainer(request, monkeypatch):
    if request.param == "Python":
        monkeypatch.setattr(bpe, "_bpe", None)
    elif bpe._bpe is None:
        pytest.skip("needs fastgpt._bpe")


@pytest.fixture
def in_python(monkeypatch):
    """learn_merges of the trainer in Python."""

    def learn(*args):
        with monkeypatch.context() as patch:
            patch.setattr(bpe, "_bpe", None)
            return learn_merges(*args)

    return learn


@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
def test_the_native_trainer_is_built_where_a_compiler_is():
    assert bpe._bpe is not None
    assert "C++" in bpe.trainer_line()


@both_patterns
@pytest.mark.parametrize("name", CORPORA)
def test_merges_are_the_textbooks(name, pattern, trainer):
    texts = [CORPORA[name]]
    assert learn_merges(texts, pattern, 120, BYTE_IDS) == textbook(texts, pattern, 120)


@native
@given(TEXTS, st.sampled_from([*PATTERNS]), st.integers(0, 60), st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_merges_are_the_textbooks_on_any_text(texts, pattern, merges, threads):
    assert learn_merges(texts, pattern, merges, BYTE_IDS, None, threads) == textbook(texts, pattern, merges)


@both_patterns
@native
def test_many_merges_are_those_of_the_trainer_in_python(pattern, in_python):
    texts = [Path(module.__file__).read_text() for module in (random, shutil, signal, subprocess)]
    made = learn_merges(texts, pattern, 100_000, BYTE_IDS)
    assert len(made) > 5000
    assert made == in_python(texts, pattern, 100_000, BYTE_IDS)


@native
def test_neither_threads_nor_order_nor_how_text_is_cut_matter(in_python):
    """Texts longer than what a thread takes at once, one without a place to cut, and many short and empty ones."""
    rng = random.Random(2)
    words = ["Größe", "naïve", " 数学", "'ll", " don't", "1234567", "!?", "\n\n", "\r\n", "\t", "  ", " x"]
    long = ["".join(rng.choices(words, k=120_000)), "naïve,Größe;" * 25_000, *rng.choices(words, k=5000)]
    texts = [*long, *[""] * 5000]
    made = in_python(texts, "gpt2", 60, BYTE_IDS)
    for threads in (1, 2, 5):
        assert learn_merges(iter(texts), "gpt2", 60, BYTE_IDS, None, threads) == made
    assert learn_merges(reversed(texts), "gpt2", 60, BYTE_IDS) == made
    assert learn_merges(texts, "cl100k", 60, BYTE_IDS) == in_python(texts, "cl100k", 60, BYTE_IDS)


@native
def test_large_counts(in_python):
    texts = ["ab abc abd " * 70_000, "ab aab " * 10_000]
    assert learn_merges(texts, "gpt2", 9, BYTE_IDS) == in_python(texts, "gpt2", 9, BYTE_IDS)


def test_a_lone_surrogate_counts_as_a_question_mark(trainer):
    broken, mended = ["a\ud800é a\ud800é b?"], ["a?é a?é b?"]
    assert learn_merges(broken, "gpt2", 9, BYTE_IDS) == learn_merges(mended, "gpt2", 9, BYTE_IDS)


@both_patterns
def test_tokens_are_those_of_the_tokenizers_library(pattern):
    texts = [Path(module.__file__).read_text() for module in (random, shutil, signal, subprocess)]
    parts = tokenizers.pre_tokenizers
    split = parts.Split(tokenizers.Regex(PATTERNS[pattern]), "isolated")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = parts.Sequence([split, parts.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = parts.ByteLevel.alphabet()
    options = {"vocab_size": 5000, "min_frequency": 0, "initial_alphabet": alphabet, "show_progress": False}
    theirs.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(**options))
    ours = Tokenizer.train(texts, 5000, special_tokens=(), pattern=pattern).vocab
    assert {"".join(CHARACTER[b] for b in token): i for token, i in ours.items()} == theirs.get_vocab()


def letters(size):
    return bytes(b"abcdefgh"[b % 8] for b in random.Random(3).randbytes(size)).decode()


@native
@pytest.mark.parametrize(("word", "merges"), [("a" * 2**22, 22), (letters(1_000_000), 5000)], ids=["same", "random"])
def test_one_huge_word_takes_linear_time(word, merges):
    started = time.monotonic()
    assert len(learn_merges([word], "gpt2", 5000, BYTE_IDS)) == merges
    assert time.monotonic() - started < 20  # a merge that walks the whole word would take minutes


@native
def test_more_ids_than_two_bytes_hold():
    text = letters(400_000)
    tokenizer = Tokenizer.train([text], 70_000)
    ids = tokenizer.encode(text)
    assert max(ids) > 2**16
    assert tokenizer.decode(ids) == text


def test_progress_counts_merges(trainer):
    seen = []
    made = learn_merges([CORPORA["random"]], "gpt2", 100_000, BYTE_IDS, seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == len(made)
    assert 0 < len(made) < 100_000


def test_errors_of_the_texts_and_of_progress_come_through(trainer):
    def texts():
        yield from ["some text " * 100_000] * 5
        raise OSError("the disk is gone")

    def progress(_):
        raise LookupError("nobody listens")

    with pytest.raises(OSError, match="the disk is gone"):
        learn_merges(texts(), "gpt2", 9, BYTE_IDS)
    with pytest.raises(LookupError, match="nobody listens"):
        learn_merges(["some text"], "gpt2", 9, BYTE_IDS, progress)
    with pytest.raises(TypeError):
        learn_merges(["some text", b"bytes"], "gpt2", 9, BYTE_IDS)


def test_no_other_pattern():
    with pytest.raises(UserError, match="no split pattern 'gpt4': it is gpt2 or cl100k"):
        Tokenizer.train(["some text"], 260, pattern="gpt4")


def test_the_command_line_names_the_pattern(cli, corpus, tmp_path):
    args = ["tokenizer", "train", "--input", corpus, "--vocab-size", 270, "--out", tmp_path, "--pattern", "cl100k"]
    code, _, err = cli(*args)
    assert code == 0, err
    assert Tokenizer.from_pretrained(tmp_path).pattern == PATTERNS["cl100k"]


# How text splits


def native_split(text, pattern):
    return bpe._bpe.split(text, pattern == "cl100k", character_classes())


def same_splits(text, pattern):
    return native_split(text, pattern) == [w.encode("utf-8", "replace") for w in regex.findall(PATTERNS[pattern], text)]


@native
@both_patterns
def test_every_code_point_splits_as_the_regex_package_splits_it(pattern):
    """Between letters and between numbers, alone and in a run, before and behind spaces, behind an apostrophe."""
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    for start in range(0, len(characters), 1 << 16):
        part = characters[start : start + (1 << 16)]
        assert same_splits("".join(part), pattern)
        assert same_splits("".join(f"a{c}b '{c}" for c in part), pattern)
        if start < 1 << 17:  # the planes that have scripts
            assert same_splits("".join(f"1{c}1 {c}{c}  {c}\n{c}!{c}\r" for c in part), pattern)


@native
@both_patterns
@given(
    st.text(max_size=60)
    | st.text("a1! '\n\r\t", max_size=40)
    | st.lists(
        st.sampled_from([*"'  \n\r\tsSdtTmrRevELl\u017f\u212a1٣é数!\u0301\u00a0\u2028\u3000\x1c\x85\u180e😀"]),
        max_size=40,
    ).map("".join)
)
@settings(max_examples=400, deadline=None)
def test_any_text_splits_as_the_regex_package_splits_it(pattern, text):
    assert same_splits(text, pattern)


@both_patterns
@given(st.text("ab1! '\n\r\tsSl\u017f\u00a0", max_size=30), st.integers(0, 700), st.sampled_from("  \t\n\u3000"))
@settings(max_examples=200, deadline=None)
def test_the_patterns_without_backtracking_split_alike(pattern, text, size, space):
    text = text[:9] + space * size + text[9:]
    full = PATTERNS[pattern]
    assert regex.findall(_FAST_PATTERN[full], text) == regex.findall(full, text)


TORTURE = [
    *CORPORA.values(),
    "  two  spaces \t\n\n \n\t x\r\n\r\nCRLF\r\n  ",
    "'s 'S 'll 'LL don't DON'T ''s '\u017f 'Ve 'rE",
    "1234567890 ١٢٣٤ ⅷ ² ½ 1e-5 0x1F 3.14159",
    "\u00e9 \u0301 \u200d\u200b\ufeff\u00a0x\u3000y\u2028z\u0085w\x1cv\u180eu",
    "👩‍👩‍👧‍👦🏳️‍🌈 🇩🇪 ☎️ नमस्ते สวัสดี مرحبا שלום 안녕하세요 你好 \x00\x7f\x80 \U0010ffff\ue000",
    "x" + " " * 3000 + "y" + "\n" * 3000 + "\t" * 500,
]


@both_patterns
def test_both_patterns_give_the_same_ids_in_transformers(pattern, tmp_path):
    from transformers import AutoTokenizer

    trained = Tokenizer.train(TORTURE, 700, pattern=pattern)
    trained.save_pretrained(tmp_path)
    auto, again = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.from_pretrained(tmp_path)
    assert again.hash == trained.hash
    assert again.pattern == PATTERNS[pattern]
    for text in TORTURE:
        ids = trained.encode(text)
        assert trained.decode(ids) == text
        assert again.encode(text) == auto(text)["input_ids"] == ids


@both_patterns
@pytest.mark.parametrize("text", [" " * 3_000_000 + "end", "a\n" + "\u3000" * 1_500_000 + "b"], ids=["ascii", "wide"])
def test_millions_of_spaces_before_a_word(pattern, text):
    tokenizer = Tokenizer.train(["a text"], 257, pattern=pattern)
    assert tokenizer.decode(tokenizer.encode(text)) == text


# What only a process shows

# A shell may start tests in the background with the signal ignored, which their processes would inherit.
INTERRUPTED = """
import itertools, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from fastgpt.bpe import learn_merges
from fastgpt.tokenizer import BYTE_IDS

def texts():
    text = "so many words, " * 1000
    yield text
    print("counting", flush=True)
    yield from itertools.repeat(text)

learn_merges(texts(), "gpt2", 1000, BYTE_IDS)
"""


def stopped(*args, at):
    """Runs Python, interrupts it when it says `at`: its exit code, its errors, and how many seconds of the CPU it took
    from the signal to its end. (How long that is by the clock is up to what else runs here.)"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    p = subprocess.Popen([sys.executable, "-c", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while p.stdout.readline().strip() != at:
            assert p.poll() is None, p.stderr.read()
        time.sleep(0.2)
        fields = Path(f"/proc/{p.pid}/stat").read_text().rpartition(")")[2].split()
        p.send_signal(signal.SIGINT)
        _, err = p.communicate(timeout=60)
    finally:
        p.kill()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    all_of_it = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return p.returncode, err, all_of_it - (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@native
@linux
def test_ctrl_c_stops_counting_at_once():
    _, err, seconds = stopped(INTERRUPTED, at="counting")
    assert err.strip().endswith("KeyboardInterrupt")
    assert seconds < 1


TELLING = """
import contextlib, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import fastgpt.cli.tokenizer as command
from fastgpt.cli import main

@contextlib.contextmanager
def counter(console, verb, *_):
    yield lambda n: print(verb, flush=True)

command.counter = counter
sys.argv[0] = "fastgpt"
main()
"""


@native
@linux
def test_ctrl_c_stops_merging_at_once_and_leaves_nothing(tmp_path):
    (tmp_path / "text.txt").write_text(letters(1_000_000) * 12)
    out = tmp_path / "out"
    args = ["tokenizer", "train", "--input", tmp_path / "text.txt", "--vocab-size", "400000", "--out", out]
    code, err, seconds = stopped(TELLING, *args, at="merging")
    assert (code, err) == (130, "")
    assert not out.exists()
    assert seconds < 1


MEMORY = """
from pathlib import Path
from fastgpt.bpe import learn_merges
from fastgpt.tokenizer import BYTE_IDS

def texts(n):
    for i in range(n):
        yield "Größe und %d kleine Wörter, " % (i % 5) * 40_000

def peak(n):
    learn_merges(texts(n), "gpt2", 100, BYTE_IDS, None, 2)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith("VmHWM"))

print(peak(20), peak(200))  # 20 MB, 200 MB
"""


@native
@linux
def test_memory_does_not_grow_with_the_text():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    short, long = map(int, done.stdout.split())
    assert long - short < 16 * 1024  # KiB
