"""Builds fastgpt/_C.abi3.so where it can, and never fails the installation where it cannot.

The extension uses only libtorch's stable ABI and nothing of Python's own, so that one file serves every
Python from 3.10 and every torch from 2.11. It is loaded by `torch.ops.load_library`, not imported.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

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


def skip(why: str) -> dict:
    """One clear line; the package then runs on the reference of each op."""
    print(f"fastgpt: the extension is skipped: {why}; every op will take its reference", file=sys.stderr)
    return {}


def extension() -> dict:
    """The arguments to setup() that build the extension, or none with a line that says why."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        return skip("torch is not installed here (install torch first, then fastgpt with --no-build-isolation)")
    if sys.platform == "win32":
        return skip("it is not built on Windows yet")
    compiler = os.environ.get("CXX", "c++").split()[0]
    if not (shutil.which(compiler) or ("CXX" not in os.environ and shutil.which("g++"))):
        return skip(f"no C++ compiler `{compiler}` (install g++ or clang++ and install fastgpt again)")

    sources = sorted(str(p) for p in Path("csrc/cpu").glob("*.cpp"))
    args = {"cxx": [*CXX_FLAGS, TORCH_TARGET]}
    kind = cpp_extension.CppExtension
    # torch.cuda.is_available() is no test for this: a build machine often has nvcc and no GPU.
    if torch.version.cuda and cpp_extension.CUDA_HOME and shutil.which(f"{cpp_extension.CUDA_HOME}/bin/nvcc"):
        kind = cpp_extension.CUDAExtension
        sources += sorted(str(p) for p in Path("csrc/cuda").glob("*.cu"))
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS)
        args["nvcc"] = ["-O3", "-std=c++20", "-DUSE_CUDA", TORCH_TARGET]

    class Build(cpp_extension.BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # a compiler that is there but cannot do it must not stop the installation
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                skip(f"it did not compile ({first}; `pip install -v` shows all of it)")
                self.extensions.clear()

    return {
        "ext_modules": [
            kind(
                "fastgpt._C",
                sources,
                include_dirs=[str(Path("csrc/common").resolve())],
                depends=sorted(str(p) for p in Path("csrc/common").glob("*")),
                extra_compile_args=args,
                py_limited_api=True,
            )
        ],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**extension())
