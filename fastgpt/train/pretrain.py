"""Pre-training: next-token prediction on token shards, as a task for the trainer."""

import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.data import PackedDataset, TokenDataset
from fastgpt.errors import UserError
from fastgpt.model import GPT, GPTConfig
from fastgpt.tokenizer import Tokenizer
from fastgpt.train.config import TrainConfig
from fastgpt.train.optimizer import build_optimizer
from fastgpt.train.task import Task
from fastgpt.train.trainer import (
    Trainer,
    TrainResult,
    autocast,
    explained_run,
    open_run,
    pick_device,
    pick_precision,
)


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


class Pretraining(Task[tuple[Tensor, Tensor]]):
    """A GPT, new, from `init_from` or from the checkpoint `latest`, and the shards that it learns.

    `config` is the given one with `block_size`, `precision` and `max_steps` settled.
    """

    def __init__(self, config: TrainConfig, latest: tuple[int, Path] | None) -> None:
        if config.data is None:
            raise UserError("--data is missing: name a folder that `fastgpt data prepare` wrote")
        self.device = pick_device(config.device)
        train_shards = TokenDataset.open(config.data, "train")
        val_shards = TokenDataset.open(config.data, "val")
        self.tokenizer = Tokenizer.from_pretrained(config.data)
        torch.manual_seed(config.seed)
        self.model: GPT = self._build_model(config, latest[1] if latest else None).to(self.device)
        block_size = config.block_size or self.model.config.n_positions
        self.train_data = PackedDataset(train_shards, block_size, seed=config.seed)
        self.val_data = PackedDataset(val_shards, block_size, seed=config.seed, shuffle=False)
        self.flops_per_token = self.model.config.flops_per_token(block_size)
        rows = config.batch_size * block_size
        precision = pick_precision(config.precision, self.device, rows, self.model.config.n_embd)
        config = replace(config, block_size=block_size, precision=precision)
        if config.minutes is not None:
            seconds = self._seconds_per_step(config, block_size)
            done = latest[0] if latest else 0
            config = replace(config, max_steps=done + max(1, round(60 * config.minutes / seconds)), minutes=None)
        self.config = config

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

    def next_batch(self) -> tuple[Tensor, Tensor]:
        return self.train_data.next_batch(self.config.batch_size)  # (B, T), (B, T)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        ids, targets = batch
        return self.model.loss(ids.to(self.device), targets.to(self.device))

    def tokens(self, batch: tuple[Tensor, Tensor]) -> int:
        return batch[0].numel()

    def evaluate(self) -> dict[str, float]:
        c = self.config
        return {"val_loss": validation_loss(self.model, self.val_data, c.batch_size, c.eval_batches, c.precision)[0]}

    def state_dict(self) -> dict[str, Any]:
        return self.train_data.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.train_data.load_state_dict(state)

    def write_model(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def describe(self) -> str:
        c, model = self.config, self.model.config
        assert c.block_size is not None
        return (
            f"{model.n_layer} layers, {model.n_head} heads, {model.n_embd} wide, "
            f"{model.num_parameters():,} parameters; {c.batch_size * c.grad_accum * c.block_size:,} tokens a step"
        )

    def about(self) -> dict[str, Any]:
        return {
            "model": self.model.config.to_hf(),
            "parameters": self.model.config.num_parameters(),
            "tokenizer_hash": self.tokenizer.hash,
        }


def train(config: TrainConfig) -> TrainResult:
    """Trains, or with `config.resume` goes on, until `config.max_steps` or SIGINT/SIGTERM; writes `config.out`.

    Raises:
        UserError: anything that a user can put right: the line says what and how.
    """
    with explained_run(config):
        latest = open_run(config)
        task = Pretraining(config, latest)
        return Trainer(task.config, task, latest).run()
