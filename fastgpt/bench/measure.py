"""Runs an op's cases and makes a row of figures for each shape, pass and contender."""

import os
import shutil
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgpt.bench.environment import Neighbours, environment, machine_name
from fastgpt.bench.kernels import KERNELS, Case, Contender, Where, Work
from fastgpt.bench.timing import Call, Timed, interleave, peak_bytes
from fastgpt.cpus import cpus
from fastgpt.ops import registry
from fastgpt.train.memory import keep_freed_memory

OURS = "fastgpt"
SECONDS, SECONDS_TARGET, SECONDS_QUICK = 0.2, 0.5, 0.01  # of timing for each contender
BUSY = 0.1  # others' share of the cores from which figures are not to be trusted
COPY_BYTES = 512 << 20  # the most that a copy moves, read and write: larger ones run at the same rate
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}
MATMUL = {"quick": 128, "cpu": 2048, "cuda": 8192}  # rows, columns and depth of the square product


@dataclass(frozen=True)
class Row:
    """One contender at one shape and pass. Times are in milliseconds, of the rounds' times.

    `ratio` is the median over rounds of its time over fastgpt's: 1.2 says that fastgpt is 1.2 times as fast.
    `roofline` is the floor, max(bytes / copy rate, FLOPs / matmul rate) at the rates of the same round, over its time.
    """

    op: str
    shape: str
    dtype: str
    series: str
    size: int
    size_name: str
    direction: str
    contender: str
    library: bool
    headline: bool
    rounds: int
    how: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    min_ms: float
    max_ms: float
    ratio: float
    gb_per_s: float
    tflop_per_s: float
    roofline: float
    floor_ms: float
    memory_bound: bool
    copy_gb_per_s: float
    matmul_tflop_per_s: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Result:
    """All about one op on one device."""

    op: str
    device: str
    machine: str
    implementation: str
    environment: dict[str, str | int]
    notes: list[str]
    rows: list[Row]


def measure(op: str, device: str, quick: bool, machine: str | None, say: Callable[[str], None]) -> Result:
    """Measures one op; `say` is told what is being measured.

    Args:
        op: a name in KERNELS.
        device: "cpu" (fp32) or "cuda" (bf16).
        quick: one tiny shape, a moment each, nothing compiled: shows that it works, measures nothing worth a word.
        machine: a name for the machine; derived from the device if None.
    """
    torch.manual_seed(0)
    if device == "cpu":
        keep_freed_memory()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    where = Where(device, dtype, "quick" if quick else device)
    notes: list[str] = []
    rows: list[Row] = []
    neighbours = Neighbours()
    for case in KERNELS[op](where):
        rows += _rows(op, case, where, notes, say)
    taken = neighbours.cores() or 0.0
    if taken > BUSY * cpus():
        notes.append(
            f"busy machine: others took {taken:.1f} of {cpus()} cores meanwhile; measure again when it is idle"
        )
    used = registry.implementation(op, device)
    return Result(
        op=op,
        device=device,
        machine=machine or machine_name(device),
        implementation=used.name if used.name != "reference" else f"its reference, as {used.reason}",
        environment=environment(device),
        notes=notes,
        rows=rows,
    )


def _rows(op: str, case: Case, where: Where, notes: list[str], say: Callable[[str], None]) -> Iterator[Row]:
    notes += [note for note in case.notes if note not in notes]
    contenders = _contenders(case, where, notes)
    only = list(case.passes) == ["forward"]
    for direction, work in case.passes.items():
        say(f"{op} {case.shape} {direction}")
        calls = {}
        for contender in contenders:
            call = _call(contender, case.args, "step" if only else direction)
            why = _fails(call, where.device) if contender.name != OURS else None
            if why is None:
                calls[contender.name] = call
            elif (note := f"{contender.name} is left out at {case.shape}, {direction}: {why}") not in notes:
                notes.append(note)
        seconds = SECONDS_QUICK if where.sizes == "quick" else SECONDS_TARGET if case.target else SECONDS
        limits = _limits(work, where)
        timed = interleave({**calls, **limits}, where.device, seconds)
        floors = _floors(work, timed, where)
        library = {contender.name for contender in case.library}
        for name, call in calls.items():
            peak = peak_bytes(call, where.device)
            yield _row(op, case, where, direction, name, name in library, timed, floors, peak)


def _contenders(case: Case, where: Where, notes: list[str]) -> list[Contender]:
    reference = [Contender("reference", case.reference)]
    if where.sizes == "quick":
        return [Contender(OURS, case.ours), *reference, *case.library]
    compiler = os.environ.get("CXX", "c++").split()[0]
    if not (shutil.which(compiler) or shutil.which("g++")):
        note = f"torch.compile is left out: no compiler `{compiler}`"
        notes += [] if note in notes else [note]
        return [Contender(OURS, case.ours), *reference, *case.library]
    torch.compiler.reset()  # each shape compiled for itself, as a model with fixed shapes has it
    compiled = Contender("torch.compile", torch.compile(case.reference, dynamic=False))
    return [Contender(OURS, case.ours), *reference, compiled, *case.library]


