import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgpt import ops
from fastgpt.ops import registry

ROOT = Path(__file__).parents[2]


def python(code, **options):
    env = {**os.environ, **options.pop("env", {})}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, **options)


@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
def test_the_extension_is_built_where_a_compiler_is():
    assert registry.implementation("layer_norm", "cpu").name == "C++"
    assert "layer_norm on cpu" in registry.extension_line()


def test_every_op_has_a_row_for_each_device():
    rows = ops.implementations()
    names = {r.op for r in rows}
    assert names <= set(ops.__all__)
    assert {name.removesuffix("_reference") for name in ops.__all__ if name.endswith("_reference")} == names
    assert {(r.op, r.device) for r in rows} == {(name, device) for name in names for device in ("cpu", "cuda")}
    assert all(r.reason for r in rows)
    if not torch.version.cuda:
        assert registry.implementation("layer_norm", "cuda").name == "reference"


def test_using_is_undone_also_after_an_error():
    before = registry.implementation("layer_norm", "cpu").name

    def fail():
        with ops.using("reference"):
            assert registry.implementation("layer_norm", "cpu").name == "reference"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert registry.implementation("layer_norm", "cpu").name == before
    with pytest.raises(ValueError, match="mode must be"), ops.using("fast"):
        pass


def test_the_environment_variable_forces_the_reference():
    code = "from fastgpt.ops import registry; print(registry.implementation('layer_norm', 'cpu'))"
    assert "name='reference'" in python(code, env={"FASTGPT_OPS": "reference"}).stdout


@pytest.mark.parametrize("broken", [None, b"not a library"])
def test_without_the_extensions_all_runs_in_python(tmp_path, broken):
    shutil.copytree(ROOT / "fastgpt", tmp_path / "fastgpt", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if broken:
        for name in ("_C", "_bpe"):
            (tmp_path / f"fastgpt/{name}.abi3.so").write_bytes(broken)
    code = """
import sys
# An editable installation finds its own fastgpt._bpe where this copy has none.
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in repr(finder)]
import torch, fastgpt
from fastgpt import bpe, ops, GPT, GPTConfig, Tokenizer
print(fastgpt.__file__)
print(len(Tokenizer.train(["ab ab"], 258).merges), bpe.trainer_line())
x, w = torch.randn(2, 8, requires_grad=True), torch.ones(8)
ops.layer_norm(x, w, w).sum().backward()
model = GPT(GPTConfig.preset("micro"))
model.loss(torch.ones(1, 4).long(), torch.ones(1, 4).long()).backward()
print(ops.implementations())
"""
    done = python(code, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout
    assert "op='layer_norm', device='cpu', name='reference'" in done.stdout
    assert ("does not load" if broken else "was not built") in done.stdout
    assert "1 BPE trainer: plain Python (" in done.stdout


@pytest.mark.parametrize(
    ("compiler", "absent", "lines"),
    [
        ("/no/such/compiler", [], ["fastgpt._C, fastgpt._bpe are skipped: no C++ compiler `/no/such/compiler`"]),
        ("false", [], ["fastgpt._C is skipped: it did not compile", "fastgpt._bpe is skipped: it did not compile"]),
        ("false", ["pybind11"], ["fastgpt._C is skipped: it did not", "fastgpt._bpe is skipped: it did not compile"]),
        ("false", ["torch"], ["fastgpt._C is skipped: torch is not", "fastgpt._bpe is skipped: it did not compile"]),
        (
            "false",
            ["torch", "pybind11"],
            ["fastgpt._C is skipped: torch is not", "fastgpt._bpe is skipped: pybind11 is not"],
        ),
    ],
)
def test_what_cannot_be_built_is_skipped_with_one_line(tmp_path, compiler, absent, lines):
    env = {"CXX": compiler}
    for package in absent:
        (tmp_path / "absent").mkdir(exist_ok=True)
        (tmp_path / f"absent/{package}.py").write_text("raise ImportError")
        env["PYTHONPATH"] = str(tmp_path / "absent")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "fastgpt"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(source, tmp_path / name)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build"],
        cwd=tmp_path,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = [line.removeprefix("fastgpt: ") for line in done.stderr.splitlines() if line.startswith("fastgpt: ")]
    assert len(said) == len(lines)
    assert all(line.startswith(start) for line, start in zip(said, lines, strict=True))
    assert not list(tmp_path.rglob("*.so"))
