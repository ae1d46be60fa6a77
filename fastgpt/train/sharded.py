"""The part of a checkpoint that ranks write side by side, while the training goes on: torch.distributed.checkpoint.

`training_state/ranks/` holds the optimizer's tensors by parameter number and name, each rank's part of them (moments
are sharded with `fsdp`, and divided among the ranks with `ddp`, which all have them), and each rank's random state. It
is read by any number of ranks, also by one process: a tensor is put together again and divided as it is needed.
"""

import os
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, distribute_tensor

from fastgpt.files import explained
from fastgpt.train import checkpoint, parallel

WriteModel = Callable[[Path], None]


class Saves:
    """Writes checkpoints in the background, one at a time. All ranks must call each of its methods."""

    def __init__(self) -> None:
        # Of its own: the training's messages would meet those of the background in one group, in any order.
        self._group = dist.new_group(backend="gloo", timeout=parallel.TIMEOUT)
        self._thread = ThreadPoolExecutor(1)
        self._parts: Future[Any] | None = None  # this rank's
        self._whole: Future[Path] | None = None  # rank 0's, which waits for all parts

    def start(
        self,
        run: Path,
        step: int,
        write_model: WriteModel,
        state: dict[str, Any],
        optimizer: torch.optim.Optimizer,
        keep: int,
        best: int | None,
    ) -> Path:
        """Copies what is to be written, and writes it as `checkpoint.save` does; returns where it will be.

        Args:
            write_model: writes the model as it is now, whenever it is called; only rank 0's is.

        Raises:
            UserError: the one before could not be written.
        """
        self.finish()
        folder = checkpoint.path(run, step)
        parts = parallel.on_main(lambda: None if checkpoint.is_good(folder) else _parts(folder))
        if parts is None:
            return folder
        written: Any = dcp.async_save(
            _tensors(optimizer), storage_writer=dcp.FileSystemWriter(parts), process_group=self._group
        )
        self._parts = written
        if parallel.is_main():
            state = {**state, "optimizer": {"param_groups": optimizer.state_dict()["param_groups"]}}

            def write() -> Path:
                _wait(written, parts)
                return checkpoint.save(run, step, write_model, state, keep, best, parts)

            self._whole = self._thread.submit(write)
        return folder

    def finish(self) -> None:
        """Waits until what was started is on the disk.

        Raises:
            UserError: it could not be written.
        """
        parts, whole = self._parts, self._whole
        self._parts = self._whole = None
        if parts is not None:
            parallel.on_main(lambda: whole.result() if whole else None)
            _wait(parts, Path())


def _parts(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.ranks.tmp-{os.getpid()}")


def _wait(parts: "Future[Any]", folder: Path) -> None:
    try:
        parts.result()
    except CheckpointException as error:  # of any rank
        first, _ = next(iter(error.failures.values()))
        with explained(folder):
            raise first from None


def _tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    states = optimizer.state_dict()["state"]
    tensors = {f"optimizer.{i}.{name}": t for i, state in states.items() for name, t in state.items()}
    tensors[f"cpu_rng.{parallel.rank()}"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors[f"cuda_rng.{parallel.rank()}"] = torch.cuda.get_rng_state()
    return tensors


def restore(folder: Path, saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Fills the optimizer from a checkpoint of any number of ranks, and returns this rank's random states.

    Args:
        saved: the optimizer's state_dict in the checkpoint's state.pt: of several ranks its `param_groups` alone.

    Returns:
        {"cpu_rng": ..., "cuda_rng": ...}, or nothing if there were more or fewer ranks then.
    """
    if (folder / checkpoint.RANKS).exists():
        return _load(folder, optimizer, saved["param_groups"])
    optimizer.load_state_dict(_divided(saved, optimizer))
    return {}


def _load(folder: Path, optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> dict[str, Tensor]:
    reader = dcp.FileSystemReader(folder / checkpoint.RANKS)
    params = _params(optimizer)
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
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process reads it alone
        dcp.load(found, storage_reader=reader, no_dist=parallel.size() == 1)
    states: dict[int, dict[str, Tensor]] = {}
    for name in [n for n in found if n.startswith("optimizer.")]:
        _, index, key = name.split(".")
        states.setdefault(int(index), {})[key] = found.pop(name)
    optimizer.load_state_dict({"state": states, "param_groups": groups})
    return {name.split(".")[0]: t for name, t in found.items()}


def _divided(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state_dict that one process saved, with its tensors sharded as the parameters are."""
    params = _params(optimizer)

    def place(p: Tensor, t: Tensor) -> Tensor:
        if isinstance(p, DTensor) and t.shape == p.shape:
            return distribute_tensor(t.to(p.device), p.device_mesh, p.placements)
        return t

    states = {i: {name: place(params[i], t) for name, t in s.items()} for i, s in state["state"].items()}
    return {**state, "state": states}


def _params(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
