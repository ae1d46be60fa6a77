"""Times calls in turn, in one process, and weighs the memory that one takes.

What is compared is timed round by round, in another order each time (A B C, C A B, ...), so that a clock that changes
or a neighbour that wakes up meets all of them alike; a ratio is the median of the rounds' ratios. Preparation (the
forward pass, where the backward pass is timed) is outside the clock.

On a GPU the L2 cache is emptied before each call. Short kernels (see GRAPH_BELOW) are replayed from a CUDA graph,
because an event pair around a launch from Python times the host's gap: the graph is n times [empty L2, call], and the
time of a graph of n times [empty L2] is taken off. Longer calls are timed by events.
"""

import ctypes
import gc
import math
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

MIN_ROUNDS = 7
# Seconds of calls that are not counted, before each that is: two threads needed 4 ms to be as fast after a large matmul
# as without it (caches, clock). For the same reason the order changes: who comes after it pays for what is left.
WARMING = 6e-3
SLICE = 1e-3  # seconds: shorter calls are repeated within a round for about so long, against the clock's grain
GRAPH_BELOW = 100e-6  # seconds, by events, which count some of the host's time to a kernel of 50 us
GRAPH_REPEATS = 20
FLUSH_BYTES = (
    512 << 20
)  # written before a call: several times any L2; the host has 100 us to enqueue the call meanwhile


@dataclass(frozen=True)
class Call:
    """One thing to time: `run(prepare())`, of which only `run` counts. `rerun` is run, leaving what it needs usable."""

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None
    rerun: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Timed:
    """Seconds of a call, one for each round, and how they were taken."""

    seconds: list[float]
    how: str


def interleave(calls: dict[str, Call], device: str, seconds: float) -> dict[str, Timed]:
    """Times the calls in turn, for at least MIN_ROUNDS rounds and about `seconds` for each call."""
    clocks = _gpu_clocks(calls) if device == "cuda" else {name: _CpuClock(call) for name, call in calls.items()}
    names = list(calls)
    rounds: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + seconds * len(names)
        done = 0
        while done < MIN_ROUNDS or time.perf_counter() < end:
            for name in order.sample(names, len(names)):
                rounds[name].append(clocks[name].sample())
            done += 1
    finally:
        if collecting:
            gc.enable()
    return {name: Timed(rounds[name], clocks[name].how) for name in names}


class _CpuClock:
    how = "perf_counter"

    def __init__(self, call: Call) -> None:
        self.call = call
        self.repeats, self.warming = 1, 0
        self.sample()  # compiles, allocates
        once = self.sample()
        self.repeats = max(1, min(100, round(SLICE / once)))
        self.warming = math.ceil(WARMING / once) if once < 10 * WARMING else 0

    def sample(self) -> float:
        """Seconds a call; what it returns is freed outside the clock."""
        total = 0.0
        for i in range(self.warming + self.repeats):
            state = self.call.prepare()
            start = time.perf_counter()
            result = self.call.run(state)
            if i >= self.warming:
                total += time.perf_counter() - start
            del state, result
        return total / self.repeats


class _EventClock:
    how = "CUDA events, cold L2"

    def __init__(self, call: Call, flush: torch.Tensor) -> None:
        self.call, self.flush = call, flush
        for _ in range(3):
            self.sample()

    def sample(self) -> float:
        state = self.call.prepare()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        start.record()
        self.call.run(state)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


class _GraphClock:
    how = "CUDA graph, cold L2"

    def __init__(self, call: Call, flush: torch.Tensor) -> None:
        run = call.rerun or call.run
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # the forward pass too: its backward runs on the stream that it ran on
            for _ in range(3):
                run(call.prepare())
            self.state = call.prepare()  # kept alive: the graph reads it at each replay
            self.full, self.empty = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.full, stream=stream):
                for _ in range(GRAPH_REPEATS):
                    flush.zero_()
                    run(self.state)
            with torch.cuda.graph(self.empty, stream=stream):
                for _ in range(GRAPH_REPEATS):
                    flush.zero_()
        torch.cuda.current_stream().wait_stream(stream)
        self.sample()

    def sample(self) -> float:
        return max(1e-7, (_replay(self.full) - _replay(self.empty)) / GRAPH_REPEATS)  # nothing at all is noise


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _gpu_clocks(calls: dict[str, Call]) -> dict[str, Any]:
    """Graphs for all, where the fastest is short: one way of timing within a comparison. Events for what cannot."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    clocks: dict[str, Any] = {name: _EventClock(call, flush) for name, call in calls.items()}
    if min(sorted(clock.sample() for _ in range(5))[2] for clock in clocks.values()) < GRAPH_BELOW:
        # No host to wait for in a graph; the less there is to take off, the less noise comes with it.
        flush = flush[: 3 * torch.cuda.get_device_properties().L2_cache_size]
        for name, call in calls.items():
            try:
                clocks[name] = _GraphClock(call, flush)
            except RuntimeError:  # it waits for the device, or allocates outside of torch: no graph can hold that
                torch.cuda.synchronize()
    return clocks


def peak_bytes(call: Call, device: str) -> int | None:
    """Bytes that one call adds, at most, to what was allocated when it began; None where that cannot be told.

    On a GPU from torch's allocator. On a CPU from the kernel's high-water mark of resident memory (Linux): that sees
    all of it, scratch in C++ and in the math libraries too, where torch's own count sees tensors only.
    """
    call.run(call.prepare())  # warm-up: what is allocated once for all is not this call's
    if device == "cuda":
        state = call.prepare()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call.run(state)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del state, result
        return peak
    if not sys.platform.startswith("linux"):
        return None
    found: list[int] = []
    for _ in range(2):  # the lesser: what other threads allocate can only add
        state = call.prepare()
        gc.collect()
        _trim()
        could, rss = reset_peak(), resident("VmRSS")
        result = call.run(state)
        high = resident("VmHWM")
        if not could or rss is None or high is None:
            return None
        found.append(max(0, high - rss))
        del state, result
    return min(found)


def _trim() -> None:
    """Gives freed memory back to the system: a call that takes it from there again is seen to take it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
    if trim is not None:
        trim(0)


def reset_peak() -> bool:
    """Starts the system's high-water mark of this process's memory again; whether that was possible (on Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident(field: str) -> int | None:
    """Bytes: "VmRSS", what is resident now, or "VmHWM", its high-water mark. None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)
