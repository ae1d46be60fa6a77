import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = ROOT.parent / "shared/data/tiny_shakespeare.txt"


@pytest.fixture
def main():
    spec = importlib.util.spec_from_file_location("shakespeare_char", ROOT / "examples/shakespeare_char/run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_it_learns_a_made_up_text_character_by_character(main, corpus, tmp_path, capsys):
    text = (corpus / "story_0.txt").read_text()
    out = tmp_path / "out"
    small = ["--max-steps", "60", "--n-layer", "1", "--n-head", "2", "--n-embd", "32", "--warmup-steps", "10"]
    loss = main(["--text", str(corpus / "story_0.txt"), "--out", str(out), "--", *small, "--sample-tokens", "20"])
    assert loss < 2.5  # from ln 257 = 5.5
    assert "$ fastgpt train --data" in capsys.readouterr().out
    meta = json.loads((out / "data/meta.json").read_text())
    assert meta["vocab_size"] == 257
    tokens = {split: part["tokens"] - 1 for split, part in meta["splits"].items()}  # each with its end of text
    assert tokens["train"] + tokens["val"] == len(text)
    assert tokens["val"] == pytest.approx(len(text) / 10, abs=40)  # a line
    assert (out / "run/loss.png").exists()


@pytest.mark.skipif(not TEXT.exists(), reason="the text is not here")
def test_a_few_steps_on_the_text_itself(main, tmp_path):
    """The whole of it, 2,000 steps, reaches 1.77."""
    short = [
        "--max-steps",
        "100",
        "--warmup-steps",
        "20",
        "--eval-interval",
        "100",
        "--eval-batches",
        "40",
        "--sample-tokens",
        "20",
    ]
    assert (
        main(["--text", str(TEXT), "--out", str(tmp_path), "--", *short]) < 2.8
    )  # pairs of characters alone give 2.5, single ones 3.3
