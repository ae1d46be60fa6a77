import json
import resource
import shutil
import signal
import time
from dataclasses import replace

import pytest
import torch

from fastgpt.errors import UserError
from fastgpt.train import RunConfig, Task, TrainConfig, Trainer, checkpoint, metrics, publish_best, train
from fastgpt.train.pretrain import Pretraining

SMALL = {
    "preset": "micro",
    "batch_size": 4,
    "block_size": 32,
    "eval_interval": 4,
    "eval_batches": 2,
    "save_interval": 3,
}
SMALL |= {"max_steps": 10, "sample_tokens": 4, "lr": 3e-3, "precision": "fp32", "device": "cpu"}


def config(shards, out, **changes):
    return TrainConfig(data=shards, out=out, **{**SMALL, **changes})


def options(**values):
    return [part for k, v in values.items() for part in ("--" + k.replace("_", "-"), str(v))]


def losses(run):
    """What a run did, without what depends on the clock."""
    records = metrics.read_metrics(run / "metrics.jsonl")
    return [{k: r[k] for k in ("step", "tokens", "loss", "val_loss", "lr", "grad_norm") if k in r} for r in records]


def stop_at(monkeypatch, step, number=signal.SIGTERM):
    """Sends this process the signal in the middle of that step."""
    plain = Trainer.train_step

    def step_and_signal(self):
        if self.step + 1 == step:
            signal.raise_signal(number)
        return plain(self)

    monkeypatch.setattr(Trainer, "train_step", step_and_signal)


def test_learns_and_writes_the_run_folder(shards, tmp_path):
    out = tmp_path / "run"
    result = train(config(shards, out, max_steps=60, eval_interval=30, save_interval=25, keep=2))
    assert result.step == 60
    assert result.signal is None
    assert result.first_val_loss - result.val_loss > 1.5
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoints",
        "config.json",
        "log.txt",
        "loss.png",
        "metrics.jsonl",
        "samples.jsonl",
    ]
    assert list(checkpoint.steps(out)) == [50, 60]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    records = metrics.read_metrics(out / "metrics.jsonl")
    assert [r["step"] for r in records if "val_loss" in r] == [0, 30, 60]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 61))
    assert records[-1]["val_loss"] == result.val_loss
    last = [r for r in records if "loss" in r][-1]
    assert last["tokens"] == 60 * 4 * 32
    assert last["tokens_per_s"] > 0
    assert 0 < last["mfu"] < 1.5
    kept = json.loads((out / "config.json").read_text())
    assert kept["seed"] == 0
    assert kept["model"]["n_embd"] == 64
    assert kept["versions"]["torch"] == torch.__version__
    assert "finished at step 60" in (out / "log.txt").read_text()


