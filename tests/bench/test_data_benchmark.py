import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/data.py"


def test_batches_are_measured_beside_other_ways(tmp_path):
    sizes = ["--loaders.tokens", "20000", "--loaders.block-sizes", "64", "--loaders.batch-size", "2"]
    times = ["--loaders.seconds", "0.01", "--loaders.steps", "2", "--loaders.device", "cpu"]
    command = [sys.executable, SCRIPT, "--parts", "loaders", *sizes, *times, "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    for row in ("PackedDataset", "nanoGPT's get_batch", "DataLoader, 2 workers", "read when needed", "read ahead"):
        assert row in done.stdout
    (path,) = tmp_path.rglob("data.json")
    assert all(row["tokens_per_s"] > 0 for row in json.loads(path.read_text())["loaders"])


@pytest.mark.slow
def test_preparing_is_measured_beside_tiktoken(tmp_path):
    options = ["--parts", "prepare", "--megabytes", "2", "--rounds", "2", "--vocab-size", "300", "--out", tmp_path]
    done = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, cwd=SCRIPT.parents[1])
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.rglob("data.json")
    result = json.loads(path.read_text())
    for row in result["prepare"]:
        assert len(row["seconds"]["fastgpt"]) == len(row["ratios"]) == 2
        assert f"{row['ratio']:.2f}" in done.stdout
    assert all(row["peaks"]["command"] > 0 for row in result["prepare_memory"])
