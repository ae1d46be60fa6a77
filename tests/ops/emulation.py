"""Runs the CUDA kernels of csrc/cuda on a CPU, so that their logic is proved where there is no GPU.

    ops = emulation.build("layer_norm")                 # compiles csrc/cuda/layer_norm.cu, once for all sessions
    y, mean, rstd = ops.layer_norm(x, w, b, 1e-5)       # its ops, on CPU tensors
    with emulation.active("layer_norm"):                # torch.ops.fastgpt.<its ops> on the CPU are the emulated ones
        fastgpt.ops.layer_norm(x, w, b).sum().backward()

A kernel raises RuntimeError, with its place in the source, the block and the thread, where it
    - leaves some threads of a block behind at a barrier, or some lanes of a warp at a shuffle, or shuffles out of range;
    - reads or writes outside a tensor or shared memory, or at an address that is not aligned for the access's width;
    - writes through a pointer that came from `const_data_ptr`;
    - races: two threads access the same bytes of shared memory or of a tensor, one of them writes, and no barrier is
      between; two blocks likewise;
    - overflows an int, shifts too far, leaves an array; takes more shared memory than a GPU has; lacks a DeviceGuard.
Shared memory is full of NaN before each block, and threads and blocks run in ascending and descending order in turn.
What it does not see: time, registers, and races that need two kernels to overlap. Inline PTX does not compile.
The header that stands for CUDA's, and what it holds of them, is cuda_emulation/emulation.h.
"""

import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastgpt.ops import registry

ROOT = Path(__file__).parents[2]
RUNTIME = Path(__file__).parent / "cuda_emulation"
BUILD = ROOT / "build/emulation"
COMPILER = shutil.which("g++")  # GCC: the runtime stands in for the sanitizers' own, whose interface clang has otherwise
FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-ffp-contract=off", "-g1", "-w"]
RUNTIME_FLAGS = ["-O2"]
# -fsanitize=thread makes the compiler call a function of ours before each access to memory; no sanitizer is linked.
CHECKS = "thread,alignment,bounds,shift,integer-divide-by-zero,signed-integer-overflow"
KERNEL_FLAGS = ["-O1", f"-fsanitize={CHECKS}"]
Change = Callable[[str], str]


