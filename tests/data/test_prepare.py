"""fastgpt data prepare: the same bytes whoever encodes and whenever it was stopped, and one line for what is bad."""

import gzip
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from corpora import content, texts, write_all_formats
from preparer import small_batches

from fastgpt import Tokenizer
from fastgpt.data import Corpus, TokenDataset
from fastgpt.data import prepare as prepare_with_processes
from fastgpt.data.documents import Skipped
from fastgpt.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return Tokenizer.from_pretrained(tokenizer_dir)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats") / "all"
    write_all_formats(folder)
    return folder


@pytest.fixture(autouse=True, scope="module")
def without_waiting_for_the_disk():
    """Which no process that is killed needs; each of the tests writes hundreds of journals."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("fastgpt.files", "fastgpt.data.shards"):
            patch.setattr(f"{module}.fsync", lambda path: None)
        yield


@pytest.fixture
def small(monkeypatch):
    small_batches(monkeypatch.setattr)


@pytest.fixture
def journalled(monkeypatch):
    small_batches(monkeypatch.setattr, journal_seconds=0.0)


@pytest.fixture(scope="module")
def whole(everything, tokenizer, tmp_path_factory):
    """What an undisturbed run makes of everything, in small batches, in one process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        small_batches(patch.setattr)
        prepare(corpus_of(everything), tokenizer, out, shard_tokens=5000)
    return content(out)


def corpus_of(*paths, **options):
    return Corpus(input=tuple(map(str, paths)), **options)


def prepare(corpus, tokenizer, out, workers=1, **options):
    return prepare_with_processes(corpus, tokenizer, out, workers=workers, **options)


def documents_of(folder, split, tokenizer):
    data = TokenDataset.open(folder, split)
    starts = [*data.document_starts.tolist(), len(data)]
    found = [data.tokens(a, b).tolist() for a, b in pairwise(starts)]
    assert all(ids[-1] == tokenizer.eot_id and tokenizer.eot_id not in ids[:-1] for ids in found)
    return [tokenizer.decode(ids[:-1]) for ids in found]


# Whoever encodes


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_workers_changes_no_byte(small, everything, whole, tokenizer, tmp_path, workers):
    prepare(corpus_of(everything), tokenizer, tmp_path / "out", shard_tokens=5000, workers=workers)
    assert content(tmp_path / "out") == whole
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_every_format_gives_its_documents(small, everything, tokenizer, tmp_path):
    meta = prepare(corpus_of(everything), tokenizer, tmp_path / "out", val_fraction=0.2, shard_tokens=5000)
    found = [text for split in ("train", "val") for text in documents_of(tmp_path / "out", split, tokenizer)]
    in_lines = [text for seed in (2, 3, 4, 5, 6) for text in texts(80, seed)]
    large = [" ".join(texts(200, seed=8)), "\n".join(texts(100, seed=9)), " ".join(texts(50, seed=10))]
    expected = [*texts(40, seed=1), *in_lines, *texts(99, seed=7), *large]
    assert sorted(found) == sorted(text for text in expected if text)
    assert sum(part["bytes"] for part in meta["splits"].values()) == sum(len(t.encode()) for t in expected)


def test_a_worker_needs_no_torch():
    code = "import sys, fastgpt.data.encode; print(sorted({'torch', 'pyarrow', 'rich', 'tyro'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr


# Large texts


def test_the_end_of_a_single_large_text_is_for_validation(small, tokenizer, tmp_path):
    text = "\n".join(texts(400, seed=3))
    path = tmp_path / "one.txt"
    path.write_text(text)
    for seed in range(4):  # by its hash it belongs to either side
        out = tmp_path / f"out_{seed}"
        meta = prepare(corpus_of(path), tokenizer, out, seed=seed, val_fraction=0.3, shard_tokens=999)
        (train,), (val,) = (documents_of(out, split, tokenizer) for split in ("train", "val"))
        assert train + val == text
        assert train.endswith("\n")
        assert 0.27 < len(val) / len(text) < 0.33
        assert meta["splits"]["train"]["bytes"] == len(train.encode())
        assert meta["splits"]["val"]["bytes"] == len(val.encode())
        options = {"seed": seed, "val_fraction": 0.3, "shard_tokens": 999}
        stopped(corpus_of(path), tokenizer, tmp_path / f"again_{seed}", batches=9, **options)
        prepare(corpus_of(path), tokenizer, tmp_path / f"again_{seed}", **options)
        assert content(tmp_path / f"again_{seed}") == content(out)


def test_a_large_text_without_a_place_to_cut(small, tokenizer, tmp_path):
    """It is cut between two characters, so that nothing is lost."""
    (tmp_path / "one.txt").write_text("ü€𝄞" * 4000)
    (tmp_path / "two.txt").write_text("two")
    prepare(corpus_of(tmp_path), tokenizer, tmp_path / "out")
    found = [t for split in ("train", "val") for t in documents_of(tmp_path / "out", split, tokenizer)]
    assert sorted(found) == ["two", "ü€𝄞" * 4000]


