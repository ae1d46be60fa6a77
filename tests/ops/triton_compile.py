"""Compiles every Triton kernel for a GPU that is not there; run as `python triton_compile.py ARCH quick|full`.

One line of JSON for each: what it is, its registers, how many instructions store one to the stack (spills), its shared
memory, and the matmuls and loads of 16 bytes in its PTX. To add an op's kernels, add a function to SOURCES.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastgpt.ops.triton import attention, attention_backward, attention_launch, cross_entropy

HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
Job = tuple[dict[str, Any], Any, dict[str, str], dict[str, Any], dict[str, int]]


def attention_kernels(arch: int, full: bool) -> Iterator[Job]:
    """What attention_launch would compile at its default configurations."""

    def signature(fn: Any, dtype: torch.dtype, constants: dict[str, Any]) -> dict[str, str]:
        kinds = {}
        for name in fn.arg_names:
            if name in constants:
                kinds[name] = "constexpr"
            elif name in ("Lse", "Delta", "Partial", "PartialLse"):
                kinds[name] = "*fp32"
            elif name in ("Spans", "Boundaries"):
                kinds[name] = "*i32"
            elif name == "Seed":
                kinds[name] = "*i64"
            elif name in ("Q", "K", "V", "Out", "dOut", "dQ", "dK", "dV"):
                kinds[name] = POINTERS[dtype]
            elif name in ("scale", "scale_log2", "inv_keep"):
                kinds[name] = "fp32"
            else:
                kinds[name] = "i32"
        return kinds

    def job(
        fn: Any, tile: Any, D: int, dtype: torch.dtype, causal: bool, docs: bool, dropout: bool, **more: Any
    ) -> Job:
        constants = dict(
            D=D, BLOCK_D=attention_launch.padded(D), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            CAUSAL=causal, DOCS=docs, DROPOUT=dropout, PRECISION=attention_launch._precision(dtype), **more,
        )  # fmt: skip
        if not docs:
            constants["Spans"] = None
        if not dropout:
            constants["Seed"] = None
        label = dict(D=D, dtype=str(dtype), causal=causal, docs=docs, dropout=dropout, tile=list(tile), **more)
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        return label, fn, signature(fn, dtype, constants), constants, options

    def all_of(D: int, dtype: torch.dtype, *variant: bool) -> Iterator[Job]:
        table = attention_launch.config(dtype, D, arch, variant[2])
        yield job(attention.attention_forward, table.forward, D, dtype, *variant, SPLITS=1)
        yield job(attention_backward.attention_backward_q, table.backward_q, D, dtype, *variant)
        yield job(attention_backward.attention_backward_kv, table.backward_kv, D, dtype, *variant)

    def decode(D: int, dtype: torch.dtype) -> Iterator[Job]:
        tile = attention_launch.config(dtype, D, arch).decode
        yield job(attention.attention_forward, tile, D, dtype, True, False, False, SPLITS=8)
        for splits in (8, attention_launch.MAX_SPLITS):
            constants = {"D": D, "BLOCK_D": attention_launch.padded(D), "SPLITS": splits, "BLOCK_S": splits}
            kinds = signature(attention.combine, dtype, constants)
            warps = attention_launch.combine_warps(splits, D)
            yield {"D": D, "dtype": str(dtype)}, attention.combine, kinds, constants, {"num_warps": warps}

    kinds = signature(attention.document_spans, torch.int32, {"BLOCK": 512})
    yield {}, attention.document_spans, {**kinds, "BLOCK": "constexpr"}, {"BLOCK": 512}, {"num_warps": 4}
    variants = [(True, False, False), (True, True, False), (True, False, True), (False, False, False)]
    if full:
        variants += [(True, True, True), (False, True, False)]
    for D in HEAD_DIMS if full else (64,) if arch != 90 else (64, 128):
        every = D not in (80, 96) if full else (arch, D) == (90, 64)  # which are compiled as 128, but for masks
        for variant in variants if every else variants[:1]:
            yield from all_of(D, torch.bfloat16, *variant)
        yield from decode(D, torch.bfloat16)
        if full:
            yield from all_of(D, torch.float16, True, False, False)
            yield from all_of(D, torch.float32, True, False, False)
            yield from decode(D, torch.float32)


def cross_entropy_kernels(arch: int, full: bool) -> Iterator[Job]:
    """Rows that begin on a cache line, of any length; with the gradient and a factor or the loss alone."""
    fn, block = cross_entropy.cross_entropy_rows, cross_entropy.BLOCK
    kinds = {"Targets": "*i64", "Loss": "*fp32", "Factor": "*fp32", "V": "i32", "ignore_index": "i32", "stride": "i32"}
    for dtype in (torch.bfloat16, torch.float32):
        for gradient in (True, False):
            constants = {
                "Z_LOSS": 1e-4, "HAS_FACTOR": gradient, "GRADIENT": gradient, "ACC": tl.float32, "BLOCK": block,
                "TAIL": cross_entropy.TAIL, **({} if gradient else {"Factor": None}),
            }  # fmt: skip
            signature = {**kinds, "Logits": POINTERS[dtype], **dict.fromkeys(constants, "constexpr")}
            yield {"dtype": str(dtype), "GRADIENT": gradient}, fn, signature, constants, {"num_warps": block // 512}


SOURCES = (attention_kernels, cross_entropy_kernels)


def compiled(arch: int, job: Job) -> dict[str, Any]:
    label, fn, signature, constants, options = job
    aligned = [n for n, kind in signature.items() if kind[0] == "*" or n.startswith("stride")]
    attrs = {(fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    signature = {name: signature[name] for name in fn.arg_names}  # in the order of the arguments
    kernel = triton.compile(
        ASTSource(fn, signature, constants, attrs),
        target=GPUTarget("cuda", arch, 32),
        options={**options, **attention_launch.OPTIONS},
    )
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"

    def cuobjdump(what: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            command = [tools / "cuobjdump", what, file.name]
            environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}  # it calls nvdisasm
            return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    usage = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", cuobjdump("--dump-resource-usage"))
    assert usage
    registers, stack, local = map(int, usage.groups())
    spills = 0
    if stack or local:  # only then, because disassembling is slow
        spills = len(re.findall(r"\bSTL", cuobjdump("--dump-sass")))
    ptx = kernel.asm["ptx"]
    return {
        "kernel": fn.__name__,
        "arch": arch,
        **label,
        "registers": registers,
        "spills": spills,
        "shared": kernel.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "tcgen05": ptx.count("tcgen05.mma"),
        "wide_loads": len(re.findall(r"ld\.global\S*\.v4", ptx)),
    }


if __name__ == "__main__":
    assert not os.environ.get("TRITON_INTERPRET")
    arch, full = int(sys.argv[1]), sys.argv[2] == "full"
    for source in SOURCES:
        for job in source(arch, full):
            print(json.dumps(compiled(arch, job)), flush=True)
