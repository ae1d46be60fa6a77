"""Runs the CUDA kernels of csrc/cuda on a CPU, so that their logic is proved where there is no GPU.

    emulated = emulation.build(emulation.CUDA / "layer_norm.cu")   # compiled once for all sessions
    y, mean, rstd = emulated.layer_norm(x, w, b, 1e-5)             # its ops, on CPU tensors
    with emulation.active(emulation.CUDA / "layer_norm.cu"):       # torch.ops.fastgpt.<its ops> are those on the CPU
        fastgpt.ops.layer_norm(x, w, b).sum().backward()

A kernel raises RuntimeError, with its place in the source, the block and the thread, where it
    - leaves some threads of a block behind at a barrier or some lanes of a warp at a shuffle, or shuffles out of range;
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
CUDA = ROOT / "csrc/cuda"
BUILD = ROOT / "build/emulation"
COMPILER = shutil.which(
    "g++"
)  # GCC: the runtime stands in for the sanitizers' own, whose interface clang has otherwise
FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-ffp-contract=off", "-g1", "-w"]
RUNTIME_FLAGS = ["-O2"]
# -fsanitize=thread makes the compiler call a function of ours before each access to memory; no sanitizer is linked.
CHECKS = "thread,alignment,bounds,shift,integer-divide-by-zero,signed-integer-overflow"
KERNEL_FLAGS = ["-O1", f"-fsanitize={CHECKS}"]


def rewrite(source: str) -> str:
    """CUDA C++ to C++: what macros cannot do. Line numbers stay."""

    def blank(match: re.Match[str]) -> str:
        text = match[0]
        return text if text[0] in "\"'" else " " + "\n" * text.count("\n")

    source = re.sub(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', blank, source, flags=re.S)
    source = re.sub(r"#\s*include\s*<(cuda|cooperative)[^>\n]*>", "", source)
    source = source.replace(
        "STABLE_TORCH_LIBRARY_IMPL(fastgpt, CUDA,", "STABLE_TORCH_LIBRARY_IMPL(fastgpt_emulated, CPU,"
    )
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
    """__shared__ T a[4], b; to references to memory that the runtime gives, full of NaN and with gaps around it."""
    specifiers = r"(?:__align__|alignas)\s*\([^)]*\)"
    declaration = "".join(re.findall(specifiers, match[1])).replace("alignas", "__align__")
    out, named = "", re.sub(specifiers, "", match[1])
    for i, part in enumerate(_split(named)):
        name = re.search(r"(\w+)\s*(?:\[.*)?$", part, re.S)
        assert name, f"not understood: __shared__ {match[1]}"
        declaration += "," * (i > 0) + f"{part[: name.start(1)]}shared_{name[1]}{part[name.end(1) :]}"
        out += f" static char key_{name[1]}; auto& {name[1]} = *static_cast<shared_{name[1]}*>("
        out += f"emulation::static_shared(&key_{name[1]}, sizeof(shared_{name[1]}), alignof(shared_{name[1]})));"
    return f"typedef {declaration};{out}"


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
    """kernel<T><<<config>>>( to emulation::Launch("kernel<T>", {config}, [&](const auto&... a) { kernel<T>(...); })("""
    end = source.index(">>>", at)
    start = at
    while source[start - 1].isspace():
        start -= 1
    if source[start - 1] == ">":  # template arguments
        angles = parentheses = 0
        while True:
            start -= 1
            c = source[start]
            parentheses += (c == ")") - (c == "(")
            angles += (c == ">") - (c == "<") if parentheses == 0 else 0
            if angles == 0 and parentheses == 0:
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


def _compile(source: Path) -> Path:
    """The library of one CUDA source, from the cache or from g++."""
    sources = {p.name: rewrite(p.read_text()) for p in [source, *sorted((ROOT / "csrc/common").glob("*.cuh"))]}
    plain = [*sorted((ROOT / "csrc/common").glob("*.h")), *sorted(RUNTIME.iterdir())]
    assert COMPILER
    include = Path(torch.__file__).parent / "include"
    version = subprocess.run([COMPILER, "--version"], capture_output=True, text=True).stdout
    flags = [*FLAGS, "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{include}", f"-I{RUNTIME}"]

    def digest(*parts: object) -> str:
        return hashlib.sha256(
            repr((Path(__file__).read_text(), flags, version, torch.__version__, parts)).encode()
        ).hexdigest()[:16]

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
        command += [
            f"-I{folder}",
            f"-I{ROOT / 'csrc/common'}",
            str(folder / source.name),
            "-o",
            str(folder / "kernels.o"),
        ]
        _run(command)
        libraries = [f"-L{include.parent / 'lib'}", "-ltorch_cpu", "-lc10"]  # and no sanitizer's
        # The runtime comes first: of templates that both have, std::string's say, the linker takes its unchecked ones.
        _run([COMPILER, "-shared", str(runtime), str(folder / "kernels.o"), *libraries, "-o", str(out)])
        shutil.rmtree(folder)

    key = digest(KERNEL_FLAGS, sources, [p.read_text() for p in plain])
    return _made(BUILD / f"{source.stem}-{key}.so", make)


def op_names(source: Path) -> list[str]:
    """The ops that a CUDA source implements."""
    return re.findall(r'm\.impl\(\s*"(\w+)"', source.read_text())


def build(source: Path, schemas: dict[str, str] | None = None) -> SimpleNamespace:
    """The ops of a CUDA source, emulated; skips the test where there is no g++.

    Args:
        schemas: "(Tensor x) -> Tensor" for each op; by default those of the ops' namesakes in `fastgpt`.
    """
    if not COMPILER:
        pytest.skip("needs g++")
    return _load(source, tuple((schemas or {}).items()))


@functools.cache
def _load(source: Path, schemas: tuple[tuple[str, str], ...]) -> SimpleNamespace:
    names = op_names(source)
    for op in names:
        schema = dict(schemas).get(op) or str(getattr(torch.ops.fastgpt, op).default._schema)
        torch.library.define(f"fastgpt_emulated::{op}", schema[schema.index("(") :])
    torch.ops.load_library(str(_compile(source)))
    return SimpleNamespace(**{op: getattr(torch.ops.fastgpt_emulated, op) for op in names})


@contextmanager
def active(source: Path) -> Iterator[None]:
    """Within it, the CPU kernels of a CUDA source's ops are the emulated CUDA ones, in the whole process."""
    emulated = build(source)
    library = torch.library.Library("fastgpt", "IMPL")
    before = set(registry._present)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the kernel of the extension is overridden, which is the point
            for op in op_names(source):
                library.impl(op, getattr(emulated, op), "CPU")
                registry._present.add((op, "cpu"))
        yield
    finally:
        library._destroy()
        registry._present.clear()
        registry._present.update(before)
