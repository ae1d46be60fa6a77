import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/tokenizer.py"


@pytest.mark.slow
def test_both_contenders_learn_nearly_the_same(tmp_path):
    options = ["--megabytes", "2", "--vocab-size", "2000", "--rounds", "2", "--out", tmp_path]
    done = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, cwd=SCRIPT.parents[1])
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.rglob("tokenizer.json")
    result = json.loads(path.read_text())
    assert f"{result['times_as_fast']:.1f} (" in done.stdout
    assert 1 < result["megabytes"] <= 2
    assert result["same_tokens"] > 0.95
    assert all(len(c["seconds"]) == 2 and min(c["seconds"]) > 0 for c in result["contenders"].values())
