"""The options of a run that change how a step is made: optimizer, schedule, precision, recomputing, compiling."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_optimizer import NothingIsRead

from fastgpt import GPT
from fastgpt.train import TrainConfig, Trainer, checkpoint, metrics, open_run, train
from fastgpt.train.pretrain import Pretraining

SMALL = {
    "preset": "micro",
    "batch_size": 2,
    "block_size": 32,
    "eval_interval": 4,
    "eval_batches": 2,
    "save_interval": 4,
    "max_steps": 8,
    "lr": 3e-3,
    "precision": "fp32",
    "device": "cpu",
    "dropout": 0.1,
    "grad_accum": 2,
}


def config(shards, out, **changes):
    return TrainConfig(data=shards, out=out, **{**SMALL, **changes})


def losses(run):
    records = metrics.read_metrics(run / "metrics.jsonl")
    return [{k: r[k] for k in ("step", "loss", "val_loss", "lr", "grad_norm") if k in r} for r in records]


def compiler_or_skip():
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler")


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "muon", "mup": True, "mup_base_width": 32, "schedule": "wsd"},
        {"precision": "bf16-weights"},
        {"precision": "bf16-weights", "optimizer": "muon", "schedule": "linear"},
        {"precision": "bf16", "recompute": True},
        pytest.param({"compile": True}, marks=pytest.mark.slow),
        pytest.param({"compile": True, "recompute": True, "precision": "bf16-weights"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_resuming_gives_the_same_losses_bit_for_bit(shards, tmp_path, changes):
    """From step 4 of 8, with dropout and accumulation."""
    if "compile" in changes:
        compiler_or_skip()
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(config(shards, whole, keep=9, **changes))
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "step_8")
    train(config(shards, cut, keep=9, resume=True, **changes))
    assert losses(cut) == losses(whole)
    a, b = (load_file(run / "checkpoints/step_8/model.safetensors") for run in (whole, cut))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert losses(whole)[-1]["val_loss"] < losses(whole)[0]["val_loss"] - 0.3


def test_a_checkpoint_of_bf16_weights_holds_their_masters(shards, tmp_path):
    c = config(shards, tmp_path / "run", precision="bf16-weights")
    result = train(c)
    tensors = load_file(result.checkpoint / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    state = checkpoint.load_state(result.checkpoint)["optimizer"]["state"]
    masters = [s["master"] for s in state.values()]
    name = "transformer.h.0.mlp.c_fc.weight"
    assert any(m.shape == tensors[name].T.shape and torch.equal(m, tensors[name].T) for m in masters)
    assert not torch.equal(tensors[name], tensors[name].bfloat16().float())
    model = GPT.from_pretrained(result.checkpoint)
    assert model.generate(torch.zeros(1, 1, dtype=torch.int64), 3).shape == (1, 4)
    # What trains on after a checkpoint is the bf16 model again.
    c.resume = True
    latest = open_run(c)
    task = Pretraining(c, latest)
    trainer = Trainer(task.config, task, latest)
    trainer.save()
    assert {p.dtype for p in task.model.parameters()} == {torch.bfloat16}
    assert task.model.generate(torch.zeros(1, 1, dtype=torch.int64), 3).shape == (1, 4)


@pytest.mark.parametrize("changes", [{}, {"precision": "bf16-weights", "optimizer": "muon"}], ids=str)
def test_a_step_reads_nothing_from_the_device(shards, tmp_path, changes):
    """Loss and norm are tensors when it is launched, and nothing in it waits for a number."""
    task = Pretraining(config(shards, tmp_path / "run", **changes), None)
    trainer = Trainer(task.config, task, None)
    with NothingIsRead(trainer.optimizer):
        steps = [trainer.train_step() for _ in range(2)]
    assert all(step.loss.item() > 0 < step.grad_norm.item() for step in steps)


def test_a_nan_batch_costs_an_update_and_not_the_weights(shards, tmp_path, monkeypatch):
    """The trainer learns of it a step later; the weights it then has are good."""
    task = Pretraining(config(shards, tmp_path / "run", grad_accum=1), None)
    trainer = Trainer(task.config, task, None)
    trainer.train_step()
    before = [p.detach().clone() for p in task.model.parameters()]
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_loss", lambda batch: task.loss(batch) * float("nan"))
        assert trainer.train_step().loss.isnan()
    assert all(torch.equal(p, b) for p, b in zip(task.model.parameters(), before, strict=True))
    assert trainer.train_step().loss.isfinite()
    assert not any(torch.equal(p, b) for p, b in zip(task.model.parameters(), before, strict=True))


def test_recomputing_changes_no_loss(shards, tmp_path):
    for recompute in (False, True):
        train(config(shards, tmp_path / str(recompute), recompute=recompute))
    assert losses(tmp_path / "True") == losses(tmp_path / "False")


def test_a_wsd_run_goes_on_as_the_longer_run_that_it_might_have_been(shards, tmp_path):
    """From a checkpoint of the stable phase, with the decay steps given; the shorter run has decayed by its end."""
    options = {"schedule": "wsd", "warmup_steps": 2, "decay_steps": 3, "keep": 9}
    long, short = tmp_path / "long", tmp_path / "short"
    train(config(shards, long, max_steps=12, **options))
    train(config(shards, short, **options))
    rates = [r["lr"] for r in losses(short) if "loss" in r]
    assert rates[:6] == [1.5e-3, 3e-3, 3e-3, 3e-3, 3e-3, 3e-3]
    assert 0 < rates[7] < rates[6] < 3e-3
    shutil.rmtree(short / "checkpoints" / "step_8")
    train(config(shards, short, resume=True, max_steps=12, **options))
    assert losses(short) == losses(long)


def test_mup_scales_the_new_model_and_its_rates(shards, tmp_path):
    def built(name, **changes):
        c = config(shards, tmp_path / name, **changes)
        task = Pretraining(c, None)
        trainer = Trainer(task.config, task, None)
        trainer.train_step()
        weight = task.model.transformer.h[0].mlp.c_fc.weight
        return next(g for g in trainer.optimizer.param_groups if any(p is weight for p in g["params"]))["lr"], weight

    plain_lr, plain = built("plain", lr=0.0)
    assert plain_lr == 0
    plain_lr, _ = built("plain lr")
    lr, _ = built("mup lr", mup=True, mup_base_width=16)
    assert lr == pytest.approx(plain_lr / 4)
    _, weight = built("mup", lr=0.0, mup=True, mup_base_width=16)
    torch.testing.assert_close(weight, plain / 2)


@pytest.mark.slow
def test_compiled_losses_are_the_eager_ones_to_rounding(shards, tmp_path):
    compiler_or_skip()
    for name, compiled in (("eager", False), ("compiled", True)):
        train(config(shards, tmp_path / name, compile=compiled, dropout=0.0))
    for a, b in zip(losses(tmp_path / "compiled"), losses(tmp_path / "eager"), strict=True):
        assert a == pytest.approx(b, rel=1e-3)


def test_without_a_compiler_there_is_one_line(shards, tmp_path, process):
    out = tmp_path / "run"
    given = {**SMALL, "compile": None}
    args = [part for k, v in given.items() for part in ("--" + k.replace("_", "-"), *([] if v is None else [str(v)]))]
    without = {**os.environ, "PATH": "/nowhere", "CXX": "no-such-compiler"}
    p = process("train", "--data", shards, "--out", out, *args, env=without)
    _, err = p.communicate(timeout=120)
    assert p.returncode == 2, err
    assert err.startswith("fastgpt: error: --compile does not work here (")
    assert err.count("\n") == 1
    assert not list((out / "checkpoints").glob("step_*"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": "sgd"}, "sgd"),
        ({"schedule": "step"}, "step"),
        ({"decay_steps": -1}, "--decay-steps must be at least 0, got -1"),
        ({"mup_base_width": 0}, "--mup-base-width must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_refused_in_one_line(shards, tmp_path, cli, changes, words):
    args = [part for k, v in changes.items() for part in ("--" + k.replace("_", "-"), str(v))]
    code, text, err = cli("train", "--data", shards, "--out", tmp_path / "run", *args)
    assert code == 2
    assert words in text + err
    assert not (tmp_path / "run").exists()


def test_the_run_folder_keeps_the_options(shards, tmp_path):
    train(config(shards, tmp_path / "run", max_steps=1, optimizer="muon", schedule="wsd", decay_steps=5))
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (kept["optimizer"], kept["schedule"], kept["decay_steps"]) == ("muon", "wsd", 5)
