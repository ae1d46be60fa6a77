import os
import random
import signal
import subprocess
import sys

import pytest

# Threads that spin while they wait for the next parallel loop take the cores from other workers and from each other:
# with as many workers as cores, the tests that train took four times as long. OpenMP reads this when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

torch.set_num_threads(2)
# A shell starts what it runs in the background with SIGINT ignored, and so would be what tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests run in one worker, so that what they share is made once; files in their order, which ends with
    short ones, and not by their numbers of tests, which would end with the longest."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def story(seed: int, sentences: int = 400) -> str:
    """Made-up text with something to learn in it."""
    rng = random.Random(seed)
    names, verbs, things = (
        ["Ada", "Bo", "Cy", "Dee"],
        ["sees", "likes", "finds", "hides"],
        ["a cat", "the sea", "two hats"],
    )
    return "".join(f"{rng.choice(names)} {rng.choice(verbs)} {rng.choice(things)}.\n" for _ in range(sentences))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(12):
        (folder / f"story_{i}.txt").write_text(story(i))
    return folder


@pytest.fixture(scope="session")
def tokenizer_dir(corpus, tmp_path_factory):
    from fastgpt.tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [path.read_text() for path in sorted(corpus.iterdir())]
    Tokenizer.train(texts, vocab_size=290).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shards(corpus, tokenizer_dir, tmp_path_factory):
    """A folder of token shards of the made-up text. Read only."""
    from fastgpt.data import Corpus, prepare
    from fastgpt.tokenizer import Tokenizer

    out = tmp_path_factory.mktemp("shards") / "data"
    prepare(Corpus(input=(str(corpus),)), Tokenizer.from_pretrained(tokenizer_dir), out, val_fraction=0.2)
    return out


@pytest.fixture
def cli(monkeypatch, capsys):
    """Runs a command line in this process: cli("train", "--out", ...) -> (exit code, stdout, stderr)."""
    from fastgpt.cli import main

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["fastgpt", *map(str, args)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def refused(cli):
    """Runs a command line that must fail as a user's error does: exit code 2 and one line, which is returned."""

    def run(*args):
        code, _, err = cli(*args)
        assert code == 2, err
        assert err.startswith("fastgpt: error: ")
        assert err.count("\n") == 1
        return err

    return run


@pytest.fixture
def process():
    """Starts `fastgpt ARGS` as a process of its own."""
    started = []

    def start(*args, **options):
        command = [sys.executable, "-m", "fastgpt", *map(str, args)]
        p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
        started.append(p)
        return p

    yield start
    for p in started:
        p.kill()
        p.communicate()
