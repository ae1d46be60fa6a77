"""Every Triton kernel compiles for the GPUs that we name, with no GPU, at the configurations that its op would use.

Registers, spills and shared memory are read out of the cubins. The compiling is in triton_compile.py, in one process
an architecture.
"""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "fastgpt/ops/triton"
SHARED = {80: 99, 90: 227, 100: 227}  # KB a program: sm_80's table also serves sm_86 and sm_89, which have no more


@functools.cache
def compiled(arch, how):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, Path(__file__).with_name("triton_compile.py"), str(arch), how]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(rows, arch):
    for row in rows:
        assert row["shared"] <= SHARED[arch] * 1024, row
        forward = "backward" not in row["kernel"]
        assert row["spills"] <= (0 if forward else 100), row  # what backward's are is told in attention_launch.py
        if row["kernel"].startswith("attention") and "16" in row["dtype"]:
            few_rows = row["tile"][row["kernel"].endswith("kv")] < 64  # wgmma has 64 rows
            instruction = {80: "mma", 90: "mma" if few_rows else "wgmma", 100: "mma" if few_rows else "tcgen05"}[arch]
            assert row[instruction] > 0, row
        if row["kernel"] == "cross_entropy_rows":
            assert row["wide_loads"] >= 2, row


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_default_configurations(arch):
    check(compiled(arch, "quick"), arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_configuration(arch):
    rows = compiled(arch, "full")
    check(rows, arch)
    assert {row["D"] for row in rows if row["kernel"] == "attention_forward"} == {16, 32, 64, 80, 96, 128, 256}


def test_every_kernel_is_compiled():
    """Kernels are what is launched: `name[(...)](...)` or `name[grid](...)`."""
    launched = {
        name for path in KERNELS.glob("*.py") for name in re.findall(r"^\s+(\w+)\[(?:\(|grid)", path.read_text(), re.M)
    }
    assert {"attention_forward", "combine", "document_spans"} <= launched
    assert {row["kernel"] for row in compiled(90, "quick")} == launched
