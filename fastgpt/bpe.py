"""Trains a byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909; on bytes: Radford et al. 2019).

Each word starts as its bytes. The pair of neighbours that occurs most often in all words becomes a new token and is
merged wherever it stands; again, until there are as many tokens as asked for. Ties go to the smallest pair of ids, so
the same text always gives the same merges.

The native trainer (csrc/bpe) does this where it was built. What stands here in Python does the same where it was not,
some forty times as slowly.

Counting every pair again for each merge would take hours. Here the counts are kept: a merge changes only the words that
hold its pair, which an index finds, and a heap gives the most frequent pair. Entries of the heap that a later count has
made stale are passed over when they come up.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import cache
from itertools import pairwise

import regex

from fastgpt.cpus import cpus
from fastgpt.errors import UserError

try:
    from fastgpt import _bpe
except ImportError as error:
    _bpe = None  # type: ignore[assignment]
    _missing = str(error)

Pair = tuple[int, int]

# How text is split into words, which merges never cross: as for GPT-2 (Radford et al. 2019), and as for GPT-4
# (tiktoken's cl100k_base). tokenizer.json holds them as they stand here; csrc/bpe/splitter.h splits as they do.
PATTERNS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def trainer_line() -> str:
    """Which of the two trainers is taken and why, for `fastgpt info`."""
    if _bpe is not None:
        return "BPE trainer: C++ (fastgpt._bpe is built and loaded)"
    return f"BPE trainer: plain Python ({_missing}): install a C++ compiler and pybind11, then fastgpt again"


@cache
def character_classes() -> bytes:
    """A byte for each code point: 1 for \\p{L}, 2 for \\p{N}, 3 for \\s, 0 for all others."""
    characters = "".join(map(chr, range(0x110000)))
    classes = bytearray(len(characters))
    for number, pattern in enumerate((r"\p{L}+", r"\p{N}+", r"\s+"), 1):
        for match in regex.finditer(pattern, characters):
            start, end = match.span()
            classes[start:end] = bytes([number]) * (end - start)
    return bytes(classes)


def learn_merges(
    texts: Iterable[str],
    pattern: str,
    merges: int,
    byte_ids: list[int],
    progress: Callable[[int], None] | None = None,
    threads: int | None = None,
) -> list[Pair]:
    """The first `merges` merges, each a pair of ids; merge i makes the id 256 + i. Fewer if no pair is left.

    Memory grows with the distinct words of the texts, by 100 to 300 bytes each. Lone surrogates count as "?".

    Args:
        texts: read once, one at a time.
        pattern: a name in PATTERNS.
        byte_ids: the id of each of the 256 bytes.
        progress: called now and then while merging, and at its end, with how many merges there are.
        threads: that count words; None for as many as there are CPUs for this process. They change no merge.

    Raises:
        UserError: the distinct words have more than 4 GiB.
    """
    if _bpe is None:
        return train_merges(count_words(texts, PATTERNS[pattern]), merges, byte_ids, progress)
    try:
        return _bpe.train(
            texts, pattern == "cl100k", character_classes(), merges, byte_ids, threads or cpus(), progress
        )
    except OverflowError as error:
        raise UserError(f"{error}: give fewer texts") from None


def count_words(texts: Iterable[str], pattern: str) -> Counter[str]:
    """How often each piece of the split pattern occurs. Memory grows with the distinct pieces, not with the texts."""
    split = regex.compile(pattern)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(split.findall(text))
    return counts


def train_merges(
    words: Counter[str],
    merges: int,
    byte_ids: list[int],
    progress: Callable[[int], None] | None = None,
) -> list[Pair]:
    """`learn_merges` from how often each word occurs."""
    ordered = sorted(words.items())  # whatever order the texts came in
    spelled = [[byte_ids[b] for b in word.encode("utf-8", "replace")] for word, _ in ordered]
    counts = [count for _, count in ordered]
    pair_count: dict[Pair, int] = defaultdict(int)
    pair_words: dict[Pair, set[int]] = defaultdict(set)
    for i, ids in enumerate(spelled):
        for pair in pairwise(ids):
            pair_count[pair] += counts[i]
            pair_words[pair].add(i)
    heap = [(-count, pair) for pair, count in pair_count.items()]
    heapq.heapify(heap)

    made: list[Pair] = []
    while len(made) < merges and heap:
        count, pair = heapq.heappop(heap)
        if -count != pair_count[pair] or not count:
            continue  # stale: this pair's present count has an entry of its own
        new_id = 256 + len(made)
        made.append(pair)
        changed: set[Pair] = set()
        for i in pair_words.pop(pair):
            old = spelled[i]
            new = _merge(old, pair, new_id)
            if len(new) == len(old):
                continue  # an earlier merge has taken the pair out of this word
            for p in pairwise(old):
                pair_count[p] -= counts[i]
                changed.add(p)
            for p in pairwise(new):
                pair_count[p] += counts[i]
                pair_words[p].add(i)
                changed.add(p)
            spelled[i] = new
        for p in changed:
            if pair_count[p]:
                heapq.heappush(heap, (-pair_count[p], p))
        if progress:
            progress(len(made))
    if progress:
        progress(len(made))
    return made


def _merge(ids: list[int], pair: Pair, new_id: int) -> list[int]:
    """`ids` with each occurrence of the pair, from the left, replaced by the new id."""
    first, second = pair
    out, i, last = [], 0, len(ids) - 1
    while i <= last:
        if ids[i] == first and i < last and ids[i + 1] == second:
            out.append(new_id)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out
