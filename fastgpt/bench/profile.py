"""Where the time of a training step goes, by op."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

# Part of an event's name -> the op that it and all that it calls count to. The outermost event that has one decides,
# which is why linear_cross_entropy's matmuls are its own.
OPS = {
    "linear_cross_entropy": "linear_cross_entropy",
    "_Loss": "linear_cross_entropy",  # fastgpt.model.tied's
    "_Embedding": "embedding",
    "embedding": "embedding",
    "layer_norm": "layer_norm",
    "bias_gelu": "bias_gelu",
    "scaled_dot_product": "attention",
    "ScaledDotProduct": "attention",
    "attention": "attention",
    "adamw_step": "adamw_step",
    "clip_grad_norm": "clip_grad_norm",
    "aten::mm": "linear",
    "aten::addmm": "linear",
    "aten::linear": "linear",
    "AddmmBackward": "linear",
    "MmBackward": "linear",
}


def op_shares(run: Callable[[], object], device: str) -> dict[str, float]:
    """The share of each op in `run`, largest first; they sum to 1. On a GPU it is the GPU's time."""
    gpu = device == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as found:
        run()
    time: dict[str, float] = defaultdict(float)
    for event in found.events():
        own = event.self_device_time_total if gpu else event.self_cpu_time_total
        time[_op(event)] += own
    whole = sum(time.values()) or 1.0
    return {op: time[op] / whole for op in sorted(time, key=lambda op: -time[op])}


def _op(event: Any) -> str:
    op = "other"
    while event is not None:
        op = next((op for part, op in OPS.items() if part in event.name), op)
        event = event.cpu_parent
    return op
