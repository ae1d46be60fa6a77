"""Builds the two native parts where it can, and never fails the installation where it cannot.

fastgpt/_C.abi3.so, the ops, uses only libtorch's stable ABI and nothing of Python's own, so that one file serves every
Python from 3.10 and every torch from 2.11. It is loaded by `torch.ops.load_library`, not imported.
fastgpt/_bpe.*.so, the BPE trainer, is a pybind11 module of the Python that builds it, and needs no torch.
"""

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # 2.11, the oldest torch that we support
# On glibc + GCC the row loops are cloned for AVX2 and AVX-512 and picked at load time (csrc/common/cpu.h),
# so no -march here: the wheel runs on any x86-64 or ARM machine of its platform.
CXX_FLAGS = [
    "-O3",
    "-std=c++20",
    "-fopenmp-simd",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-g0",
]
# 9.0a is Hopper with wgmma; the newest generic architecture comes as PTX too, for GPUs that are newer still.
CUDA_ARCHS = "8.0;9.0a;10.0+PTX"
# What the package does without them.
INSTEAD = {"fastgpt._C": "every op will take its reference", "fastgpt._bpe": "tokenizers will train in plain Python"}


def skip(why: str, *names: str) -> None:
    """One clear line."""
    what = f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} skipped"
    print(f"fastgpt: {what}: {why}; {' and '.join(INSTEAD[n] for n in names)}", file=sys.stderr)


def ops() -> Extension | None:
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        skip("torch is not installed here (install it first, then fastgpt with --no-build-isolation)", "fastgpt._C")
        return None
    sources = sorted(str(p) for p in Path("csrc/cpu").glob("*.cpp"))
    args = {"cxx": [*CXX_FLAGS, TORCH_TARGET]}
    kind = cpp_extension.CppExtension
    # torch.cuda.is_available() is no test for this: a build machine often has nvcc and no GPU.
    if torch.version.cuda and cpp_extension.CUDA_HOME and shutil.which(f"{cpp_extension.CUDA_HOME}/bin/nvcc"):
        kind = cpp_extension.CUDAExtension
        sources += sorted(str(p) for p in Path("csrc/cuda").glob("*.cu"))
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS)
        args["nvcc"] = ["-O3", "-std=c++20", "-DUSE_CUDA", TORCH_TARGET]
    return kind(
        "fastgpt._C",
        sources,
        include_dirs=[str(Path("csrc/common").resolve())],
        depends=sorted(str(p) for p in Path("csrc/common").glob("*")),
        extra_compile_args=args,
        py_limited_api=True,
    )


def pybind11_headers() -> str | None:
    """pybind11's own folder of them, else the copy that torch brings for extensions."""
    try:
        import pybind11
    except ImportError:
        spec = find_spec("torch")
        copy = Path(spec.origin).parent / "include" if spec and spec.origin else Path()
        return str(copy) if (copy / "pybind11").is_dir() else None
    return pybind11.get_include()


def bpe() -> Extension | None:
    include = pybind11_headers()
    if include is None:
        skip("pybind11 is not installed here (install it first, then fastgpt)", "fastgpt._bpe")
        return None
    return Extension(
        "fastgpt._bpe",
        sorted(str(p) for p in Path("csrc/bpe").glob("*.cpp")),
        include_dirs=[include],
        depends=sorted(str(p) for p in Path("csrc/bpe").glob("*.h")),
        extra_compile_args=["-O3", "-std=c++20", "-fvisibility=hidden", "-pthread", "-g0"],
        extra_link_args=["-pthread"],
        language="c++",
    )


def command(base: type[build_ext]) -> type[build_ext]:
    """build_ext that leaves out what does not compile: a compiler that is there but cannot do it stops nothing."""

    def leave_out(self: build_ext, error: Exception, *extensions: Extension) -> None:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        for extension in extensions:
            skip(f"it did not compile ({first}; `pip install -v` shows all of it)", extension.name)
        self.extensions = [e for e in self.extensions if e not in extensions]

    class Build(base):  # type: ignore[valid-type, misc]
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                leave_out(self, error, *self.extensions)

        def build_extension(self, extension: Extension) -> None:
            try:
                super().build_extension(extension)
            except Exception as error:
                leave_out(self, error, extension)

    return Build


def extensions() -> dict:
    """The arguments to setup() that build them; a line says why for each that cannot be."""
    if sys.platform == "win32":
        skip("they are not built on Windows yet", *INSTEAD)
        return {}
    compiler = os.environ.get("CXX", "c++").split()[0]
    if not (shutil.which(compiler) or ("CXX" not in os.environ and shutil.which("g++"))):
        skip(f"no C++ compiler `{compiler}` (install g++ or clang++ and install fastgpt again)", *INSTEAD)
        return {}
    base = build_ext
    if kernels := ops():
        from torch.utils.cpp_extension import BuildExtension as base
    return {"ext_modules": [e for e in (kernels, bpe()) if e], "cmdclass": {"build_ext": command(base)}}


setup(**extensions())
