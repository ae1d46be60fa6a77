"""More than one device: a process for each, which torchrun starts, with its own part of every batch.

    torchrun --nproc-per-node 8 -m fastgpt train --parallel ddp ...

`ddp` keeps all weights on each rank and averages the gradients while the backward pass still makes others (Li et al.
2020, arXiv:2006.15704). `fsdp` keeps a part of the weights, gradients and moments on each rank and gathers a block's
weights when it is run (FSDP2; Zhao et al. 2023, arXiv:2304.11277). Everything else is the same: a step is the mean over
all ranks' batches, so its loss is that of one process with as many sequences, to rounding.

These functions answer for one process alone, too, at no cost: nothing else asks whether there are ranks.
"""

import datetime
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastgpt.errors import UserError
from fastgpt.model import GPT
from fastgpt.train.task import Task

Mode = Literal["ddp", "fsdp"]
Result = TypeVar("Result")
# How long ranks wait for one that lives and does not answer: rank 0 may be writing a large checkpoint. One that has
# died is noticed at once, by its closed connections and by torchrun, which then ends the others.
TIMEOUT = datetime.timedelta(minutes=10)
# What gloo and NCCL say of a rank that is not there any more.
_LOST = ("connection closed", "connection reset", "broken pipe", "remote process exited", "aborted", "timed out")


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def restarted() -> bool:
    """Whether torchrun started it again (`--max-restarts`) because a rank had ended."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the rank that writes and prints."""
    return rank() == 0


@contextmanager
def ranks(mode: Mode | None, device: torch.device) -> Iterator[None]:
    """Within it the processes that torchrun started know of each other; nothing to do where they do already.

    Raises:
        UserError: `mode` is given and torchrun is not there; or another rank has ended meanwhile.
    """
    if mode and "RANK" not in os.environ:
        raise UserError(
            f"--parallel {mode} needs torchrun, which starts a process for each device: "
            "torchrun --nproc-per-node N -m fastgpt train ..."
        )
    if not launched() or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        # What is decided on the hosts goes by gloo, and makes no rank wait for its device.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(backend, store=_store(), timeout=TIMEOUT, rank=rank, world_size=ranks)
        yield
        dist.barrier()  # nobody leaves while others still write
    except RuntimeError as error:
        if not any(words in str(error).lower() for words in _LOST):
            raise
        raise UserError(
            "a rank has ended, and so do the others: torchrun says which one and why; go on with --resume"
        ) from error
    dist.destroy_process_group()


def _store() -> dist.Store:
    """torchrun's, of this start of the ranks: it lives on when they are started again, with addresses of the dead."""
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", timeout=datetime.timedelta(minutes=1)))
    return dist.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def is_first_to_tell() -> bool:
    """Whether no other rank has told of an error yet: one line is enough, of what went wrong first."""
    if not launched():
        return True
    try:
        return _store().add("fastgpt/errors", 1) == 1
    except (RuntimeError, ValueError):  # torchrun is not there any more
        return True


def local_device(name: str) -> torch.device | None:
    """This rank's device, by a `--device` option; None where there is but one process."""
    if not launched():
        return None
    index, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if name == "cpu" or (name == "auto" and not gpus):
        return torch.device("cpu")
    if name not in ("auto", "cuda"):
        raise UserError(f"--device {name} is one device for all ranks: take --device cuda, which gives each its own")
    if index >= gpus:
        raise UserError(f"rank {index} of this machine has no GPU, there are {gpus}: take --nproc-per-node {gpus}")
    return torch.device("cuda", index)


def on_main(make: Callable[[], Result]) -> Result:
    """What `make` gives on rank 0, on all ranks; it runs there only.

    Raises:
        UserError: what it raised there, on all ranks.
    """
    if size() == 1:
        return make()
    answer: list[Any] = [None, None]
    if is_main():
        try:
            answer[0] = make()
        except UserError as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise UserError(answer[1])
    return answer[0]


def gathered(value: Result) -> list[Result]:
    """Each rank's value, by rank."""
    values: list[Any] = [value] * size()
    if size() > 1:
        dist.all_gather_object(values, value)
    return values


def total(values: Tensor) -> Tensor:
    """The sum over ranks, in place; where it is on a GPU nothing waits for it."""
    if size() > 1:
        dist.all_reduce(values)
    return values


def highest(number: int) -> int:
    """The highest of all ranks' numbers: what one of them knows, all of them know at the same moment."""
    if size() == 1:
        return number
    value = torch.tensor(number)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def seed(base: int, step: int = 0) -> int:
    """For what each rank draws by itself, such as dropout: of rank 0 at the start it is `base`, as without ranks."""
    if rank() == 0 and step == 0:
        return base
    return int(np.random.SeedSequence([base, step, rank()]).generate_state(1, np.uint32)[0])


class _Loss(nn.Module):
    """A task's loss as a forward pass, which is where DDP prepares to average the gradients."""

    def __init__(self, task: Task[Any]) -> None:
        super().__init__()
        self.model = task.model
        self._loss = task.loss

    def forward(self, batch: Any) -> Tensor:
        return self._loss(batch)


def wrap(
    task: Task[Any], mode: Mode | None, precision: str
) -> tuple[Callable[[Any], Tensor], Callable[[], AbstractContextManager[Any]]]:
    """The task's loss with gradients that are averaged over ranks, and a context in which they only accumulate.

    With `fsdp` the task's model is sharded by it, before its optimizer is made.
    """
    model = task.model
    if size() == 1:
        return task.loss, nullcontext
    if mode == "fsdp":
        assert isinstance(model, GPT)
        _shard(model, precision)
        return task.loss, functools.partial(_unsynchronized, model)
    device = next(model.parameters()).device
    ddp = nn.parallel.DistributedDataParallel(
        _Loss(task), device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )
    return ddp, ddp.no_sync


def _shard(model: GPT, precision: str) -> None:
    """Each block by itself, and what is around them: there the tied embedding is gathered once for both its uses."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    # A block's output is a view, of a linear layer's; nothing changes it in place.
    warnings.filterwarnings("ignore", message=".*returned a view tensor")
    mesh = init_device_mesh(next(model.parameters()).device.type, (size(),))
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = bf16 if precision == "bf16" else MixedPrecisionPolicy()
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "loss")


@contextmanager
def _unsynchronized(model: Any) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all weights in rank 0's memory, whole; nothing on other ranks. All ranks must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    weights: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: w.clone() for name, w in weights.items()} if is_main() else {}
