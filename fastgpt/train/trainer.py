"""The training loop: a task in, a run folder out.

A step is: `grad_accum` forward and backward passes, one clipped AdamW update at the cosine's rate. A run is a function
of its config alone: killed anywhere and resumed on the same machine, it goes on to the same losses bit for bit, because
a checkpoint holds the weights, both moments, the position in the data and every random state that a step reads.
"""

import json
import math
import os
import platform
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import fastgpt
from fastgpt.errors import UserError
from fastgpt.files import atomic_dir, atomic_write
from fastgpt.train import checkpoint
from fastgpt.train.config import RunConfig, check_same_run
from fastgpt.train.metrics import RunLog
from fastgpt.train.optimizer import build_optimizer
from fastgpt.train.schedule import cosine_lr
from fastgpt.train.speed import faster_precision, peak_flops
from fastgpt.train.task import Task


@dataclass
class TrainResult:
    """How a call of `Trainer.run` ended.

    Attributes:
        checkpoint: the newest one.
        best: the step of the best one; the newest where the task does not say what is better.
        signal: the one that stopped it (SIGINT, SIGTERM), or None.
    """

    step: int
    val_loss: float
    first_val_loss: float
    checkpoint: Path
    best: int
    seconds: float
    signal: int | None = None


@dataclass
class Step:
    """An optimizer step that was launched. Nothing of it was read from the device: that would make the host wait.

    Attributes:
        step: which one, from 1.
        tokens: that the run has read, this step's included.
        loss: the mean over its batches, 0-dim.
        grad_norm: of the whole gradient before clipping, 0-dim.
    """

    step: int
    tokens: int
    lr: float
    loss: Tensor
    grad_norm: Tensor


def pick_device(name: str) -> torch.device:
    """The device of a `--device` option: `auto` is a GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is no device: take cpu, cuda, cuda:1 or auto") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this torch sees no CUDA GPU (fastgpt info says more); take --device cpu")
    return device


def pick_precision(name: str, device: torch.device, rows: int, width: int) -> Literal["fp32", "bf16"]:
    """The precision of a `--precision` option, for matmuls of (rows, width): `auto` measures which is faster."""
    return faster_precision(device, rows, width) if name == "auto" else name  # type: ignore[return-value]


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """What a forward pass in `precision` ("fp32" or "bf16") runs under."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def open_run(config: RunConfig) -> tuple[int, Path] | None:
    """Checks that --out is free, or with --resume that it holds this run, and gives its newest checkpoint if any.

    Raises:
        UserError: it is neither, or the checkpoint is damaged.
    """
    if config.resume:
        check_same_run(type(config).load(config.out), config)
        checkpoint.remove_unfinished(config.out)
        return checkpoint.newest(config.out)
    if (config.out / "config.json").exists():
        raise UserError(f"{config.out} already holds a run: add --resume to go on with it, or name another --out")
    return None


