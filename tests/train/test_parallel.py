import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from several_ranks import ONE, STEPS, TWO

from fastgpt import GPT
from fastgpt.errors import UserError
from fastgpt.train import TrainConfig, checkpoint, metrics, parallel, train
from fastgpt.train.config import as_restarted

WORKER = Path(__file__).with_name("several_ranks.py")


def torchrun(what, shards, out, *options):
    """Two ranks; returns the exit code, what was printed and the seconds it took."""
    ranks = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    ranks += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *options]  # 0: any free port
    environment = {**os.environ, "PYTHONPATH": str(WORKER.parents[2]), "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    done = subprocess.run(
        [*ranks, str(WORKER), what, str(shards), str(out)], env=environment, capture_output=True, text=True, timeout=240
    )
    return done.returncode, done.stdout + done.stderr, time.monotonic() - start


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory):
    """one/ by this process; beside it what two ranks made, see several_ranks.py."""
    out = tmp_path_factory.mktemp("runs")
    train(TrainConfig(data=shards, out=out / "one", **ONE))
    shutil.copytree(out / "one", out / "one-cut")
    for step in (6, 8):
        shutil.rmtree(checkpoint.path(out / "one-cut", step))
    code, text, _ = torchrun("agree", shards, out)
    assert code == 0, text
    return out


def figures(run, *names):
    records = metrics.read_metrics(run / "metrics.jsonl")
    return torch.tensor([[r[n] for n in names] for r in records if names[0] in r], dtype=torch.float64)


def weights(folder):
    return GPT.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("name", ["ddp", "fsdp", "one-cut", "recompute"])
def test_two_ranks_make_the_losses_of_one_process(runs, name):
    columns = ("loss", "grad_norm", "lr", "tokens", "step")
    assert len(figures(runs / name, "loss")) == STEPS
    torch.testing.assert_close(figures(runs / name, *columns), figures(runs / "one", *columns), rtol=1e-5, atol=0)
    validations = [figures(runs / n, "val_loss", "step") for n in (name, "one")]
    torch.testing.assert_close(*validations, rtol=1e-5, atol=0)
    assert json.loads((runs / name / "config.json").read_text())["ranks"] == 2


@pytest.mark.parametrize("name", ["ddp", "fsdp", "one-cut"])
def test_the_model_folder_is_whole(runs, name):
    theirs, ours = (weights(checkpoint.path(runs / n, STEPS)) for n in (name, "one"))
    assert theirs.keys() == ours.keys()
    for key, weight in ours.items():
        torch.testing.assert_close(theirs[key], weight, rtol=1e-3, atol=1e-5)


def test_bf16_is_near(runs):
    bf16, fp32 = (figures(runs / name, "loss") for name in ("bf16", "one"))
    assert not torch.equal(bf16, fp32)
    torch.testing.assert_close(bf16, fp32, rtol=0.02, atol=0)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_ranks_stop_together_and_resume_bit_for_bit(runs, mode):
    """A signal to one stops both; they go on from what was written while they trained."""
    columns = ("loss", "grad_norm", "lr", "tokens", "step")
    assert "SIGTERM: saved" in (runs / f"{mode}-cut" / "log.txt").read_text()
    assert torch.equal(figures(runs / f"{mode}-cut", *columns), figures(runs / f"{mode}-whole", *columns))
    cut, whole = (weights(checkpoint.path(runs / f"{mode}-{name}", STEPS)) for name in ("cut", "whole"))
    assert all(torch.equal(cut[key], whole[key]) for key in whole)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_one_process_goes_on_with_what_two_ranks_wrote(runs, tmp_path, mode):
    out = tmp_path / "run"
    shutil.copytree(runs / mode, out)
    shutil.rmtree(checkpoint.path(out, STEPS))
    config = replace(TrainConfig.load(out), out=out, resume=True)
    with pytest.raises(
        UserError, match=r"is 8 sequences in a step, those of the run in .* have 16: take --grad-accum 4"
    ):
        train(config)
    train(replace(config, grad_accum=4))
    torch.testing.assert_close(figures(out, "loss", "step"), figures(runs / "one", "loss", "step"), rtol=1e-5, atol=0)


def test_damage_to_a_ranks_part_is_told(runs, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(runs / "fsdp", out)
    part = next((checkpoint.path(out, STEPS) / checkpoint.RANKS).glob("*.distcp"))
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    with pytest.raises(UserError, match=rf"damaged: the content of training_state/ranks/{part.name} has changed"):
        checkpoint.newest(out)


def test_a_loss_that_is_not_a_number_on_one_rank_is_stepped_over_by_both(runs):
    records = metrics.read_metrics(runs / "nan" / "metrics.jsonl")
    assert [r["step"] for r in records if "skipped" in r] == [2]
    assert len(figures(runs / "nan", "loss")) == STEPS - 1
    rows = json.loads((runs / "nan" / "nan_step_2.json").read_text())["batches"]
    assert [len(batch) for batch in rows] == [8, 8]  # of both ranks
    assert len({row["first_token"] for batch in rows for row in batch}) == 16


def test_ranks_end_with_one_that_dies_and_torchrun_goes_on_by_itself(runs, shards, tmp_path):
    code, text, seconds = torchrun("die", shards, tmp_path, "--max-restarts", "2")
    assert code == 0, text
    assert "exitcode: -9" in text  # torchrun's word for the kill
    assert text.count("fastgpt: error: a rank has ended, and so do the others") <= 1
    assert text.count("fastgpt: error: rank 1 cannot go on: try again") == 1
    assert text.count("fastgpt: error:") <= 2
    assert text.count("resumed from") == 2
    assert seconds < 3 * 60
    assert torch.equal(figures(tmp_path / "killed", "loss", "step"), figures(runs / "ddp", "loss", "step"))


def test_parallel_without_torchrun_says_how_to_launch(refused, shards, tmp_path):
    line = refused("train", "--data", shards, "--out", tmp_path / "run", "--parallel", "ddp")
    assert "torchrun --nproc-per-node N -m fastgpt train" in line
    assert not (tmp_path / "run").exists()


def test_what_does_not_go_together_is_refused(shards, tmp_path):
    with pytest.raises(UserError, match="--compile does not go with --parallel fsdp"):
        TrainConfig(data=shards, out=tmp_path, compile=True, parallel="fsdp")


def test_finetuning_says_that_it_runs_on_one_device(refused, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    for command in ("instruct", "prefer", "classify"):
        line = refused("finetune", command, "--model", tmp_path, "--data", tmp_path / "x", "--out", tmp_path / "run")
        assert f"fastgpt finetune {command} runs on one device: start it without torchrun" in line


def test_devices_of_ranks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert parallel.local_device("auto") == torch.device("cuda", 3)
    assert parallel.local_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="--device cuda:1 is one device for all ranks"):
        parallel.local_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="take --nproc-per-node 2"):
        parallel.local_device("cuda")


def test_a_restarted_run_has_the_config_that_it_began_with(runs, tmp_path):
    """What was measured or found at the start is not decided anew."""
    began = TrainConfig.load(runs / "ddp")
    same = replace(began, precision="auto", block_size=None, eval_interval=None, parallel="fsdp")
    assert as_restarted(same) == replace(began, resume=True, parallel="fsdp")
    with pytest.raises(UserError, match=r"--lr 0\.5 differs"):
        as_restarted(replace(same, lr=0.5))
    new = replace(same, out=tmp_path / "new")
    assert as_restarted(new) is new
    assert TWO["precision"] == "fp32"
