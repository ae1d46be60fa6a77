"""The training loop: a task in, a run folder out.

A step is: `grad_accum` forward and backward passes, one clipped update at the schedule's rate. A run is a function
of its config alone: killed anywhere and resumed on the same machine, it goes on to the same losses bit for bit, because
a checkpoint holds the weights, the moments, the position in the data and every random state that a step reads.
"""

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastgpt.errors import UserError
from fastgpt.files import atomic_dir, atomic_write, explained
from fastgpt.model.gpt import Transformer
from fastgpt.train import checkpoint, parallel
from fastgpt.train.config import RunConfig, check_same_run, check_step_size
from fastgpt.train.memory import keep_freed_memory
from fastgpt.train.metrics import QuietLog, RunLog
from fastgpt.train.monitor import SKIPPED_IN_A_ROW, SpikeDetector, skipped_in_a_row, write_bad_step
from fastgpt.train.optimizer import build_optimizer
from fastgpt.train.provenance import differences, environment, saved_ranks
from fastgpt.train.schedule import learning_rate
from fastgpt.train.signals import Interrupted, StopSignals
from fastgpt.train.speed import faster_precision, peak_flops
from fastgpt.train.task import Task
from fastgpt.train.writers import check_writers, open_writers

if TYPE_CHECKING:
    from fastgpt.train.sharded import Saves

WORTH_TELLING = 0.03  # the share of a run's time that it waited for data


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
        batches: that it was made of, for the record if its loss turns out to be nan.
    """

    step: int
    tokens: int
    lr: float
    loss: Tensor
    grad_norm: Tensor
    batches: list[Any] = field(default_factory=list)


def pick_device(name: str) -> torch.device:
    """The device of a `--device` option: `auto` is a GPU if there is one; of a rank, its own."""
    if local := parallel.local_device(name):
        return local
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is no device: take cpu, cuda, cuda:1 or auto") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this torch sees no CUDA GPU (fastgpt info says more); take --device cpu")
    return device


def pick_precision(name: str, device: torch.device, rows: int, width: int) -> Any:
    """The precision of a `--precision` option, for matmuls of (rows, width): `auto` measures which is faster."""
    return parallel.on_main(lambda: faster_precision(device, rows, width)) if name == "auto" else name


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """What a forward pass in `precision` runs under; weights that are bf16 themselves need nothing."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def open_run(config: RunConfig) -> tuple[int, Path] | None:
    """Checks that --out is free, or with --resume that it holds this run, and gives its newest checkpoint if any.

    Raises:
        UserError: it is neither, or the checkpoint is damaged, or a package that the run writes with is missing.
    """
    if parallel.launched() and parallel.size() == 1:
        raise UserError(f"fastgpt {config.command} runs on one device: start it without torchrun")
    return parallel.on_main(lambda: _open_run(config))


def _open_run(config: RunConfig) -> tuple[int, Path] | None:
    check_writers(config)
    if config.resume:
        saved = type(config).load(config.out)
        check_same_run(saved, config)
        check_step_size(saved, saved_ranks(config.out), config, parallel.size())
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


