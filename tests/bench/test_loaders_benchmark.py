import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks/loaders.py"


def test_all_ways_are_measured():
    options = ["--tokens", "20000", "--block-sizes", "64", "--batch-size", "2", "--seconds", "0.01", "--steps", "2"]
    command = [sys.executable, SCRIPT, *options, "--preset", "micro", "--device", "cpu"]
    environment = {**os.environ, "COLUMNS": "200", "PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for row in ("PackedDataset", "nanoGPT's get_batch", "DataLoader, 2 workers", "read when needed", "read ahead"):
        assert row in done.stdout