def _call(contender: Contender, args: tuple[Any, ...], direction: str) -> Call:
    fn = contender.fn
    args = args if contender.args is None else contender.args
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    gradients: list[Tensor] = []

    def forward(_: Any = None) -> list[Tensor]:
        y = fn(*args)
        outputs = [y] if isinstance(y, Tensor) else list(y)
        if not gradients:
            gradients.extend(torch.ones_like(y) if y.dim() == 0 else torch.randn_like(y) for y in outputs)
        return outputs

    def backward(outputs: list[Tensor], keep: bool = False) -> Any:
        return torch.autograd.grad(outputs, leaves, gradients, retain_graph=keep)

    if direction == "step":
        return Call(torch.no_grad()(lambda _: fn(*args)))
    if direction == "forward":
        return Call(forward)
    if direction == "backward":
        return Call(backward, forward, lambda outputs: backward(outputs, keep=True))
    return Call(lambda _: backward(forward()))


def _fails(call: Call, device: str) -> str | None:
    """Runs it once, which compiles what is to be compiled; the first line of what goes wrong."""
    try:
        call.run(call.prepare())
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:  # a library's kernel that does not take this shape, a compiler that fails, no memory
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
    return None


def _limits(work: Work, where: Where) -> dict[str, Call]:
    """What the roofline is made of: a copy that moves as much as the op must, and a large square product."""
    limits = {}
    if work.bytes:
        half = max(1, min(work.bytes, COPY_BYTES) // 2 // where.itemsize)
        source = torch.ones(half, dtype=where.dtype, device=where.device)
        target = torch.empty_like(source)
        limits["copy"] = Call(lambda _: target.copy_(source))
    if work.flops:
        n = MATMUL[where.sizes]
        a, b = where.randn(n, n), where.randn(n, n)
        product = torch.empty_like(a)
        limits["matmul"] = Call(lambda _: torch.mm(a, b, out=product))
    return limits


@dataclass(frozen=True)
class _Floors:
    """For each round, the least time that the rates of its copy and its matmul allow; and those rates' medians."""

    seconds: list[float]
    memory_bound: bool
    copy: float  # bytes/s
    matmul: float  # FLOP/s
    work: Work


def _floors(work: Work, timed: dict[str, Timed], where: Where) -> _Floors:
    rounds = len(next(iter(timed.values())).seconds)
    copy, matmul = [0.0] * rounds, [0.0] * rounds
    copied = 2 * where.itemsize * max(1, min(work.bytes, COPY_BYTES) // 2 // where.itemsize)
    if "copy" in timed:
        copy = [copied / s for s in timed["copy"].seconds]
    if "matmul" in timed:
        matmul = [2 * MATMUL[where.sizes] ** 3 / s for s in timed["matmul"].seconds]
    memory = [work.bytes / rate if rate else 0.0 for rate in copy]
    product = [work.flops / rate if rate else 0.0 for rate in matmul]
    return _Floors(
        [max(m, p) for m, p in zip(memory, product, strict=True)],
        statistics.median(memory) >= statistics.median(product),
        statistics.median(copy),
        statistics.median(matmul),
        work,
    )


def _row(
    op: str,
    case: Case,
    where: Where,
    direction: str,
    name: str,
    library: bool,
    timed: dict[str, Timed],
    floors: _Floors,
    peak: int | None,
) -> Row:
    seconds = timed[name].seconds
    ordered = sorted(seconds)
    median = statistics.median(seconds)

    def percentile(p: float) -> float:
        return ordered[round(p * (len(ordered) - 1))] * 1e3

    return Row(
        op=op,
        shape=case.shape,
        dtype=SHORT[case.dtype or where.dtype],
        series=case.series,
        size=case.size,
        size_name=case.size_name,
        direction=direction,
        contender=name,
        library=library,
        headline=case.target and direction in case.headline,
        rounds=len(seconds),
        how=timed[name].how,
        median_ms=median * 1e3,
        p20_ms=percentile(0.2),
        p80_ms=percentile(0.8),
        min_ms=ordered[0] * 1e3,
        max_ms=ordered[-1] * 1e3,
        ratio=statistics.median(t / ours for t, ours in zip(seconds, timed[OURS].seconds, strict=True)),
        gb_per_s=floors.work.bytes / median / 1e9,
        tflop_per_s=floors.work.flops / median / 1e12,
        roofline=statistics.median(floor / t for floor, t in zip(floors.seconds, seconds, strict=True)),
        floor_ms=statistics.median(floors.seconds) * 1e3,
        memory_bound=floors.memory_bound,
        copy_gb_per_s=floors.copy / 1e9,
        matmul_tflop_per_s=floors.matmul / 1e12,
        peak_bytes=peak,
    )
