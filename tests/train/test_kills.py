import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastgpt.train import checkpoint, metrics


def what_it_did(run):
    """All that a run leaves, without what depends on the clock."""
    clocks = ("seconds", "tokens_per_s", "mfu", "data_wait")
    records = metrics.read_metrics(run / "metrics.jsonl")
    samples = (run / "samples.jsonl").read_text()
    return [{k: v for k, v in r.items() if k not in clocks} for r in records], samples


def tensors(run):
    step, folder = checkpoint.newest(run)
    optimizer = checkpoint.load_state(folder)["optimizer"]
    moments = {f"{i}.{name}": t for i, state in optimizer["state"].items() for name, t in state.items()}
    return {"step": torch.tensor(step), **load_file(folder / "model.safetensors"), **moments}


@pytest.mark.parametrize(("seed", "kills"), [(0, 12), pytest.param(1, 50, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_goes_on_to_the_same_bits(shards, tmp_path, seed, kills):
    command = [sys.executable, "-m", "tests.train.killer", shards, tmp_path, str(seed), str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] == kills
    assert found["midway"] >= kills // 6  # most of those that were aimed at a checkpoint hit it
    whole, state = what_it_did(tmp_path / "whole"), tensors(tmp_path / "whole")
    for i in range(found["runs"]):
        run = tmp_path / f"killed_{i}"
        assert "finished at step 40" in (tmp_path / f"killed_{i}.txt").read_text()
        assert what_it_did(run) == whole
        mine = tensors(run)
        assert mine.keys() == state.keys()
        for name, tensor in state.items():
            assert torch.equal(mine[name], tensor), name
        assert not list(run.rglob("*.tmp-*"))