@contextmanager
def explained_run(config: RunConfig) -> Iterator[None]:
    """Says what to do when the system fails to write a run's log; checkpoints say it themselves."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or config.out}: {error.strerror}: mend that, then go on with --resume; "
            "checkpoints are safe"
        ) from None


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM append to, so that the loop can end its step first; a second Ctrl-C is at once."""
    received: list[int] = []

    def handle(number: int, _: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    try:
        before = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever runs us there handles signals
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Trainer:
    """One call of a training command: fills the run folder, and `run()`s to `max_steps` or a signal.

    Args:
        config: of the run, with `max_steps`, `lr` and `precision` settled.
        task: with the weights of `latest` where there is one.
        latest: what `open_run` gave.
    """

    def __init__(self, config: RunConfig, task: Task[Any], latest: tuple[int, Path] | None) -> None:
        assert config.max_steps is not None
        assert config.lr is not None
        assert config.precision != "auto"
        self.config, self.task = config, task
        self.max_steps, self.lr = config.max_steps, config.lr
        self.eval_interval = config.eval_interval or max(1, min(250, config.max_steps // 8))
        self.device = next(task.model.parameters()).device
        torch.manual_seed(config.seed)  # again: nothing that was measured before may move what dropout draws
        self.optimizer = build_optimizer(
            task.model, self.lr, config.weight_decay, (config.beta1, config.beta2), config.grad_clip
        )
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self._clock, self._read = 0.0, 0  # when a step's figures were last read, and the tokens by then
        # On a GPU a step's loss is read when the next one is launched, so that the host never lets the device wait. A
        # CPU has nothing to gain: its step is done when it is launched.
        self.late = self.device.type == "cuda"
        if latest:
            self._restore(*latest)
        self._write_run()

    def _restore(self, step: int, folder: Path) -> None:
        state = checkpoint.load_state(folder)
        self.optimizer.load_state_dict(state["optimizer"])
        self.task.load_state_dict(state["task"])
        torch.set_rng_state(state["cpu_rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self.step, self.tokens, self.seconds = step, state["tokens"], state["seconds"]

    def _write_run(self) -> None:
        """config.json: all that is needed to repeat the run."""
        self.config.out.mkdir(parents=True, exist_ok=True)
        config = {
            **self.config.to_json(),
            "eval_interval": self.eval_interval,
            **self.task.about(),
            "versions": {
                "fastgpt": fastgpt.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "threads": torch.get_num_threads(),
        }
        atomic_write(self.config.out / "config.json", json.dumps(config, indent=1) + "\n")

    def save(self, best: int | None = None) -> Path:
        """Writes checkpoints/step_<n>/ for the step now; the one of step `best` is kept beside the newest."""
        state = {
            "optimizer": self.optimizer.state_dict(),
            "task": self.task.state_dict(),
            "cpu_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "tokens": self.tokens,
            "seconds": self.seconds,
        }
        return checkpoint.save(self.config.out, self.step, self.task.write_model, state, self.config.keep, best)

    def train_step(self) -> Step:
        """Launches one optimizer step."""
        c = self.config
        lr = cosine_lr(
            self.step,
            lr=self.lr,
            min_lr=self.lr / 10 if c.min_lr is None else c.min_lr,
            warmup_steps=min(500, self.max_steps // 5) if c.warmup_steps is None else c.warmup_steps,
            max_steps=self.max_steps,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        batches = [self.task.next_batch() for _ in range(c.grad_accum)]
        whole = sum(self.task.weight(batch) for batch in batches)
        total = torch.zeros((), device=self.device)
        for batch in batches:
            with autocast(self.device, c.precision):
                loss = self.task.loss(batch) * (self.task.weight(batch) / whole)
            loss.backward()
            total += loss.detach()
            self.tokens += self.task.tokens(batch)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        assert self.optimizer.grad_norm is not None
        return Step(self.step, self.tokens, lr, total, self.optimizer.grad_norm)

    def _finish(self, step: Step, log: RunLog) -> None:
        """Reads what a step gave, for which it waits, and writes it down."""
        loss = step.loss.item()
        now = time.perf_counter()
        elapsed, self._clock = now - self._clock, now
        if not math.isfinite(loss):
            raise UserError(self._lost(step.step, loss))
        self.seconds += elapsed
        rate = (step.tokens - self._read) / elapsed
        self._read = step.tokens
        share = {"mfu": round(rate * self.task.flops_per_token / self._peak, 4)} if self.task.flops_per_token else {}
        log.record(
            step=step.step,
            tokens=step.tokens,
            loss=loss,
            lr=step.lr,
            grad_norm=step.grad_norm.item(),
            tokens_per_s=round(rate, 1),
            **share,
            seconds=round(self.seconds, 3),
        )
        log.progress(step.step, loss, rate)

    @torch.no_grad()
    def _evaluate(self, log: RunLog) -> None:
        self.task.model.eval()
        try:
            with autocast(self.device, self.config.precision):
                figures = self.task.evaluate()
        finally:
            self.task.model.train()
        log.record(step=self.step, tokens=self.tokens, **figures)
        others = [f", {name.replace('_', ' ')} {value:.4f}" for name, value in figures.items() if name != "val_loss"]
        log.say(f"step {self.step}: validation loss {figures['val_loss']:.4f}{''.join(others)}")

    def _best(self, log: RunLog, ties: bool = True) -> int | None:
        """The step of the best evaluation so far, by metrics.jsonl.

        Of equals it is the one of the lowest loss, or the first without `ties`. The model as it came, at step 0, does
        not count.
        """
        if self.task.best_by is None:
            return None
        name, which = self.task.best_by
        sign = 1 if which == "min" else -1
        found = {r["step"]: (sign * r[name], r["val_loss"] * ties) for r in log.records if name in r and r["step"] > 0}
        return min(found, key=lambda step: found[step], default=None)

    def _patience_is_over(self, log: RunLog) -> bool:
        best = self._best(log, ties=False)
        if self.task.patience is None or best is None:
            return False
        return sum("val_loss" in r and r["step"] > best for r in log.records) >= self.task.patience

    def run(self) -> TrainResult:
        c, task = self.config, self.task
        mfu = ""
        if task.flops_per_token:
            self._peak, peak_source = peak_flops(self.device, c.precision)
        task.model.train()
        with RunLog(c.out, self.step, self.max_steps, task.loss_unit) as log, _signals() as signals:
            log.say(f"{task.describe()}, {c.precision} on {self.device}")
            if self.step:
                log.say(f"resumed from {c.out / 'checkpoints' / f'step_{self.step}'}")
            if not any("val_loss" in r for r in log.records):
                self._evaluate(log)
            pending: Step | None = None
            self._clock, self._read = time.perf_counter(), self.tokens
            while self.step < self.max_steps and not signals and not self._patience_is_over(log):
                step = self.train_step()
                if pending:
                    self._finish(pending, log)
                evaluate = self.step % self.eval_interval == 0 or self.step == self.max_steps
                save = self.step % c.save_interval == 0
                if self.late and not (evaluate or save or self.step == self.max_steps or signals):
                    pending = step
                    continue
                pending = None
                self._finish(step, log)
                if evaluate:
                    self._evaluate(log)
                    if self._best(log) == self.step:
                        self.save(self.step)
                if save:
                    self.save(self._best(log))
                    log.draw()
                self._clock = time.perf_counter()
            if pending:  # a signal that came after its launch
                self._finish(pending, log)
            best = self._best(log)
            saved = self.save(best)  # nothing to do where the loop has just done it
            log.draw()
            losses = [r["val_loss"] for r in log.records if "val_loss" in r]
            rates = sorted(r["tokens_per_s"] for r in log.records if "loss" in r)
            if rates:
                median = rates[len(rates) // 2]
                if task.flops_per_token:
                    share = median * task.flops_per_token / self._peak
                    mfu = f", MFU {share:.0%} of {self._peak / 1e9:,.0f} GFLOP/s ({peak_source})"
                log.say(f"{median:,.0f} tokens/s{mfu}")
            first, last = losses[0], losses[-1]
            if signals:
                name = signal.Signals(signals[0]).name
                log.say(f"{name}: saved {saved}; go on with: fastgpt {c.command} --out {c.out} --resume")
            else:
                if self.step < self.max_steps:
                    log.say(f"no better one for {task.patience} evaluations: the best is that of step {best}")
                log.say(f"finished at step {self.step}: validation loss {first:.4f} -> {last:.4f}; saved {saved}")
            if best not in checkpoint.steps(c.out):  # there is no best, or somebody has moved it away
                best = self.step
            return TrainResult(self.step, last, first, saved, best, self.seconds, signals[0] if signals else None)

    def _lost(self, step: int, loss: float) -> str:
        kept = checkpoint.steps(self.config.out)
        back = f"the last good checkpoint is {list(kept.values())[-1]}" if kept else "there is no checkpoint yet"
        return f"the loss became {loss} at step {step}; {back}; start a new run with a smaller --lr"


def publish_best(run: Path, result: TrainResult) -> Path:
    """Makes run/model the model folder of the best checkpoint, which it shares the files of; returns it."""
    source, model = checkpoint.steps(run)[result.best], run / "model"
    old = run / f"model.old-{os.getpid()}"
    if model.exists():
        model.rename(old)
    with atomic_dir(model) as folder:
        for path in source.iterdir():
            if path.is_file():
                try:
                    os.link(path, folder / path.name)
                except OSError:  # a file system without links
                    shutil.copyfile(path, folder / path.name)
    shutil.rmtree(old, ignore_errors=True)
    return model
