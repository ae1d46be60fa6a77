import json

import pytest

from fastgpt.errors import UserError
from fastgpt.train.compare import compare, read_run


def make_run(folder, steps=4, val=(5.0, 3.0, 3.5), **config):
    folder.mkdir(parents=True)
    config = {"command": "train", "lr": 1e-3, "out": str(folder), "parameters": 1000, **config}
    (folder / "config.json").write_text(json.dumps(config))
    records = [{"step": 0, "tokens": 0, "val_loss": val[0]}]
    for step in range(1, steps + 1):
        rates = {"tokens_per_s": 100.0 * step, "mfu": 0.1 * step, "seconds": 2.0 * step, "lr": 1e-3, "grad_norm": 1.0}
        records.append({"step": step, "tokens": 64 * step, "loss": 5.0 / step, **rates})
    records += [{"step": steps, "tokens": 64 * steps, "val_loss": loss} for loss in val[1:]]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def test_a_run_in_figures(tmp_path):
    run = read_run(make_run(tmp_path / "a"))
    assert (run.name, run.parameters, run.steps, run.tokens) == ("a", 1000, 4, 256)
    assert (run.val_loss, run.best_val_loss) == (3.5, 3.0)
    assert (run.tokens_per_s, run.mfu, run.seconds) == (250.0, 0.25, 8.0)


def test_what_differs_is_found_and_the_picture_drawn(tmp_path):
    a = make_run(tmp_path / "x/a", seed=1, model={"n_embd": 64, "n_layer": 2})
    b = make_run(tmp_path / "y/a", seed=2, model={"n_embd": 96, "n_layer": 2}, wandb="p")
    runs, differences = compare([a, b], tmp_path / "compare.png")
    assert [run.name for run in runs] == [str(a), str(b)]  # told apart
    assert differences == {"seed": [1, 2], "model.n_embd": [64, 96], "wandb": [None, "p"]}
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_has_only_begun_is_compared_too(tmp_path):
    run = make_run(tmp_path / "a", steps=0, val=(5.0,))
    (only,), differences = compare([run], tmp_path / "compare.png")
    assert (only.steps, only.val_loss, only.tokens_per_s, only.mfu, only.seconds) == (0, 5.0, None, None, 0.0)
    assert differences == {}


def test_the_command_prints_both_tables(tmp_path, cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", lr=2e-3, parameters=None)
    code, text, err = cli("runs", "compare", a, b, "--out", tmp_path / "both.png")
    assert code == 0, err
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert cells == [
        ["a", "1,000", "4", "256", "3.5000", "3.0000", "250", "25%", "8 s"],
        ["b", "-", "4", "256", "3.5000", "3.0000", "250", "25%", "8 s"],
        ["lr", "0.001", "0.002"],
    ]
    assert f"drawn in {tmp_path}/both.png" in text


def test_what_is_no_run_gives_one_line(tmp_path, refused):
    good, empty = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    (empty / "metrics.jsonl").write_text("")
    broken = make_run(tmp_path / "c")
    (broken / "config.json").write_text("{")
    out = tmp_path / "compare.png"
    assert "no run to compare" in refused("runs", "compare", "--out", out)
    assert f"{tmp_path} holds no run" in refused("runs", "compare", good, tmp_path, "--out", out)
    assert "metrics.jsonl has no records yet" in refused("runs", "compare", good, empty, "--out", out)
    assert "config.json cannot be read" in refused("runs", "compare", broken, "--out", out)
    assert "cannot write" in refused("runs", "compare", good, "--out", good / "config.json/compare.png")
    with pytest.raises(UserError, match="no run"):
        read_run(tmp_path / "nowhere")
    assert not out.exists()
