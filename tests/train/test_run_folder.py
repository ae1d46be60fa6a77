"""What a run folder holds, and what becomes of a run when it cannot be written."""

import errno
import json
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastgpt.errors import UserError
from fastgpt.train import TrainConfig, checkpoint, metrics, provenance, train
from fastgpt.train.pretrain import Pretraining


def config(shards, out, **changes):
    values = {"preset": "micro", "batch_size": 4, "block_size": 32, "eval_interval": 4, "eval_batches": 2}
    values |= {"save_interval": 3, "max_steps": 8, "lr": 3e-3, "precision": "fp32", "device": "cpu"}
    return TrainConfig(data=shards, out=out, **{"sample_tokens": 4, **values, **changes})


def losses(run):
    records = metrics.read_metrics(run / "metrics.jsonl")
    return [{k: r[k] for k in ("step", "tokens", "loss", "val_loss", "lr", "grad_norm") if k in r} for r in records]


def weights(run):
    return load_file(checkpoint.newest(run)[1] / "model.safetensors")


def test_a_run_is_repeated_from_its_config_alone(shards, tmp_path, cli, refused):
    train(config(shards, tmp_path / "a", dropout=0.1, grad_accum=2, seed=7, batch_size=3, beta2=0.9, min_lr=1e-4))
    (tmp_path / "alone").mkdir()
    (tmp_path / "a/config.json").rename(tmp_path / "alone/config.json")
    for start, out in ((tmp_path / "alone/config.json", tmp_path / "b"), (tmp_path / "b", tmp_path / "c")):
        code, text, err = cli("train", "--config", start, "--out", out)
        assert code == 0, err
        assert "not as before" not in text
        assert losses(out) == losses(tmp_path / "a")
        assert all(torch.equal(a, b) for a, b in zip(weights(tmp_path / "a").values(), weights(out).values()))  # noqa: B905
    code, _, err = cli("train", "--config", tmp_path / "b", "--out", tmp_path / "d", "--max-steps", 2)
    assert code == 0, err
    assert max(r["step"] for r in losses(tmp_path / "d")) == 2
    assert "already holds a run" in refused("train", "--config", tmp_path / "b")
    assert "holds no run" in refused("train", "--config", tmp_path / "nothing", "--out", tmp_path / "e")


def test_the_config_says_what_the_run_was_made_with(shards, tmp_path):
    train(config(shards, tmp_path / "a", max_steps=1))
    kept = json.loads((tmp_path / "a/config.json").read_text())
    assert kept["versions"].keys() == {"fastgpt", "torch", "python", "numpy"}
    assert kept["threads"] == torch.get_num_threads()
    assert kept["device_name"]
    meta = json.loads((shards / "meta.json").read_text())
    assert kept["tokenizer_hash"] == meta["tokenizer_hash"]
    assert len(kept["data_sha256"]) == 64
    assert kept["data_tokens"] == {split: part["tokens"] for split, part in meta["splits"].items()}
    assert "resume" not in kept
    assert "config" not in kept


def test_the_revision_is_that_of_the_checkout_and_no_other(tmp_path):
    def git(*args):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *identity, *args], check=True, capture_output=True)

    assert provenance.git_revision.__wrapped__(tmp_path) is None
    git("init")
    assert provenance.git_revision.__wrapped__(tmp_path) is None  # no commit yet
    (tmp_path / "code.py").write_text("1")
    git("add", "code.py")
    git("commit", "-m", "first")
    found = provenance.git_revision.__wrapped__(tmp_path)
    assert len(found["revision"]) == 40
    assert not found["dirty"]
    (tmp_path / "code.py").write_text("2")
    assert provenance.git_revision.__wrapped__(tmp_path) == {**found, "dirty": True}
    (tmp_path / "site-packages").mkdir()
    assert provenance.git_revision.__wrapped__(tmp_path / "site-packages") is None


def test_another_environment_is_told_in_one_line(shards, tmp_path, capsys):
    out = tmp_path / "a"
    train(config(shards, out, max_steps=2))
    path = out / "config.json"
    kept = json.loads(path.read_text())
    path.write_text(json.dumps({**kept, "threads": 99, "versions": {**kept["versions"], "torch": "1.0"}}))
    capsys.readouterr()
    train(config(shards, out, max_steps=3, resume=True))
    here = f"torch 1.0 -> {torch.__version__}, threads 99 -> {torch.get_num_threads()}"
    assert f"warning: not as before: {here}: losses may differ in their last digits\n" in capsys.readouterr().out
    train(config(shards, out, max_steps=4, resume=True))
    assert "not as before" not in capsys.readouterr().out


