import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/lora.py"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_both_contenders_train_alike(precision, tmp_path):
    options = ["--preset", "micro", "--block-size", "32", "--steps", "8", "--device", "cpu", "--precision", precision]
    done = subprocess.run(
        [sys.executable, SCRIPT, *options, "--out", tmp_path], capture_output=True, text=True, cwd=SCRIPT.parents[1]
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.rglob(f"lora_micro_{precision}.json")
    result = json.loads(path.read_text())
    assert f"{result['time_ratio']:.2f}" in done.stdout
    ours, theirs = (result["contenders"][name] for name in ("fastgpt", "PEFT"))
    assert len(ours["losses"]) == len(theirs["seconds"]) == 8
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-3 if precision == "fp32" else 0.05)
    assert ours["losses"][-1] < ours["losses"][0]