def rewrite(source: str) -> str:
    """CUDA C++ to C++: what macros cannot do. Line numbers stay."""

    def blank(match: re.Match[str]) -> str:
        text = match[0]
        return text if text[0] in "\"'" else " " + "\n" * text.count("\n")

    source = re.sub(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', blank, source, flags=re.S)
    source = re.sub(r"#\s*include\s*<(cuda|cooperative)[^>\n]*>", "", source)
    source = source.replace("STABLE_TORCH_LIBRARY_IMPL(fastgpt, CUDA,", "STABLE_TORCH_LIBRARY_IMPL(EMULATED, CPU,")
    source = re.sub(
        r"extern\s+__shared__\s+(?:(?:__align__|alignas)\s*\(\s*\w+\s*\)\s*)?([^;\[]+?)\s*\b(\w+)\s*\[\s*\]\s*;",
        r"\1* \2 = static_cast<\1*>(emulation::dynamic_shared());",
        source,
    )
    source = re.sub(r"\b__shared__\s+([^;]+);", _static_shared, source)
    while (at := source.find("<<<")) >= 0:
        source = _launch(source, at)
    return source


def _static_shared(match: re.Match[str]) -> str:
    declaration = match[1]
    plain = re.sub(r"(?:__align__|alignas)\s*\([^)]*\)", "", declaration)
    names = [re.search(r"(\w+)\s*(?:\[[^,]*)?$", part)[1] for part in _split(plain)]  # type: ignore[index]
    declaration = declaration.replace("alignas", "__align__")
    return f"static {declaration}; " + " ".join(f"emulation::static_shared(&{n}, sizeof({n}));" for n in names)


def _split(text: str) -> list[str]:
    """At the commas outside all brackets."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "([{<") - (c in ")]}>")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return parts


def _launch(source: str, at: int) -> str:
    """kernel<T><<<config>>>( to emulation::Launch("kernel<T>", {config}, [&](const auto&... a) { kernel<T>(...); })(."""
    end = source.index(">>>", at)
    start = at
    while source[start - 1].isspace():
        start -= 1
    if source[start - 1] == ">":  # template arguments
        depth = 0
        while True:
            start -= 1
            depth += (source[start] == ">") - (source[start] == "<")
            if depth == 0:
                break
    while re.match(r"[\w:]", source[start - 1]):
        start -= 1
    kernel = source[start:at].strip()
    name = " ".join(kernel.split())
    config = source[at + 3 : end]
    call = f'emulation::Launch("{name}", emulation::Config({config}), [&](const auto&... a) {{ {kernel}(a...); }})'
    return source[:start] + call + source[end + 3 :]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the emulated CUDA source did not compile:\n{done.stderr[:4000]}")


def _made(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`, made once also where several processes want it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            temporary = path.with_name(f"{path.name}.{os.getpid()}")
            make(temporary)
            temporary.rename(path)
    return path


def _compile(name: str, namespace: str, change: Change) -> Path:
    """The library of one CUDA source, from the cache or from g++."""
    sources = {p.name: rewrite(change(p.read_text())) for p in (ROOT / "csrc/common").glob("*.cuh")}
    sources[f"{name}.cu"] = rewrite(change((ROOT / f"csrc/cuda/{name}.cu").read_text()))
    plain = [*sorted((ROOT / "csrc/common").glob("*.h")), *sorted(RUNTIME.iterdir())]
    assert COMPILER
    include = Path(torch.__file__).parent / "include"
    version = subprocess.run([COMPILER, "--version"], capture_output=True, text=True).stdout
    flags = [*FLAGS, "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-DEMULATED={namespace}", f"-I{include}", f"-I{RUNTIME}"]

    def digest(*parts: object) -> str:
        return hashlib.sha256(repr((Path(__file__).read_text(), flags, version, torch.__version__, parts)).encode()).hexdigest()[:16]

    runtime_key = digest(RUNTIME_FLAGS, [p.read_text() for p in sorted(RUNTIME.iterdir())])
    runtime = _made(
        BUILD / f"runtime-{runtime_key}.o",
        lambda out: _run([COMPILER, *flags, *RUNTIME_FLAGS, "-c", str(RUNTIME / "emulation.cpp"), "-o", str(out)]),
    )

    def make(out: Path) -> None:
        folder = out.with_name(f"{out.name}.src")
        folder.mkdir(exist_ok=True)
        for file, text in sources.items():
            (folder / file).write_text(f'#line 1 "{file}"\n{text}')
        command = [COMPILER, *flags, *KERNEL_FLAGS, "-c", "-x", "c++", "-include", str(RUNTIME / "emulation.h")]
        command += [f"-I{folder}", f"-I{ROOT / 'csrc/common'}", str(folder / f"{name}.cu"), "-o", str(folder / "kernels.o")]
        _run(command)
        libraries = [f"-L{include.parent / 'lib'}", "-ltorch_cpu", "-lc10"]  # and no sanitizer's
        _run([COMPILER, "-shared", str(folder / "kernels.o"), str(runtime), *libraries, "-o", str(out)])
        shutil.rmtree(folder)

    key = digest(KERNEL_FLAGS, sources, [p.read_text() for p in plain])
    return _made(BUILD / f"{name}-{key}.so", make)


def op_names(name: str) -> list[str]:
    """The ops that csrc/cuda/<name>.cu implements."""
    return re.findall(r'm\.impl\(\s*"(\w+)"', (ROOT / f"csrc/cuda/{name}.cu").read_text())


def build(name: str, namespace: str = "fastgpt_emulated", change: Change = str) -> SimpleNamespace:
    """The ops of csrc/cuda/<name>.cu, emulated; skips the test where there is no g++.

    Args:
        namespace: the torch namespace that they live in; another for each `change`.
        change: makes a mutant of the source (and of csrc/common/*.cuh), to see that a fault is found.
    """
    if not COMPILER:
        pytest.skip("needs g++")
    return _load(name, namespace, change)


@functools.cache
def _load(name: str, namespace: str, change: Change) -> SimpleNamespace:
    names = op_names(name)
    for op in names:
        schema = str(getattr(torch.ops.fastgpt, op).default._schema)
        torch.library.define(f"{namespace}::{op}", schema[schema.index("(") :])
    torch.ops.load_library(str(_compile(name, namespace, change)))
    return SimpleNamespace(**{op: getattr(getattr(torch.ops, namespace), op) for op in names})


@contextmanager
def active(name: str, namespace: str = "fastgpt_emulated", change: Change = str) -> Iterator[None]:
    """Within it, the CPU kernels of the ops of csrc/cuda/<name>.cu are the emulated CUDA ones, in the whole process."""
    emulated = build(name, namespace, change)
    library = torch.library.Library("fastgpt", "IMPL")
    before = set(registry._present)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the kernel of the extension is overridden, which is the point
            for op in op_names(name):
                library.impl(op, getattr(emulated, op), "CPU")
                registry._present.add((op, "cpu"))
        yield
    finally:
        library._destroy()
        registry._present.clear()
        registry._present.update(before)