def test_samples_are_kept_and_move_no_random_state(shards, tmp_path, cli, refused):
    out = tmp_path / "with"
    train(config(shards, out, dropout=0.1, sample_tokens=12, sample_prompt="Ada "))
    train(config(shards, tmp_path / "without", dropout=0.1, sample_tokens=0))
    assert losses(out) == losses(tmp_path / "without")
    assert not (tmp_path / "without/samples.jsonl").exists()
    samples = metrics.read_metrics(out / "samples.jsonl")
    assert [s["step"] for s in samples] == [0, 4, 8]
    assert all(s["text"].startswith("Ada ") and len(s["text"]) > 8 for s in samples)
    assert f"step 8: sample {samples[-1]['text']!r}" in (out / "log.txt").read_text()
    code, _, err = cli("train", "--out", out, "--resume", "--max-steps", 9, "--sample-prompt", "Bo")
    assert code == 0, err
    assert [s["step"] for s in metrics.read_metrics(out / "samples.jsonl")] == [0, 4, 8, 9]
    args = ["--preset", "micro", "--block-size", 8, "--sample-prompt", "Ada sees the sea. " * 20]
    assert "--sample-prompt has" in refused("train", "--data", shards, "--out", tmp_path / "x", *args)


@pytest.mark.parametrize("name", ["loss.png", "log.txt", "samples.jsonl"])
def test_a_file_that_only_shows_something_does_not_end_the_run(shards, tmp_path, capsys, name):
    out = tmp_path / "run"
    (out / name).mkdir(parents=True)  # nobody can write a file there, not even root
    assert train(config(shards, out)).step == 8
    text = capsys.readouterr().out
    assert text.count(f"warning: cannot write {out / name}: that is a folder") == 1


@pytest.mark.parametrize("name", [".", "metrics.jsonl", "checkpoints"])
def test_what_a_run_cannot_do_without_ends_it_in_one_line(shards, tmp_path, refused, name):
    """A file stands where the folder should be, or the other way: as unwritable as it can be made, even for root."""
    out = tmp_path / "run"
    if name == "metrics.jsonl":
        (out / name).mkdir(parents=True)
    else:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("")
    options = ["--preset", "micro", "--max-steps", 2, "--eval-batches", 1, "--block-size", 32]
    line = refused("train", "--data", shards, "--out", out, *options)
    assert str(out / name) in line


@pytest.mark.parametrize("device", ["full", "file"])
def test_a_disk_that_is_full_at_the_metrics_keeps_the_last_checkpoint(shards, tmp_path, monkeypatch, device):
    out = tmp_path / "run"
    if device == "full" and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    plain = metrics.RunLog.record

    def record(self, **values):
        if values["step"] == 5 and device == "full":
            self._metrics = open("/dev/full", "a")  # noqa: SIM115
        elif values["step"] == 5:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.metrics_path))
        plain(self, **values)

    with monkeypatch.context() as patch:
        patch.setattr(metrics.RunLog, "record", record)
        with pytest.raises(UserError, match=r"metrics.jsonl.*[Nn]o space"):
            train(config(shards, out))
    assert list(checkpoint.steps(out)) == [3]
    train(config(shards, out, resume=True))
    train(config(shards, tmp_path / "whole"))
    assert losses(out) == losses(tmp_path / "whole")


def test_keep_is_how_many_checkpoints_are_left(shards, tmp_path):
    for keep, left in ((1, [8]), (3, [4, 6, 8]), (9, [2, 4, 6, 8])):
        train(config(shards, tmp_path / f"{keep}", keep=keep, save_interval=2))
        assert list(checkpoint.steps(tmp_path / f"{keep}")) == left


@pytest.mark.parametrize("at", [0, 4])
def test_a_signal_ends_a_validation_at_once_and_the_resumed_run_makes_up_for_it(shards, tmp_path, monkeypatch, at):
    train(config(shards, tmp_path / "whole"))
    plain = Pretraining.evaluate
    out, validations = tmp_path / "cut", []

    def evaluate(self):
        validations.append(len(validations))
        if validations[-1] == at // 4:
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("the validation went on")
        return plain(self)

    with monkeypatch.context() as patch:
        patch.setattr(Pretraining, "evaluate", evaluate)
        result = train(config(shards, out))
    assert (result.step, result.signal) == (at, signal.SIGTERM)
    assert train(config(shards, out, resume=True)).step == 8
    assert losses(out) == losses(tmp_path / "whole")
    assert (out / "samples.jsonl").read_text() == (tmp_path / "whole/samples.jsonl").read_text()


def test_sigterm_in_a_long_validation_ends_the_process_soon(shards, tmp_path, process):
    """The first validation would take minutes: a signal in it is answered in seconds."""
    out = tmp_path / "run"
    options = ["--preset", "micro", "--block-size", 8, "--batch-size", 1, "--sample-tokens", 100000, "--device", "cpu"]
    p = process("train", "--data", shards, "--out", out, "--precision", "fp32", *options)
    while not (out / "log.txt").exists():
        assert p.poll() is None, p.communicate()
    p.send_signal(signal.SIGTERM)
    text, err = p.communicate(timeout=60)
    assert p.returncode == 128 + signal.SIGTERM, err
    assert "SIGTERM: saved" in text
    assert list(checkpoint.steps(out)) == [0]
