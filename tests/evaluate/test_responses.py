from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt import GPT, GPTConfig
from fastgpt.evaluate.responses import exact_match, greedy, longest_common_subsequence, rouge_l, words


def test_words():
    assert words("  The CAT's (two) hats,\n3.5_m — Straße ") == [
        "the",
        "cat",
        "s",
        "two",
        "hats",
        "3",
        "5",
        "m",
        "strasse",
    ]
    assert words("?!") == []


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        ("Paris.", " paris", True),
        ("The  capital\nis Paris!", "the capital is paris", True),
        ("Paris, France", "Paris", False),
        ("", "Paris", False),
        ("!", "!", True),
        ("+", "-", False),
    ],
)
def test_exact_match(answer, expected, same):
    assert exact_match(answer, expected) is same


@pytest.mark.parametrize(
    ("answer", "expected", "f1"),
    [
        # Lin 2004's own example: "police killed the gunman" against two candidates of as many words, L = 3 and 2.
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("The cat sat.", "the cat sat on the mat", 2 * 3 / (3 + 6)),
        ("a b c", "c b a", 1 / 3),
        ("same words", "Same, words!", 1.0),
        ("", "a", 0.0),
        ("nothing", "alike", 0.0),
    ],
)
def test_rouge_l_by_hand(answer, expected, f1):
    assert rouge_l(answer, expected) == pytest.approx(f1)


def brute_force(a, b):
    def subsequences(x):
        return {s for n in range(len(x) + 1) for s in combinations(x, n)}

    return max(map(len, subsequences(a) & subsequences(b)))


@given(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), max_size=8))
@settings(max_examples=200, deadline=None)
def test_longest_common_subsequence_is_the_brute_force_one(a, b):
    assert longest_common_subsequence(a, b) == brute_force(a, b)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig.preset("micro", vocab_size=40)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def test_greedy_is_generate_for_each_prompt(model):
    rng = torch.Generator().manual_seed(1)
    lengths = [1, 20, 3, 3, 50, 7, 20]
    prompts = [torch.randint(40, (n,), generator=rng).tolist() for n in lengths]
    alone = [model.generate(torch.tensor([p]), 12, temperature=0)[0, len(p) :].tolist() for p in prompts]
    end = alone[0][4]
    assert sum(end in a for a in alone) > 1
    cut = [a[: a.index(end)] if end in a else a for a in alone]
    for batch_size in (1, 3, 8):
        done = []
        assert greedy(model, prompts, 12, (), batch_size) == alone
        assert greedy(model, prompts, 12, {end}, batch_size, done.append) == cut
        assert done[-1] == len(prompts)
    assert greedy(model, prompts, 1) == [a[:1] for a in alone]