class Trainer:
    """One call of a training command: fills the run folder, and `run()`s to `max_steps` or a signal.

    Args:
        config: of the run, with `max_steps`, `lr` and `precision` settled.
        task: with the weights of `latest` where there is one.
        latest: what `open_run` gave.
        mode: how ranks share the model, where there are any; None is "ddp".
    """

    def __init__(
        self,
        config: RunConfig,
        task: Task[Any],
        latest: tuple[int, Path] | None,
        mode: parallel.Mode | None = None,
    ) -> None:
        assert config.max_steps is not None
        assert config.lr is not None
        assert config.precision != "auto"
        self.config, self.task = config, task
        self.max_steps, self.lr = config.max_steps, config.lr
        self.eval_interval = config.eval_interval or max(1, min(250, config.max_steps // 8))
        self.device = next(task.model.parameters()).device
        if self.device.type == "cpu":
            keep_freed_memory()
        # Again: nothing that was measured before may move what dropout draws.
        torch.manual_seed(parallel.seed(config.seed))
        self._loss, self._unsynchronized = parallel.wrap(task, mode, config.precision)
        self._saves: Saves | None = None
        if parallel.size() > 1:
            from fastgpt.train import sharded

            self._saves = sharded.Saves()
        self.optimizer = build_optimizer(
            task.model,
            self.lr,
            config.weight_decay,
            (config.beta1, config.beta2),
            config.grad_clip,
            **task.optimizer_options(),
        )
        for module in task.model.modules():
            if isinstance(module, Transformer):
                module.recompute = config.recompute
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        # When a step's figures were last read, the tokens by then, and the seconds that batches were waited for since.
        self._clock, self._read, self._waited = 0.0, 0, 0.0
        # On a GPU a step's loss is read when the next one is launched, so that the host never lets the device wait. A
        # CPU has nothing to gain: its step is done when it is launched.
        self.late = self.device.type == "cuda"
        if latest:
            self._restore(*latest)
        self._changes: list[str] = []
        if parallel.is_main():
            self._write_run()

    def _restore(self, step: int, folder: Path) -> None:
        state = checkpoint.load_state(folder)
        random = state
        if parallel.size() > 1 or (folder / checkpoint.RANKS).exists():
            from fastgpt.train import sharded

            random = sharded.restore(folder, state["optimizer"], self.optimizer)
        else:
            self.optimizer.load_state_dict(state["optimizer"])
        self.task.load_state_dict(state["task"])
        if "cpu_rng" in random:
            torch.set_rng_state(random["cpu_rng"])
        else:  # more or fewer ranks than before: dropout goes on with numbers that none of them has drawn yet
            torch.manual_seed(parallel.seed(self.config.seed, step))
        if self.device.type == "cuda" and random.get("cuda_rng") is not None:
            torch.cuda.set_rng_state(random["cuda_rng"], self.device)
        self.step, self.tokens, self.seconds = step, state["tokens"], state["seconds"]

    def _write_run(self) -> None:
        """config.json: all that is needed to repeat the run."""
        c = self.config
        with explained(c.out):
            c.out.mkdir(parents=True, exist_ok=True)
        found = {**self.task.about(), **environment(self.device)}
        self._changes = differences(c.config if c.config and not c.resume else c.out, found)
        config = {**c.to_json(), "eval_interval": self.eval_interval, "ranks": parallel.size(), **found}
        atomic_write(c.out / "config.json", json.dumps(config, indent=1) + "\n")

    def save(self, best: int | None = None) -> Path:
        """Writes checkpoints/step_<n>/ for the step now; the one of step `best` is kept beside the newest.

        Of several ranks it is written while the training goes on; `_saves.finish` waits for it.
        """
        c = self.config
        state = {"task": self.task.state_dict(), "tokens": self.tokens, "seconds": self.seconds}
        with self.optimizer.full_precision():
            if self._saves:
                write_model = self.task.snapshot()
                return self._saves.start(c.out, self.step, write_model, state, self.optimizer, c.keep, best)
            state["optimizer"] = self.optimizer.state_dict()
            state["cpu_rng"] = torch.get_rng_state()
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
            return checkpoint.save(c.out, self.step, self.task.write_model, state, c.keep, best)

    def _save(self, log: RunLog) -> Path:
        log.sync()
        return self.save(self._best(log))

    def train_step(self) -> Step:
        """Launches one optimizer step."""
        c = self.config
        min_lr = self.lr / 10 if c.schedule == "cosine" else 0.0
        lr = learning_rate(
            self.step,
            c.schedule,
            lr=self.lr,
            min_lr=min_lr if c.min_lr is None else c.min_lr,
            warmup_steps=min(500, self.max_steps // 5) if c.warmup_steps is None else c.warmup_steps,
            max_steps=self.max_steps,
            decay_steps=c.decay_steps,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        start = time.perf_counter()
        batches = [self.task.next_batch() for _ in range(c.grad_accum)]
        self._waited += time.perf_counter() - start
        sums = [sum(map(of, batches)) for of in (self.task.weight, self.task.tokens)]
        weight, tokens = parallel.total(torch.tensor(sums, dtype=torch.float64)).tolist()
        mean = weight / parallel.size()  # over ranks, which the gradients' average over ranks belongs to
        total = torch.zeros((), device=self.device)
        for i, batch in enumerate(batches):
            with self._unsynchronized() if i + 1 < len(batches) else nullcontext():
                with autocast(self.device, c.precision):
                    loss = self._loss(batch) * (self.task.weight(batch) / mean)
                loss.backward()
            total += loss.detach()
        total = parallel.total(total / parallel.size())
        self.tokens += int(tokens)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        assert self.optimizer.grad_norm is not None
        return Step(self.step, self.tokens, lr, total, self.optimizer.grad_norm, batches)

    def _finish(self, step: Step, log: RunLog) -> None:
        """Reads what a step gave, for which it waits, and writes it down."""
        loss, grad_norm = step.loss.item(), step.grad_norm.item()
        now = time.perf_counter()
        elapsed, self._clock = now - self._clock, now
        self.seconds += elapsed
        rate, waited = (step.tokens - self._read) / elapsed, self._waited / elapsed
        self._read, self._waited = step.tokens, 0.0
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._step_over(step, loss, grad_norm, log)
            return
        mfu = rate * self.task.flops_per_token / self._peak if self.task.flops_per_token else None
        usual = self._spikes.see(loss)
        log.record(
            step=step.step,
            tokens=step.tokens,
            loss=loss,
            lr=step.lr,
            grad_norm=grad_norm,
            tokens_per_s=round(rate, 1),
            **({"mfu": round(mfu, 4)} if mfu is not None else {}),
            data_wait=round(waited, 4),
            seconds=round(self.seconds, 3),
            **({"spike_over": usual} if usual is not None else {}),
        )
        log.progress(step.step, loss, rate, mfu)
        if usual is not None:
            log.say(f"warning: a loss spike: {loss:.4f} at step {step.step}, where {usual:.4f} was usual before")

    def _step_over(self, step: Step, loss: float, grad_norm: float, log: RunLog) -> None:
        """A step that is not finite: the optimizer has left the weights as they were before it."""
        if self._saves:
            self._saves.finish()  # it may be the last good one
        what = f"the loss became {loss}" if not math.isfinite(loss) else f"the gradient's norm became {grad_norm}"
        line = f"{what} at step {step.step}"
        try:
            rows = parallel.gathered([self.task.rows(batch) for batch in step.batches])
            path = parallel.on_main(lambda: write_bad_step(self.config.out, rows, step.step, loss, grad_norm))
            line += f", its rows are in {path}"
        except UserError as error:  # what became of the loss matters more
            line += f" ({error})"
        kept = checkpoint.steps(self.config.out)
        back = f"the last good checkpoint is {list(kept.values())[-1]}" if kept else "there is no checkpoint yet"
        smaller = "start a new run with a smaller --lr"
        if not self.config.skip_nan:
            raise UserError(f"{line}; {back}; step over such steps with --resume --skip-nan, or {smaller}")
        log.record(step=step.step, tokens=step.tokens, lr=step.lr, skipped=True)
        if skipped_in_a_row(log.records) >= SKIPPED_IN_A_ROW:
            raise UserError(f"{line}, the last of {SKIPPED_IN_A_ROW} such steps in a row; {back}; {smaller}")
        count = sum("skipped" in r for r in log.records)
        log.say(f"warning: {line}; stepped over it, {count:,} of {step.step:,} steps so far")

    @torch.no_grad()
    def _evaluate(self, log: RunLog, signals: StopSignals) -> None:
        """Validates; a signal leaves it out, so that the run is saved soon, and the resumed run makes up for it."""
        self.task.model.eval()
        try:
            # Ranks evaluate together: one alone cannot leave it.
            with signals.interrupting() if parallel.size() == 1 else nullcontext():
                with autocast(self.device, self.config.precision):
                    figures = self.task.evaluate()
                sample = self.task.sample()
        except Interrupted:
            return
        finally:
            self.task.model.train()
        log.record(step=self.step, tokens=self.tokens, **figures)
        others = [f", {name.replace('_', ' ')} {value:.4f}" for name, value in figures.items() if name != "val_loss"]
        log.say(f"step {self.step}: validation loss {figures['val_loss']:.4f}{''.join(others)}")
        if sample is not None:
            log.sample(self.step, sample)
        log.draw()

    def _evaluation_is_due(self, log: RunLog) -> bool:
        due = self.step % self.eval_interval == 0 or self.step == self.max_steps
        return due and not any(r["step"] == self.step and "val_loss" in r for r in reversed(log.records[-2:]))

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
            peak, peak_source = parallel.on_main(lambda: peak_flops(self.device, c.precision))
            self._peak = peak * parallel.size()
        task.model.train()
        with self._open_log() as log, StopSignals() as signals, closing(task):
            log.say(f"{task.describe()}, {c.precision} on {self.device}")
            if self.step:
                log.say(f"resumed from {c.out / 'checkpoints' / f'step_{self.step}'}")
            if self._changes:
                log.say(f"warning: not as before: {', '.join(self._changes)}: losses may differ in their last digits")
            self._spikes = SpikeDetector(r["loss"] for r in log.records if "loss" in r)
            if self._evaluation_is_due(log):
                self._evaluate(log, signals)
            pending: Step | None = None
            self._clock, self._read = time.perf_counter(), self.tokens
            while self.step < self.max_steps and not signals.any_rank() and not self._patience_is_over(log):
                step = self.train_step()
                if pending:
                    self._finish(pending, log)
                evaluate = self._evaluation_is_due(log)
                save = self.step % c.save_interval == 0
                if self.late and not (evaluate or save or self.step == self.max_steps):
                    pending = step
                    continue
                pending = None
                self._finish(step, log)
                if evaluate:
                    self._evaluate(log, signals)
                    if self._best(log) == self.step:
                        self._save(log)
                if save:
                    self._save(log)
                self._clock = time.perf_counter()
            if pending:  # a signal that came after its launch
                self._finish(pending, log)
            best = self._best(log)
            saved = self._save(log)  # nothing to do where the loop has just done it
            if self._saves:
                self._saves.finish()
            stopped = signals.any_rank()
            log.draw(last=True)
            losses = [r["val_loss"] for r in log.records if "val_loss" in r] or [math.nan]  # stopped before the first
            rates = sorted(r["tokens_per_s"] for r in log.records if "loss" in r)
            if rates:
                median = rates[len(rates) // 2]
                if task.flops_per_token:
                    share = median * task.flops_per_token / self._peak
                    mfu = f", MFU {share:.0%} of {self._peak / 1e9:,.0f} GFLOP/s ({peak_source})"
                log.say(f"{median:,.0f} tokens/s{mfu}")
                waits = [r["data_wait"] for r in log.records if "data_wait" in r]
                if (wait := sum(waits) / max(1, len(waits))) > WORTH_TELLING:
                    log.say(f"waited for data: {wait:.0%} of the time")
            first, last = losses[0], losses[-1]
            if stopped:
                name = signal.Signals(stopped).name
                log.say(f"{name}: saved {saved}; go on with: fastgpt {c.command} --out {c.out} --resume")
            else:
                if self.step < self.max_steps:
                    log.say(f"no better one for {task.patience} evaluations: the best is that of step {best}")
                log.say(f"finished at step {self.step}: validation loss {first:.4f} -> {last:.4f}; saved {saved}")
            if best not in checkpoint.steps(c.out):  # there is no best, or somebody has moved it away
                best = self.step
            return TrainResult(self.step, last, first, saved, best, self.seconds, stopped or None)

    def _open_log(self) -> RunLog:
        """Of rank 0, the one that writes; the others have its records, by which all decide alike."""
        c = self.config
        log: RunLog = QuietLog()
        if parallel.is_main():
            log = RunLog(c.out, self.step, self.max_steps, self.task.loss_unit, open_writers(c, self.step))
        log.records = parallel.on_main(lambda: log.records)
        return log


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
