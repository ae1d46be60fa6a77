"""Every CUDA source compiles for the GPUs that we name, with no GPU and no CUDA torch; no kernel spills registers."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.name)
def test_compiles_without_spills(source, tmp_path):
    include = Path(torch.__file__).parent / "include"
    archs = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ("80", "90a", "100")]
    flags = [
        "-c",
        "-std=c++20",
        "-O3",
        "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        "--threads",
        "2",
        "-Xptxas",
        "-v",
    ]
    command = ["nvcc", *flags, f"-I{include}", f"-I{ROOT / 'csrc/common'}", *archs, source, "-o", tmp_path / "out.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(spills) >= 3, "ptxas said nothing of at least one architecture"
    assert all(pair == ("0", "0") for pair in spills)
    assert (tmp_path / "out.o").stat().st_size > 0