def test_the_checkpoint_opens_in_transformers_with_the_same_loss(shards, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastgpt import GPT, Tokenizer

    result = train(config(shards, tmp_path / "run"))
    theirs = AutoModelForCausalLM.from_pretrained(result.checkpoint).eval()
    ours = GPT.from_pretrained(result.checkpoint).eval()
    text = "Ada sees the sea.\n"
    ids = AutoTokenizer.from_pretrained(result.checkpoint)(text)["input_ids"]
    assert ids == Tokenizer.from_pretrained(result.checkpoint).encode(text)
    with torch.no_grad():
        x = torch.tensor([ids])
        torch.testing.assert_close(ours(x), theirs(x).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("stop", [None, 6])
def test_reading_the_loss_a_step_late_changes_nothing(shards, tmp_path, monkeypatch, stop):
    """As on a GPU: what is recorded, when it is saved and what a signal does are the same."""

    def run(out, late):
        task = Pretraining(config(shards, out), None)
        trainer = Trainer(task.config, task, None)
        trainer.late = late
        with monkeypatch.context() as patch:
            if stop:
                stop_at(patch, stop)
            return trainer.run()

    first, second = run(tmp_path / "at-once", False), run(tmp_path / "late", True)
    assert first.step == second.step == (stop or 10)
    assert losses(tmp_path / "late") == losses(tmp_path / "at-once")
    for a, b in zip(weights(tmp_path / "at-once"), weights(tmp_path / "late"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_resuming_gives_the_same_losses_bit_for_bit(shards, tmp_path, monkeypatch, number):
    """With dropout and accumulation, so that the random state and the position in the data both count."""
    changes = {"dropout": 0.1, "grad_accum": 2, "max_steps": 12}
    train(config(shards, tmp_path / "whole", **changes))
    with monkeypatch.context() as patch:
        stop_at(patch, 5, number)
        first = train(config(shards, tmp_path / "cut", **changes))
    assert (first.step, first.signal) == (5, number)
    assert first.checkpoint.name == "step_5"
    saved = TrainConfig.load(tmp_path / "cut")
    saved.resume = True
    second = train(saved)
    assert second.step == 12
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for a, b in zip(weights(tmp_path / "whole"), weights(tmp_path / "cut"), strict=True):
        assert torch.equal(a, b)


def weights(run):
    from safetensors.torch import load_file

    tensors = load_file(list(checkpoint.steps(run).values())[-1] / "model.safetensors")
    return [tensors[k] for k in sorted(tensors)]


def test_kill_nine_and_resume_by_the_command_line(shards, tmp_path, process, cli):
    args = ["train", "--data", shards, *options(**{**SMALL, "max_steps": 60, "eval_interval": 20})]
    code, _, err = cli(*args, "--out", tmp_path / "whole")
    assert code == 0, err
    out = tmp_path / "killed"
    for _ in range(2):
        p = process(*args, "--out", out, *(["--resume"] if out.exists() else []))
        before = max(checkpoint.steps(out), default=0)
        wait_for(lambda before=before: max(checkpoint.steps(out), default=0) > before + 3, p)
        p.kill()
        p.wait()
    code, text, err = cli("train", "--out", out, "--resume")
    assert code == 0, err
    assert "resumed from" in text
    assert losses(out) == losses(tmp_path / "whole")
    assert not list((out / "checkpoints").glob("*.tmp-*"))


def wait_for(condition, p, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert p.poll() is None or condition(), p.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def test_ctrl_c_exits_with_130_and_says_how_to_go_on(shards, tmp_path, process):
    out = tmp_path / "run"
    p = process("train", "--data", shards, "--out", out, *options(**{**SMALL, "max_steps": 100000}))
    wait_for(lambda: checkpoint.steps(out), p)
    p.send_signal(signal.SIGINT)
    text, err = p.communicate(timeout=60)
    assert p.returncode == 130
    assert "Traceback" not in err
    step = max(checkpoint.steps(out))
    assert f"SIGINT: saved {out}/checkpoints/step_{step}; go on with: fastgpt train --out {out} --resume" in text


def test_a_full_disk_loses_nothing(shards, tmp_path, process, cli):
    """A limit on the size of files stands for the full disk: the write fails midway in the same place."""
    out = tmp_path / "run"
    train(config(shards, out, max_steps=3))

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    p = process("train", "--out", out, "--resume", "--max-steps", 6, preexec_fn=limit)
    _, err = p.communicate(timeout=120)
    assert p.returncode == 2
    assert err.count("\n") == 1
    assert "step_6" in err
    assert list(checkpoint.steps(out)) == [3]
    assert not list((out / "checkpoints").glob("*tmp*"))
    code, text, _ = cli("train", "--out", out, "--resume", "--max-steps", 6)
    assert code == 0
    assert "finished at step 6" in text


@pytest.fixture(scope="module")
def six_steps(shards, tmp_path_factory):
    """A run with checkpoints of steps 3 and 6. Read only."""
    out = tmp_path_factory.mktemp("six") / "run"
    train(config(shards, out, max_steps=6))
    return out


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"short"), "model.safetensors has 5 bytes"),
        (lambda f: (f / "training_state/state.pt").unlink(), "state.pt is missing"),
        (lambda f: (f / "training_state/manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda f: (f / "training_state/manifest.json").unlink(), "manifest.json is missing"),
        (lambda f: flip_last_byte(f / "training_state/state.pt"), "content of training_state/state.pt has changed"),
    ],
    ids=["truncated", "missing", "broken-manifest", "no-manifest", "flipped"],
)
def test_a_damaged_checkpoint_is_named_and_the_older_one_still_works(six_steps, tmp_path, refused, cli, damage, words):
    out = tmp_path / "run"
    shutil.copytree(six_steps, out)
    damage(out / "checkpoints/step_6")
    line = refused("train", "--out", out, "--resume")
    assert words in line
    assert f"{out}/checkpoints/step_6 is damaged" in line
    assert "go on from step 3" in line
    (out / "checkpoints/step_6").rename(tmp_path / "damaged")
    code, text, _ = cli("train", "--out", out, "--resume", "--max-steps", 4)
    assert code == 0
    assert "step_3" in text


def flip_last_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_half_written_checkpoint_does_not_count(shards, tmp_path):
    out = tmp_path / "run"
    train(config(shards, out, max_steps=3))
    (out / "checkpoints/step_9.tmp-123").mkdir()
    (out / "checkpoints/step_9.tmp-123/model.safetensors").write_bytes(b"half")
    (out / "config.json.tmp-123").write_text("half")
    assert checkpoint.newest(out)[0] == 3
    saved = TrainConfig.load(out)
    saved.resume = True
    train(saved)
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step_3"]
    assert not list(out.glob("*.tmp-*"))


def test_a_run_killed_before_its_first_checkpoint_starts_again(shards, tmp_path):
    task = Pretraining(config(shards, tmp_path / "run"), None)
    Trainer(task.config, task, None)  # writes config.json, no more
    saved = TrainConfig.load(tmp_path / "run")
    saved.resume = True
    assert train(saved).step == 10


def test_what_a_resumed_run_may_and_may_not_change(shards, tmp_path, refused, cli):
    out = tmp_path / "run"
    train(config(shards, out, max_steps=4))
    assert "--lr 0.5 differs from the run's own 0.003" in refused("train", "--out", out, "--resume", "--lr", 0.5)
    code, text, _ = cli("train", "--out", out, "--resume", "--max-steps", 1000000, "--minutes", 0.01)
    assert code == 0
    assert "finished at step" in text
    assert max(checkpoint.steps(out)) > 4


def test_minutes_become_steps_and_measuring_changes_nothing(shards, tmp_path, monkeypatch):
    measured = []
    plain = Pretraining._seconds_per_step

    def measure(self, *args):
        measured.append(plain(self, *args))
        return 0.5

    monkeypatch.setattr(Pretraining, "_seconds_per_step", measure)
    result = train(config(shards, tmp_path / "a", minutes=0.1, dropout=0.1))
    assert result.step == TrainConfig.load(tmp_path / "a").max_steps == 12
    assert 0 < measured[0] < 10
    train(config(shards, tmp_path / "b", max_steps=12, dropout=0.1))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_starts_from_a_models_weights(shards, tmp_path):
    first = train(config(shards, tmp_path / "a"))
    second = train(config(shards, tmp_path / "b", init_from=first.checkpoint))
    assert second.first_val_loss == pytest.approx(first.val_loss)


def test_bad_input_gives_one_line(shards, tmp_path, refused, corpus):
    run = tmp_path / "run"
    args = ["train", "--data", shards, "--out", run, *options(**SMALL)]

    assert "--data is missing" in refused("train", "--out", run)
    assert "no-such" in refused("train", "--data", tmp_path / "no-such", "--out", run)
    assert "holds no run" in refused("train", "--out", tmp_path / "nothing", "--resume")
    assert "--batch-size must be at least 1, got 0" in refused(*args, "--batch-size", 0)
    assert "--beta2 must be at least 0 and below 1" in refused(*args, "--beta2", 1.5)
    assert "--lr must be at least 0" in refused(*args, "--lr", -1)
    assert "huge" in refused(*args, "--preset", "huge")
    assert "n_head" in refused(*args, "--n-head", 5)
    assert "--device banana is no device" in refused(*args, "--device", "banana")
    assert not run.exists()
    if not torch.cuda.is_available():
        assert "no CUDA GPU" in refused(*args, "--device", "cuda")

    trained = train(config(shards, run, max_steps=1))
    assert "already holds a run: add --resume" in refused(*args)
    other = tmp_path / "other"
    assert "block-size" in refused("train", "--data", shards, "--out", other, "--init-from", trained.checkpoint,
                                   "--block-size", 64)  # fmt: skip
    (run / "config.json").write_text("[]")
    assert "is damaged" in refused("train", "--out", run, "--resume")


def test_a_corpus_shorter_than_a_window(shards, tmp_path, refused):
    args = options(**{**SMALL, "block_size": 100_000})
    line = refused("train", "--data", shards, "--out", tmp_path / "run", *args)
    assert "tokens, fewer than one window of 100,001: give more text" in line


def test_a_model_with_another_tokenizer_is_refused(shards, corpus, tmp_path, refused):
    from fastgpt.data import Corpus, prepare
    from fastgpt.tokenizer import Tokenizer

    trained = train(config(shards, tmp_path / "run", max_steps=1))
    other = Tokenizer.train(["another text, other merges, " * 50], vocab_size=270)
    prepare(Corpus(input=(str(corpus),)), other, tmp_path / "data2", val_fraction=0.2)
    line = refused("train", "--data", tmp_path / "data2", "--out", tmp_path / "b", "--init-from", trained.checkpoint)
    assert "prepare the data again" in line
    assert "prepared with another tokenizer" in refused(
        "eval", "--model", tmp_path / "run", "--data", tmp_path / "data2"
    )


def test_a_loss_that_is_nan_stops_and_names_the_last_checkpoint(shards, tmp_path, monkeypatch):
    plain = Trainer.train_step

    def broken(self):
        step = plain(self)
        return replace(step, loss=step.loss * torch.nan) if self.step == 5 else step

    monkeypatch.setattr(Trainer, "train_step", broken)
    with pytest.raises(UserError, match=r"loss became nan at step 5.*step_3.*smaller --lr"):
        train(config(shards, tmp_path / "run"))
    assert list(checkpoint.steps(tmp_path / "run")) == [3]


def test_evaluation_is_over_the_whole_split_and_agrees_with_a_plain_loop(shards, tmp_path, cli):
    from fastgpt import GPT
    from fastgpt.data import TokenDataset

    trained = train(config(shards, tmp_path / "run"))
    code, text, _ = cli("eval", "--model", tmp_path / "run", "--data", shards, "--batch-size", 3)
    assert code == 0
    model = GPT.from_pretrained(trained.checkpoint).eval()
    data = TokenDataset.open(shards, "val")
    ids = torch.from_numpy(data.tokens(0, len(data)).astype("int64"))
    total, count, T = 0.0, 0, model.config.n_positions
    with torch.no_grad():
        for i in range(0, (len(ids) - 1) // T * T, T):
            total += model.loss(ids[None, i : i + T], ids[None, i + 1 : i + T + 1]).item() * T
            count += T
    assert f"{count:,} tokens" in text
    assert f"loss {total / count:.4f}" in text


class Slope(Task):
    """One parameter that grows; its figures are given."""

    best_by = ("score", "max")

    def __init__(self, scores, patience=None):
        self.model = torch.nn.Linear(1, 1, bias=False)
        self.scores, self.patience, self.weights = scores, patience, [1.0]

    def next_batch(self):
        self.weights.append(self.weights.pop(0))
        return self.weights[-1]

    def loss(self, batch):
        return -batch * self.model.weight.sum()

    def weight(self, batch):
        return batch

    def tokens(self, batch):
        return 1

    def evaluate(self):
        return {"val_loss": 1.0, "score": self.scores.pop(0)}

    def write_model(self, folder):
        (folder / "weight").write_text(str(self.model.weight.item()))

    def describe(self):
        return "a slope"


def run_config(out, **changes):
    return RunConfig(
        **{"out": out, "max_steps": 10, "lr": 1e-3, "eval_interval": 1, "precision": "fp32", "keep": 1, **changes}
    )


def test_the_best_checkpoint_is_kept_and_patience_ends_the_run(tmp_path, capsys):
    task = Slope([9.0, 1.0, 3.0, 2.0, 2.5, 1.0], patience=3)  # the untrained model's 9 does not count
    result = Trainer(run_config(tmp_path), task, None).run()
    assert (result.step, result.best) == (5, 2)
    assert list(checkpoint.steps(tmp_path)) == [2, 5]
    assert "no better one for 3 evaluations: the best is that of step 2" in capsys.readouterr().out
    for _ in range(2):  # again over what is there
        model = publish_best(tmp_path, result)
        assert (model / "weight").read_text() == (tmp_path / "checkpoints/step_2/weight").read_text()
        assert [p.name for p in model.iterdir()] == ["weight"]
    assert not list(tmp_path.glob("model.*"))


def test_accumulated_batches_count_by_their_weight(tmp_path):
    task = Slope([0.0] * 9)
    task.weights = [1.0, 3.0]
    Trainer(run_config(tmp_path, max_steps=1, grad_accum=2), task, None).run()
    record = metrics.read_metrics(tmp_path / "metrics.jsonl")[1]
    weight = -record["loss"] / (3 * 3 / 4 + 1 * 1 / 4)  # the loss before the step is -(w1 b1 + w2 b2) * weight
    assert record["grad_norm"] == pytest.approx(2.5)
    assert weight == pytest.approx(float((tmp_path / "checkpoints/step_1/weight").read_text()), abs=0.01)


def test_a_run_of_another_command_is_named(shards, tmp_path):
    train(config(shards, tmp_path / "run", max_steps=1))
    with pytest.raises(UserError, match=r"is a run of `fastgpt train`, not of `fastgpt walk`: resume it with that"):
        type("Walk", (RunConfig,), {"command": "walk"}).load(tmp_path / "run")
