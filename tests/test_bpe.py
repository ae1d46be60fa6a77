import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.bpe import count_words, train_merges
from fastgpt.tokenizer import BYTE_IDS, GPT2_PATTERN


def textbook(words, merges):
    """The algorithm as it is taught: count every pair again, merge the most frequent, of ties the smallest."""
    spelled = {word: [BYTE_IDS[b] for b in word.encode()] for word in words}
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
    "overlaps": "aaaa aaa aa aaaaa baaab abab ababab",
    "words": "low low low lower lower newest newest newest newest widest widest " * 3,
    "unicode": "Größe größer 数学 数学 数字 😀😀 e\u0301 naïve naive\n" * 2,
    "random": "".join(random.Random(0).choices("abc \n", k=3000)),
    "empty": "",
}


@pytest.mark.parametrize("name", CORPORA)
def test_merges_are_the_textbooks(name):
    words = count_words([CORPORA[name]], GPT2_PATTERN)
    assert train_merges(words, 60, BYTE_IDS) == textbook(words, 60)


@given(st.lists(st.text("abcé \n", max_size=30), max_size=8))
@settings(max_examples=150, deadline=None)
def test_merges_are_the_textbooks_on_random_text(texts):
    words = count_words(texts, GPT2_PATTERN)
    assert train_merges(words, 25, BYTE_IDS) == textbook(words, 25)


def test_the_order_of_the_texts_does_not_matter():
    texts = CORPORA["random"].split("\n")
    forward = train_merges(count_words(texts, GPT2_PATTERN), 50, BYTE_IDS)
    assert forward == train_merges(count_words(reversed(texts), GPT2_PATTERN), 50, BYTE_IDS)


def test_progress_counts_merges():
    seen = []
    made = train_merges(count_words(["abab abab cd"], GPT2_PATTERN), 100, BYTE_IDS, seen.append)
    assert seen == list(range(1, len(made) + 1))
    assert 0 < len(made) < 100
