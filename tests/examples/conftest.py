import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """Runs a stage's script in its shortest form, in a folder without a quickstart -> (exit code, stdout, stderr)."""
    folder = tmp_path_factory.mktemp("stages")

    def run(name, text=argparse.__file__):
        command = [sys.executable, ROOT / f"examples/{name}.py", "--text", text, "--quick", "--out", "out"]
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        return done.returncode, done.stdout, done.stderr, folder / "out" / f"{name}.png"

    return run
