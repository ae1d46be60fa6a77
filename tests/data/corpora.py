"""Corpora of every format for the tests of reading and preparing, small enough for batches of a few thousand bytes."""

import gzip
import json
import random

WORDS = "the|cat|sat|on|a|mat;|Ünïcödé|日本語、|привет|123|\t'll|don't|x|=|[1,\n\n|".split("|")  # noqa: SIM905


def texts(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) or "." for _ in range(count)]


def write_all_formats(folder) -> None:
    """A folder with a file of each format; some of them much larger than the others."""
    import pyarrow
    import pyarrow.parquet
    import zstandard

    def lines(seed):
        return "".join(json.dumps({"text": t, "n": seed}) + "\n" for t in texts(80, seed)).encode()

    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts(40, seed=1)):
        (folder / f"a{i:02d}.txt").write_text(text)
    (folder / "b.jsonl").write_bytes(lines(2) + b"\n" * 3000 + lines(3))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines(4)))
    (folder / "d.jsonl.zst").write_bytes(zstandard.compress(lines(5)) + zstandard.compress(lines(6)))
    table = pyarrow.table({"n": range(100), "text": [*texts(99, seed=7), None]})
    pyarrow.parquet.write_table(table, folder / "e.parquet", row_group_size=40)
    (folder / "f.txt").write_text(" ".join(texts(200, seed=8)))
    (folder / "g.txt.gz").write_bytes(gzip.compress("\n".join(texts(100, seed=9)).encode()))
    (folder / "h.txt.zst").write_bytes(zstandard.compress(" ".join(texts(50, seed=10)).encode()))


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
