import json
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.data import TokenDataset
from fastgpt.errors import UserError
from fastgpt.train import TrainConfig, Trainer, metrics, train
from fastgpt.train.monitor import SKIPPED_IN_A_ROW, SpikeDetector
from fastgpt.train.pretrain import Pretraining


def curve(seed, steps=3000, noise=0.05, heavy=False):
    """A loss as runs have it: it falls from ln V, fast at first, under noise that shrinks with it."""
    rng = random.Random(seed)

    def draw():
        return rng.gauss(0, 1) / (math.sqrt(rng.gammavariate(5, 1) / 5) if heavy else 1)  # Student's t of 10

    usual = [2.0 + 8.0 * math.exp(-i / 40) + math.exp(-i / 1000) for i in range(steps)]
    return [x * (1 + noise * draw()) for x in usual]


def alarms(losses):
    detector = SpikeDetector()
    return [i for i, loss in enumerate(losses) if detector.see(loss) is not None]


@pytest.mark.parametrize(("noise", "heavy"), [(0.0, False), (0.005, False), (0.05, False), (0.2, False), (0.02, True)])
def test_no_false_alarms_at_the_start_or_later(noise, heavy):
    assert [alarms(curve(seed, noise=noise, heavy=heavy)) for seed in range(4)] == [[]] * 4


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), at=st.integers(300, 500), length=st.integers(1, 200), height=st.floats(1.5, 100))
def test_a_spike_is_told_once_at_its_start(seed, at, length, height):
    losses = curve(seed, steps=700, noise=0.02)
    losses[at : at + length] = [x * height for x in losses[at : at + length]]
    assert alarms(losses) == [at]


def test_a_second_spike_is_told_again_and_a_resumed_run_judges_alike():
    losses = curve(3, steps=600)
    for i in (300, 301, 400):
        losses[i] *= 3
    assert alarms(losses) == [300, 400]
    for stop in (301, 302, 350, 400):
        detector = SpikeDetector(losses[:stop])
        assert [stop + i for i, x in enumerate(losses[stop:]) if detector.see(x) is not None] == [
            i for i in (300, 400) if i >= stop
        ]


def config(shards, out, **changes):
    values = {"preset": "micro", "batch_size": 4, "block_size": 32, "eval_interval": 6, "eval_batches": 2}
    values |= {"save_interval": 3, "max_steps": 12, "lr": 3e-3, "precision": "fp32", "device": "cpu"}
    return TrainConfig(data=shards, out=out, sample_tokens=0, **{**values, **changes})


def fail_at(monkeypatch, steps, value=math.nan, batch_size=4):
    """The losses of these steps' batches become `value` times what they are; by their windows, as a bad text would."""
    plain = Pretraining.loss

    def loss(self, batch):
        order = Pretraining(self.config, None).train_data.next_windows(batch_size * max(steps))
        bad = {order[batch_size * (step - 1)] for step in steps}
        return plain(self, batch) * (value if bad & set(batch.windows) else 1.0)

    monkeypatch.setattr(Pretraining, "loss", loss)


def test_a_nan_stops_and_names_the_step_its_rows_and_the_last_checkpoint(shards, tmp_path, monkeypatch):
    out = tmp_path / "run"
    fail_at(monkeypatch, [5])
    with pytest.raises(UserError) as error:
        train(config(shards, out))
    assert str(error.value) == (
        f"the loss became nan at step 5, its rows are in {out}/nan_step_5.json; the last good checkpoint is "
        f"{out}/checkpoints/step_3; step over such steps with --resume --skip-nan, or start a new run with a smaller "
        "--lr"
    )
    found = json.loads((out / "nan_step_5.json").read_text())
    assert (found["step"], found["loss"]) == (5, "nan")
    (rows,) = found["batches"]
    assert len(rows) == 4
    data = TokenDataset.open(shards, "train")
    windows = Pretraining(config(shards, out), None).train_data.next_windows(4 * 5)[4 * 4 :]
    for row, (epoch, window) in zip(rows, windows, strict=True):
        assert (row["epoch"], row["window"], row["first_token"]) == (epoch, window, 32 * window)
        assert row["ids"] == data.tokens(row["first_token"], row["first_token"] + 32).tolist()
    assert all("skipped" not in r for r in metrics.read_metrics(out / "metrics.jsonl"))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_skip_nan_steps_over_and_the_weights_stay_good(shards, tmp_path, monkeypatch, capsys, value, late):
    """Also where the loss is read a step late, as on a GPU."""
    fail_at(monkeypatch, [5, 6], value)
    out = tmp_path / "run"
    task = Pretraining(config(shards, out, skip_nan=True), None)
    trainer = Trainer(task.config, task, None)
    trainer.late = late
    plain, weights = trainer.train_step, {}

    def train_step():
        step = plain()
        weights[step.step] = [p.detach().clone() for p in task.model.parameters()]
        return step

    monkeypatch.setattr(trainer, "train_step", train_step)
    assert trainer.run().step == 12
    text = capsys.readouterr().out
    assert f"warning: the loss became {value} at step 5, its rows are in {out}/nan_step_5.json; stepped over" in text
    assert "2 of 6 steps so far" in text
    records = metrics.read_metrics(out / "metrics.jsonl")
    assert [r["step"] for r in records if r.get("skipped")] == [5, 6]
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 7, 8, 9, 10, 11, 12]
    assert all(math.isfinite(r.get("loss", 0)) and math.isfinite(r.get("grad_norm", 0)) for r in records)
    for stepped_over in (5, 6):
        assert all(torch.equal(a, b) for a, b in zip(weights[4], weights[stepped_over], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(weights[6], weights[7], strict=True))


def test_a_stopped_run_goes_on_past_the_nan_with_skip_nan(shards, tmp_path, monkeypatch, cli):
    fail_at(monkeypatch, [5])
    train(config(shards, tmp_path / "whole", skip_nan=True))
    with pytest.raises(UserError):
        train(config(shards, tmp_path / "cut"))
    code, _, err = cli("train", "--out", tmp_path / "cut", "--resume", "--skip-nan")
    assert code == 0, err
    for name in ("loss", "val_loss", "skipped"):
        a, b = (
            [r.get(name) for r in metrics.read_metrics(tmp_path / run / "metrics.jsonl")] for run in ("whole", "cut")
        )
        assert a == b


def test_skip_nan_gives_up_after_many_in_a_row(shards, tmp_path, monkeypatch):
    first, last = 3, 2 + SKIPPED_IN_A_ROW
    fail_at(monkeypatch, list(range(first, 40)))
    with pytest.raises(
        UserError, match=f"nan at step {last}.*the last of {SKIPPED_IN_A_ROW} such steps in a row.*--lr"
    ):
        train(config(shards, tmp_path / "run", skip_nan=True, max_steps=40))


def test_a_spike_is_in_the_log_and_in_the_metrics(shards, tmp_path, monkeypatch, capsys):
    fail_at(monkeypatch, [50], value=4.0)
    train(config(shards, tmp_path / "run", lr=1e-6, max_steps=55, eval_interval=55, save_interval=100))
    assert "warning: a loss spike: " in capsys.readouterr().out
    assert "at step 50" in (tmp_path / "run/log.txt").read_text()
    (record,) = [r for r in metrics.read_metrics(tmp_path / "run/metrics.jsonl") if "spike_over" in r]
    assert record["step"] == 50
    assert record["loss"] > 2 * record["spike_over"]
