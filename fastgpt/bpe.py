"""Trains a byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909; on bytes: Radford et al. 2019).

Each word starts as its bytes. The pair of neighbours that occurs most often in all words becomes a new token and is
merged wherever it stands; again, until there are as many tokens as asked for. Ties go to the smallest pair of ids, so
the same text always gives the same merges.

Counting every pair again for each merge would take hours. Here the counts are kept: a merge changes only the words that
hold its pair, which an index finds, and a heap gives the most frequent pair. Entries of the heap that a later count has
made stale are passed over when they come up.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from itertools import pairwise

import regex

Pair = tuple[int, int]


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
    """The first `merges` merges, each a pair of ids; merge i makes the id 256 + i. Fewer if no pair is left.

    Args:
        words: how often each word occurs.
        byte_ids: the id of each of the 256 bytes.
        progress: called after each merge with how many there are.
    """
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
