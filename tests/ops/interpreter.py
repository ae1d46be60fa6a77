"""Runs a file of tests under Triton's interpreter, in a process of its own.

Triton reads the variable when a kernel is defined, and what it changes is the whole process's.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

triton = pytest.importorskip("triton")


def interpret(file: str, *options: str) -> None:
    if triton.__version__.startswith("3.6") and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 fails on loops with numpy 2.4")
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:xdist", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *options, Path(__file__).with_name(file)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
