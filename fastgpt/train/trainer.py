"""The training loop: shards in, a run folder out.

A step is: `grad_accum` forward and backward passes, one clipped AdamW update at the cosine's rate. A run is a function
of its config alone: killed anywhere and resumed on the same machine, it goes on to the same losses bit for bit, because
a checkpoint holds the weights, both moments, the position in the data and every random state that a step reads.
"""

import copy
import json
import math
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastgpt
from fastgpt.data import PackedDataset, TokenDataset
from fastgpt.errors import UserError
from fastgpt.files import atomic_write
from fastgpt.model import GPT, GPTConfig
from fastgpt.tokenizer import Tokenizer
from fastgpt.train import checkpoint
from fastgpt.train.config import TrainConfig, check_same_run
from fastgpt.train.metrics import RunLog
from fastgpt.train.optimizer import build_optimizer
from fastgpt.train.schedule import cosine_lr
from fastgpt.train.speed import faster_precision, peak_flops


@dataclass
class TrainResult:
    """How a call of `train` ended. `signal` is the one that stopped it (SIGINT, SIGTERM), or None."""

    step: int
    val_loss: float
    first_val_loss: float
    checkpoint: Path
    seconds: float
    signal: int | None = None


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


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """What a forward pass in `precision` ("fp32" or "bf16") runs under."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


@torch.no_grad()
def validation_loss(
    model: GPT,
    data: PackedDataset,
    batch_size: int,
    max_batches: int | None = None,
    precision: str = "fp32",
) -> tuple[float, int]:
    """Mean loss (nats per token) over the first `max_batches` batches of `data`, all if None; and how many tokens."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    try:
        for x, y in data.sequential_batches(batch_size, max_batches):
            with autocast(device, precision):
                loss = model.loss(x.to(device), y.to(device))
            total += loss.item() * y.numel()
            tokens += y.numel()
    finally:
        model.train(was_training)
    return total / tokens, tokens


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
    """One call of `fastgpt train`: makes the run folder or opens it, then `run()`s to `max_steps` or a signal."""

    def __init__(self, config: TrainConfig) -> None:
        if config.resume:
            check_same_run(TrainConfig.load(config.out), config)
        elif (config.out / "config.json").exists():
            raise UserError(f"{config.out} already holds a run: add --resume to go on with it, or name another --out")
        if config.data is None:
            raise UserError("--data is missing: name a folder that `fastgpt data prepare` wrote")
        self.device = pick_device(config.device)
        train_shards = TokenDataset.open(config.data, "train")
        val_shards = TokenDataset.open(config.data, "val")
        self.tokenizer = Tokenizer.from_pretrained(config.data)

        latest = None
        if config.resume:
            checkpoint.remove_unfinished(config.out)
            latest = checkpoint.newest(config.out)
        torch.manual_seed(config.seed)
        self.model = self._build_model(config, latest[1] if latest else None).to(self.device)
        block_size = config.block_size or self.model.config.n_positions
        self.train_data = PackedDataset(train_shards, block_size, seed=config.seed)
        self.val_data = PackedDataset(val_shards, block_size, seed=config.seed, shuffle=False)
        if config.precision == "auto":
            rows = config.batch_size * block_size
            precision = faster_precision(self.device, rows, self.model.config.n_embd)
            config = replace(config, precision=precision)  # type: ignore[arg-type]
        if config.minutes is not None:
            seconds = self._seconds_per_step(config, block_size)
            done = latest[0] if latest else 0
            config = replace(config, max_steps=done + max(1, round(60 * config.minutes / seconds)), minutes=None)
        eval_interval = config.eval_interval or max(1, min(250, config.max_steps // 8))
        self.config = replace(config, block_size=block_size, eval_interval=eval_interval)
        torch.manual_seed(config.seed)  # again: nothing that was measured above may move what dropout draws
        self.optimizer = build_optimizer(
            self.model, config.lr, config.weight_decay, (config.beta1, config.beta2), config.grad_clip
        )
        self.step, self.seconds = 0, 0.0
        if latest:
            self._restore(*latest)
        self._write_run()

    def _build_model(self, config: TrainConfig, folder: Path | None) -> GPT:
        start = folder or config.init_from
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
        if start is None:
            sizes = {k: getattr(config, k) for k in ("n_layer", "n_head", "n_embd")}
            sizes["n_positions"] = config.block_size
            given = {k: v for k, v in sizes.items() if v is not None}
            try:
                return GPT(GPTConfig.preset(config.preset, vocab_size=self.tokenizer.vocab_size, **given, **dropout))
            except ValueError as error:
                raise UserError(f"the model cannot be built: {error}") from None
        model = GPT.from_pretrained(start)
        if (start / "tokenizer.json").exists() and Tokenizer.from_pretrained(start).hash != self.tokenizer.hash:
            raise UserError(
                f"the tokenizer of {start} is not the one that {config.data} was prepared with: "
                f"prepare the data again with `--tokenizer {start}`"
            )
        if model.config.vocab_size != self.tokenizer.vocab_size:
            raise UserError(
                f"{start} has a vocabulary of {model.config.vocab_size:,} ids, the tokenizer of {config.data} has "
                f"{self.tokenizer.vocab_size:,}: prepare the data again with the model's tokenizer"
            )
        if (config.block_size or 0) > model.config.n_positions:
            raise UserError(
                f"--block-size {config.block_size} is more than the {model.config.n_positions} positions of {start}"
            )
        if folder is None:
            model.set_dropout(config.dropout)
        return model

    def _seconds_per_step(self, config: TrainConfig, block_size: int) -> float:
        """Measured on a copy of the model, so that the run itself starts as if nothing had been measured."""
        model = copy.deepcopy(self.model)
        optimizer = build_optimizer(model, lr=0.0)
        ids = torch.randint(model.config.vocab_size, (config.batch_size, block_size + 1)).to(self.device)
        times = []
        for _ in range(6):
            start = time.perf_counter()
            for _ in range(config.grad_accum):
                with autocast(self.device, config.precision):
                    loss = model.loss(ids[:, :-1], ids[:, 1:])
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()
            times.append(time.perf_counter() - start)
        return sorted(times[1:])[len(times[1:]) // 2]

    def _restore(self, step: int, folder: Path) -> None:
        state = checkpoint.load_state(folder)
        self.optimizer.load_state_dict(state["optimizer"])
        self.train_data.load_state_dict(state["data"])
        torch.set_rng_state(state["cpu_rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self.step, self.seconds = step, state["seconds"]

    def _write_run(self) -> None:
        """config.json: all that is needed to repeat the run."""
        self.config.out.mkdir(parents=True, exist_ok=True)
        config = {
            **self.config.to_json(),
            "model": self.model.config.to_hf(),
            "parameters": self.model.config.num_parameters(),
            "tokenizer_hash": self.tokenizer.hash,
            "versions": {
                "fastgpt": fastgpt.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "threads": torch.get_num_threads(),
        }
        atomic_write(self.config.out / "config.json", json.dumps(config, indent=1) + "\n")

    def save(self) -> Path:
        """Writes checkpoints/step_<n>/ for the step now."""
        state = {
            "optimizer": self.optimizer.state_dict(),
            "data": self.train_data.state_dict(),
            "cpu_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "seconds": self.seconds,
        }

        def write_model(folder: Path) -> None:
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

        return checkpoint.save(self.config.out, self.step, write_model, state, self.config.keep)

    def train_step(self) -> tuple[Tensor, float]:
        """One optimizer step; returns its mean loss, on the device, and the learning rate it was made with."""
        c = self.config
        lr = cosine_lr(
            self.step,
            lr=c.lr,
            min_lr=c.lr / 10 if c.min_lr is None else c.min_lr,
            warmup_steps=min(500, c.max_steps // 5) if c.warmup_steps is None else c.warmup_steps,
            max_steps=c.max_steps,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        total = torch.zeros((), device=self.device)
        for _ in range(c.grad_accum):
            x, y = self.train_data.next_batch(c.batch_size)  # (B, T), (B, T)
            with autocast(self.device, c.precision):
                loss = self.model.loss(x.to(self.device), y.to(self.device)) / c.grad_accum
            loss.backward()
            total += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return total, lr

    def run(self) -> TrainResult:
        c = self.config
        model = self.model.config
        assert c.block_size is not None
        assert c.eval_interval is not None
        tokens_per_step = c.batch_size * c.grad_accum * c.block_size
        peak, peak_source = peak_flops(self.device, c.precision)
        flops_per_token = model.flops_per_token(c.block_size)
        self.model.train()
        with RunLog(c.out, self.step, c.max_steps) as log, _signals() as signals:
            log.say(
                f"{model.n_layer} layers, {model.n_head} heads, {model.n_embd} wide, "
                f"{model.num_parameters():,} parameters; "
                f"{tokens_per_step:,} tokens a step, {c.precision} on {self.device}"
            )
            if self.step:
                log.say(f"resumed from {c.out / 'checkpoints' / f'step_{self.step}'}")

            def evaluate() -> float:
                loss, _ = validation_loss(self.model, self.val_data, c.batch_size, c.eval_batches, c.precision)
                log.record(step=self.step, tokens=self.step * tokens_per_step, val_loss=loss)
                log.say(f"step {self.step}: validation loss {loss:.4f}")
                return loss

            logged = [r["val_loss"] for r in log.records if "val_loss" in r]
            val_loss = logged[-1] if logged else evaluate()
            while self.step < c.max_steps and not signals:
                start = time.perf_counter()
                loss_tensor, lr = self.train_step()
                loss = loss_tensor.item()
                elapsed = time.perf_counter() - start
                if not math.isfinite(loss):
                    raise UserError(self._lost(loss))
                self.seconds += elapsed
                rate = tokens_per_step / elapsed
                mfu = rate * flops_per_token / peak
                assert self.optimizer.grad_norm is not None
                log.record(
                    step=self.step,
                    tokens=self.step * tokens_per_step,
                    loss=loss,
                    lr=lr,
                    grad_norm=self.optimizer.grad_norm.item(),
                    tokens_per_s=round(rate, 1),
                    mfu=round(mfu, 4),
                    seconds=round(self.seconds, 3),
                )
                log.progress(self.step, loss, rate)
                if self.step % c.eval_interval == 0 or self.step == c.max_steps:
                    val_loss = evaluate()
                if self.step % c.save_interval == 0:
                    self.save()
                    log.draw()
            saved = self.save()  # nothing to do where the loop has just done it
            log.draw()
            first = next(r["val_loss"] for r in log.records if "val_loss" in r)
            rates = sorted(r["tokens_per_s"] for r in log.records if "loss" in r)
            if rates:
                median = rates[len(rates) // 2]
                share = median * flops_per_token / peak
                log.say(f"{median:,.0f} tokens/s, MFU {share:.0%} of {peak / 1e9:,.0f} GFLOP/s ({peak_source})")
            if signals:
                name = signal.Signals(signals[0]).name
                log.say(f"{name}: saved {saved}; go on with: fastgpt train --out {c.out} --resume")
            else:
                log.say(f"finished at step {self.step}: validation loss {first:.4f} -> {val_loss:.4f}; saved {saved}")
            return TrainResult(self.step, val_loss, first, saved, self.seconds, signals[0] if signals else None)

    def _lost(self, loss: float) -> str:
        kept = checkpoint.steps(self.config.out)
        back = f"the last good checkpoint is {list(kept.values())[-1]}" if kept else "there is no checkpoint yet"
        return f"the loss became {loss} at step {self.step}; {back}; start a new run with a smaller --lr"


def train(config: TrainConfig) -> TrainResult:
    """Trains, or with `config.resume` goes on, until `config.max_steps` or SIGINT/SIGTERM; writes `config.out`.

    Raises:
        UserError: anything that a user can put right: the line says what and how.
    """
    try:
        return Trainer(config).run()
    except OSError as error:  # checkpoints say it themselves; this is for metrics.jsonl, log.txt and the like
        raise UserError(
            f"{error.filename or config.out}: {error.strerror}: mend that, then go on with --resume; "
            "checkpoints are safe"
        ) from None
