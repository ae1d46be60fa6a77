import gc
import os
import subprocess
import sys

import pytest


@pytest.fixture
def little_garbage():
    """What was imported is not looked through at each of the many collections around a measurement."""
    import peft  # noqa: F401  a million objects, which would else be imported on the way

    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def measured_by(tmp_path_factory):
    """Runs a `fastgpt bench` command in a terminal of 100 columns; its folder of results, and what it printed."""

    def measure(*command):
        out = tmp_path_factory.mktemp("results")
        command = [sys.executable, "-m", "fastgpt", *command, "--out", str(out), "--machine", "here"]
        run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"})
        assert run.returncode == 0, run.stderr
        return out, run.stdout

    return measure
