"""The part of a checkpoint that ranks write side by side, while the training goes on: torch.distributed.checkpoint.

`training_state/ranks/` holds the optimizer's tensors by parameter number and name, each rank's part of them (moments
are sharded with `fsdp`, and divided among the ranks with `ddp`, which all have them), and each rank's random state. It
is read by any number of ranks, also by one process: a tensor is put together again and divided as it is needed.
"""

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, distribute_tensor

from fastgpt.train import parallel

FOLDER = Path("training_state") / "ranks"


def start(folder: Path, optimizer: torch.optim.Optimizer) -> "Future[Any]":
    """Copies this rank's part to memory, and writes it to folder/training_state/ranks/ in the background.

    All ranks must call it. On rank 0 the future is done when all of it is on the disk.
    """
    tensors = {f"optimizer.{i}.{name}": t for i, state in _states(optimizer).items() for name, t in state.items()}
    tensors[f"cpu_rng.{parallel.rank()}"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors[f"cuda_rng.{parallel.rank()}"] = torch.cuda.get_rng_state()
    future = dcp.async_save(tensors, storage_writer=dcp.FileSystemWriter(folder / FOLDER))
    assert isinstance(future, Future)
    return future


def load(folder: Path, optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Fills the optimizer from what any number of ranks wrote, and returns this rank's random states.

    Args:
        groups: the optimizer's `param_groups`, as its state_dict has them.

    Returns:
        {"cpu_rng": ..., "cuda_rng": ...}, or nothing if there were other ranks then.
    """
    reader = dcp.FileSystemReader(folder / FOLDER)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    saved = {
        k: v for k, v in reader.read_metadata().state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)
    }
    ranks = sum(name.startswith("cpu_rng.") for name in saved)
    found: dict[str, Tensor] = {}
    for name, entry in saved.items():
        kind, index, *_ = name.split(".")
        if kind == "optimizer" and isinstance(p := params[int(index)], DTensor) and entry.size == p.shape:
            found[name] = torch.zeros_like(p, dtype=entry.properties.dtype)
        elif kind == "optimizer" or (ranks == parallel.size() and int(index) == parallel.rank()):
            found[name] = torch.zeros(entry.size, dtype=entry.properties.dtype)
    dcp.load(found, storage_reader=reader, no_dist=parallel.size() == 1)
    states: dict[int, dict[str, Tensor]] = {}
    for name in [n for n in found if n.startswith("optimizer.")]:
        _, index, key = name.split(".")
        states.setdefault(int(index), {})[key] = found.pop(name)
    optimizer.load_state_dict({"state": states, "param_groups": groups})
    return {name.split(".")[0]: t for name, t in found.items()}


def divided(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state_dict that one process saved, with its tensors sharded as the parameters are."""
    params = [p for group in optimizer.param_groups for p in group["params"]]

    def place(p: Tensor, t: Tensor) -> Tensor:
        if isinstance(p, DTensor) and t.shape == p.shape:
            return distribute_tensor(t.to(p.device), p.device_mesh, p.placements)
        return t

    states = {i: {name: place(params[i], t) for name, t in s.items()} for i, s in state["state"].items()}
    return {**state, "state": states}


def _states(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    return optimizer.state_dict()["state"]  # type: ignore[no-any-return]
