import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/data.py"


@pytest.mark.slow
def test_preparing_is_measured_beside_tiktoken(tmp_path):
    options = ["--megabytes", "2", "--rounds", "2", "--vocab-size", "300", "--out", tmp_path]
    done = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, cwd=SCRIPT.parents[1])
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.rglob("data.json")
    result = json.loads(path.read_text())
    for row in result["prepare"]:
        assert len(row["seconds"]["fastgpt"]) == len(row["ratios"]) == 2
        assert f"{row['ratio']:.2f}" in done.stdout
    assert all(row["peaks"]["command"] > 0 for row in result["prepare_memory"])
