import json
import re
import shlex


def test_the_whole_way_in_one_command(cli, tmp_path, monkeypatch):
    """On the real corpus, with seconds of training in place of minutes, and a model that takes milliseconds a step."""
    from fastgpt.cli import quickstart

    monkeypatch.setattr(quickstart, "CPU", [*quickstart.CPU, "--preset", "micro"])
    out = tmp_path / "quick"
    code, text, err = cli("quickstart", "--minutes", "0.05", "--out", out, "--seed", 3)
    assert code == 0, err
    commands = [shlex.split(line)[2:] for line in text.splitlines() if line.startswith("$ fastgpt ")]
    assert [c[0] for c in commands] == ["tokenizer", "data", "train", "eval", "generate"]
    first, last = map(float, re.search(r"validation loss ([\d.]+) -> ([\d.]+)", text).groups())
    assert 8 < first < 9  # guessing among 4,096 ids costs 8.3
    assert last < first - 0.5
    assert "bits per byte" in text
    assert text.count("─ sample ") == 3
    assert {p.name for p in out.iterdir()} >= {
        "tokenizer",
        "data",
        "config.json",
        "metrics.jsonl",
        "loss.png",
        "log.txt",
    }
    meta = json.loads((out / "data/meta.json").read_text())
    assert meta["vocab_size"] == 4096
    assert meta["splits"]["val"]["documents"] > 10
    # What it prints is what a user can type.
    assert cli(*commands[3], "--max-batches", 1)[0] == 0
    assert cli(*commands[4], "--num-samples", 1)[0] == 0


def test_nothing_is_overwritten(refused, tmp_path, monkeypatch):
    from fastgpt.cli import quickstart

    (tmp_path / "file").write_text("x")
    assert f"{tmp_path} is not empty" in refused("quickstart", "--out", tmp_path)
    assert "--minutes must be above 0" in refused("quickstart", "--minutes", 0)
    monkeypatch.chdir(tmp_path)
    assert str(quickstart._free(tmp_path / "runs/quickstart")) == f"{tmp_path}/runs/quickstart"
    (tmp_path / "runs/quickstart").mkdir(parents=True)
    (tmp_path / "runs/quickstart-2").mkdir()
    assert quickstart._free(tmp_path / "runs/quickstart").name == "quickstart-3"
