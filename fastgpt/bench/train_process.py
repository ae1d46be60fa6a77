"""One contender of `fastgpt bench train`, in a process of its own that makes steps when its parent says so.

A process each, so that the peak of memory is the contender's own, and no one's allocator, compiler or threads are in
another's way; in turn, so that a clock that changes or a neighbour that wakes up meets all of them alike.
"""

import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastgpt
from fastgpt.bench.profile import op_shares
from fastgpt.bench.timing import reset_peak, resident
from fastgpt.errors import UserError
from fastgpt.model import GPT, GPTConfig
from fastgpt.train.memory import keep_freed_memory
from fastgpt.train.optimizer import build_optimizer
from fastgpt.train.trainer import autocast

OURS = "fastgpt"
CONTENDERS = Path(fastgpt.__file__).parents[1] / "benchmarks" / "contenders"
WARM_UP = 2  # steps before any is timed: the optimizer's state is there from the second on
PROFILED = 3  # steps


@dataclass(frozen=True)
class Job:
    """What every contender trains.

    Args:
        device: "cpu" or "cuda".
        precision: "fp32", or "bf16" for autocast.
        checkout: a clone of nanoGPT whose model is to be taken instead of ours written from its description.
    """

    config: GPTConfig
    batch_size: int
    block_size: int
    device: str
    precision: str
    threads: int
    checkout: Path | None = None


@dataclass
class Ours:
    """fastgpt's own step, as its trainer makes it."""

    about: str
    model: GPT
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer

    def update(self) -> None:
        self.optimizer.step()  # which clips
        self.optimizer.zero_grad(set_to_none=True)


def contender_names() -> list[str]:
    """Those that the clone's benchmarks/contenders has.

    Raises:
        UserError: fastgpt does not run from a clone.
    """
    return list(_contenders().CONTENDERS)


def _contenders() -> Any:
    if not (CONTENDERS / "__init__.py").is_file():
        raise UserError(
            "--vs compares with benchmarks/contenders, which is not installed with the package: run it from a clone of "
            "the repository, by `python -m fastgpt bench train`"
        )
    if str(CONTENDERS.parent) not in sys.path:
        sys.path.insert(0, str(CONTENDERS.parent))
    return import_module("contenders")


def _build(name: str, job: Job) -> Any:
    device = torch.device(job.device)
    shared = _contenders() if name != OURS else None
    torch.manual_seed(0)
    model = GPT(job.config)
    if shared is None:
        if job.device == "cpu":
            keep_freed_memory()  # as the trainer does
        model.to(device)
        optimizer = build_optimizer(model, lr=6e-4)
        return Ours(f"fastgpt {fastgpt.__version__}", model, model.loss, optimizer)
    module, function = shared.CONTENDERS[name]
    build = getattr(import_module(f"contenders.{module}"), function)
    return build(job.config, model.state_dict(), device, job.checkout)


class Worker:
    """A contender, its batches and its clock."""

    def __init__(self, name: str, job: Job) -> None:
        self.job, self.device = job, torch.device(job.device)
        torch.set_num_threads(job.threads)
        self.before = resident("VmRSS")  # with what was imported, the library's code and tables
        self.contender = _build(name, job)
        self.made = 0  # steps
        losses = self.steps(WARM_UP)["losses"]
        one = self.steps(1)
        self.about = {"about": self.contender.about, "losses": losses + one["losses"], "seconds": one["seconds"]}
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            self.before = self.before if reset_peak() else None

    def batch(self, i: int) -> tuple[Tensor, Tensor]:
        """The i-th, the same for all contenders: (B, T) each."""
        shape = (self.job.batch_size, self.job.block_size + 1)
        random = torch.Generator().manual_seed(i)
        ids = torch.randint(self.job.config.vocab_size, shape, generator=random).to(self.device)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step(self, ids: Tensor, targets: Tensor) -> Tensor:
        with autocast(self.device, self.job.precision):
            loss = self.contender.loss(ids, targets)
        loss.backward()
        self.contender.update()
        return loss.detach()

    def steps(self, n: int) -> dict[str, Any]:
        """n steps: their losses, and the seconds of one. Nothing waits for a GPU before the last of them."""
        batches = [self.batch(self.made + i) for i in range(n)]
        self._synchronize()
        start = time.perf_counter()
        losses = [self.step(*batch) for batch in batches]
        self._synchronize()
        seconds = (time.perf_counter() - start) / n
        self.made += n
        return {"losses": [loss.item() for loss in losses], "seconds": seconds}

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak(self, _: int) -> int | None:
        """Bytes that training took at most since the warm-up, above what was there before the model; None: unknown."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        high = resident("VmHWM")
        return None if high is None or self.before is None else high - self.before

    def profile(self, _: int) -> dict[str, float]:
        """The share of each op in our step's time."""
        batches = [self.batch(self.made + i) for i in range(PROFILED)]
        self.made += PROFILED
        return op_shares(lambda: [self.step(*batch) for batch in batches], self.job.device)


def serve(name: str, job: Job, pipe: Connection) -> None:
    """Builds the contender, then answers (method of Worker, argument) until the pipe closes.

    Answers are ("ok", value) or ("failed", one line).
    """
    try:
        worker = Worker(name, job)
        pipe.send(("ok", worker.about))
        while True:
            method, argument = pipe.recv()
            pipe.send(("ok", getattr(worker, method)(argument)))
    except (EOFError, KeyboardInterrupt):  # the parent has what it wants, or was stopped
        return
    except UserError as error:
        pipe.send(("failed", str(error)))
    except Exception as error:
        line = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
        pipe.send(("failed", line))