def test_of_a_few_large_documents_each_split_has_one(small, tokenizer, tmp_path):
    expected = [" ".join(texts(20, seed=i)) for i in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in expected))
    for val_fraction in (1e-9, 1 - 1e-9):
        out = tmp_path / f"out_{val_fraction}"
        meta = prepare(corpus_of(tmp_path / "a.jsonl"), tokenizer, out, val_fraction=val_fraction, shard_tokens=999)
        found = [documents_of(out, split, tokenizer) for split in ("train", "val")]
        assert [*found[0], *found[1]] == expected if val_fraction < 0.5 else [*found[1], *found[0]] == expected
        assert sorted(map(len, found)) == [1, 2]
        for split, documents in zip(("train", "val"), found, strict=True):
            assert meta["splits"][split]["bytes"] == sum(len(text.encode()) for text in documents)


@pytest.fixture
def half_bad(tmp_path):
    """Of four texts, two are large and bad behind their middle; and the good large one."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    good = " ".join(texts(60, seed=4))
    (folder / "a.txt").write_text("first")
    (folder / "b.txt").write_bytes(good.encode() + b"\xff" + good.encode())
    (folder / "c.txt").write_text(good)
    (folder / "d.txt.gz").write_bytes(gzip.compress(good.encode() + b"more")[:-20])
    return folder, good


@pytest.mark.parametrize("held_back", [10**9, 100])
def test_a_large_text_that_turns_out_bad_leaves_no_piece(small, half_bad, tokenizer, tmp_path, monkeypatch, held_back):
    """Dropped from memory, and from the disk."""
    folder, good = half_bad
    monkeypatch.setattr("fastgpt.data.preparation.HELD_BACK", held_back)
    skipped = Skipped()
    prepare(corpus_of(folder, skip_bad=True), tokenizer, tmp_path / "out", skipped=skipped, val_fraction=0.7, seed=3)
    found = [t for split in ("train", "val") for t in documents_of(tmp_path / "out", split, tokenizer)]
    assert sorted(found) == sorted(["first", good])
    assert skipped.count == 2
    words = f"b.txt is no UTF-8 text: byte {len(good.encode()):,} is 0xff"
    assert words in skipped.first
    with pytest.raises(UserError, match=f"{words}; mend it, or pass over such with --skip-bad"):
        prepare(corpus_of(folder), tokenizer, tmp_path / "refused")


def test_stopped_while_a_bad_text_is_dropped(small, half_bad, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("fastgpt.data.preparation.HELD_BACK", 100)
    corpus, batches = corpus_of(half_bad[0], skip_bad=True), []
    prepare(corpus, tokenizer, tmp_path / "whole", progress=batches.append)
    for count in range(3, len(batches)):
        out = tmp_path / f"out_{count}"
        stopped(corpus, tokenizer, out, batches=count)
        notes, skipped = [], Skipped()
        prepare(corpus, tokenizer, out, note=notes.append, skipped=skipped)
        assert "going on behind" in notes[0]
        assert content(out) == content(tmp_path / "whole")
        assert skipped.count == 2


# Stopped and gone on with


class StopError(Exception):
    pass


def test_it_goes_on_wherever_it_was_stopped(journalled, everything, whole, tokenizer, tmp_path):
    rng = random.Random(0)
    corpus, out, done = corpus_of(everything), tmp_path / "out", -1
    stops = 0
    while not out.exists():
        count = rng.randint(1, 25)

        def stop(progress):
            nonlocal count
            count -= 1
            if not count:
                raise StopError

        notes = []
        try:
            prepare(corpus, tokenizer, out, shard_tokens=5000, progress=stop, note=notes.append)
        except StopError:
            stops += 1
        if done > 0:
            assert f"going on behind the {done:,} documents" in notes[0]
        journal = tmp_path / ".out.partial/journal.json"
        if journal.exists():
            done = sum(part["documents"] for part in json.loads(journal.read_text())["written"].values())
    assert stops > 5
    assert content(out) == whole
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def stopped(corpus, tokenizer, out, batches=12, **options):
    """Leaves the work of so many batches."""

    def stop(progress):
        nonlocal batches
        batches -= 1
        if not batches:
            raise StopError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastgpt.data.preparation.JOURNAL_SECONDS", 0.0)
        with pytest.raises(StopError):
            prepare(corpus, tokenizer, out, progress=stop, **options)
    assert (out.with_name(f".{out.name}.partial") / "journal.json").exists()


def test_other_files_or_options_begin_again(small, everything, tokenizer, tmp_path):
    folder, out = tmp_path / "corpus", tmp_path / "out"
    shutil.copytree(everything, folder)
    corpus = corpus_of(folder)
    for change in ("seed", "file", "damage"):
        stopped(corpus, tokenizer, out)
        notes, seed = [], 0
        if change == "seed":
            seed = 1
        elif change == "file":
            (folder / "a00.txt").write_text("another")
        else:
            (tmp_path / ".out.partial/shards/train_00000.bin").write_bytes(b"less")
        prepare(corpus, tokenizer, out, seed=seed, note=notes.append)
        prepare(corpus, tokenizer, tmp_path / "fresh", seed=seed)
        assert "beginning again" in notes[0]
        assert content(out) == content(tmp_path / "fresh")
        shutil.rmtree(out)
        shutil.rmtree(tmp_path / "fresh")


def test_a_bad_line_stops_it_and_skipping_goes_on(journalled, tokenizer, tmp_path):
    lines = [json.dumps({"text": t}) for t in texts(300, seed=5)]
    lines[200] = '{"text": 5}'
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"a.jsonl:201 has no text .* --skip-bad; what is done is kept: the same"):
        prepare(corpus_of(tmp_path), tokenizer, out)
    notes, skipped = [], Skipped()
    corpus = corpus_of(tmp_path / "a.jsonl", skip_bad=True)
    prepare(corpus, tokenizer, out, note=notes.append, skipped=skipped)
    assert "going on behind" in notes[0]
    assert skipped.count == 1
    stopped(corpus, tokenizer, tmp_path / "two", batches=14)
    skipped = Skipped()
    prepare(corpus, tokenizer, tmp_path / "two", skipped=skipped)
    assert skipped.count == 1  # whichever run passed over it
    assert content(out) == content(tmp_path / "two")


# Real processes


@pytest.fixture
def preparer(everything, tokenizer_dir, tmp_path):
    """Starts it as a process of its own, on everything, with two workers."""
    started = []

    def start(*more, out="out", **options):
        args = ["data", "prepare", "--input", everything, "--tokenizer", tokenizer_dir, "--out", tmp_path / out]
        args += ["--shard-tokens", 5000, "--workers", 2, *more]
        command = [sys.executable, "-m", "tests.data.preparer", *map(str, args)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, **options
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def batches_done(folder):
    try:
        return json.loads((folder / ".out.partial/journal.json").read_text())["batches"]
    except FileNotFoundError:
        return 0


def wait_for(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def workers_of(process):
    """Each thread's children."""
    if not Path("/proc/self/task").exists():
        pytest.skip("needs Linux's /proc")
    return [
        int(pid) for path in Path(f"/proc/{process.pid}/task").glob("*/children") for pid in path.read_text().split()
    ]


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_killed_and_run_again(preparer, whole, tmp_path):
    for batches in (1, 25):
        process = preparer()
        wait_for(lambda p=process, b=batches: batches_done(tmp_path) >= b or p.poll() is not None)
        workers = workers_of(process)
        process.kill()
        process.wait()
        assert not (tmp_path / "out").exists()
        assert len(workers) == 2
        wait_for(lambda w=workers: all(map(gone, w)), 10)
    process = preparer()
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "going on behind the " in out
    assert content(tmp_path / "out") == whole
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_interrupted_or_bereft_of_a_worker_it_ends_at_once(preparer, tmp_path):
    for victim, batches in (("worker", 3), ("itself", 12)):
        process = preparer()
        wait_for(lambda b=batches: batches_done(tmp_path) >= b)
        workers = workers_of(process)
        began = time.monotonic()
        if victim == "worker":
            os.kill(workers[0], signal.SIGKILL)
        else:
            process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
        assert time.monotonic() - began < 5
        if victim == "worker":
            assert process.returncode == 2
            assert "a worker process was killed by signal 9" in err
            assert err.count("\n") == 1
        else:
            assert process.returncode == 130
            assert err == ""
        assert all(map(gone, workers))


def test_two_at_once_are_refused(preparer, tmp_path):
    first = preparer()
    wait_for(lambda: (tmp_path / ".out.partial/lock").exists())
    first.send_signal(signal.SIGSTOP)
    second = preparer()
    _, err = second.communicate()
    assert second.returncode == 2
    assert "another process is at work on" in err


def test_a_full_disk_keeps_what_is_done(preparer, whole, tmp_path):
    limited = preparer(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000)))
    _, err = limited.communicate()
    assert limited.returncode == 2, err
    assert "too large" in err
    assert "what is done is kept: the same command goes on with it" in err
    assert err.count("\n") == 1
    last = preparer()
    out, err = last.communicate()
    assert last.returncode == 0, err
    assert "going on behind the " in out
    assert content(tmp_path / "out") == whole
