"""Pre-training: next-token prediction on token shards, as a task for the trainer."""

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.data import PackedDataset, Prefetched, TokenDataset
from fastgpt.errors import UserError
from fastgpt.files import sha256_file
from fastgpt.model import GPT, GPTConfig
from fastgpt.tokenizer import Tokenizer
from fastgpt.train import mup, parallel
from fastgpt.train.config import TrainConfig, as_restarted
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
    """Mean loss (nats per token) over the first `max_batches` batches of `data`, all if None; and how many tokens.

    Where there are ranks, all must call it, and they share the batches.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    batches = data.sequential_windows(batch_size, max_batches)
    sums = torch.zeros(len(batches), dtype=torch.float64)  # each by one rank, so that they are added as by one process
    try:
        for start in range(0, len(batches), parallel.size()):
            i = start + parallel.rank()
            # Sharded weights need all ranks to run alike: one without a batch of its own does another's, for nothing.
            x, y, *documents = (t.to(device) for t in data.batch(batches[min(i, len(batches) - 1)]))
            with autocast(device, precision):
                loss = model.loss(x, y, cu_seqlens=documents[0] if documents else None).item()
            if i < len(batches):
                sums[i] = loss * y.numel()
    finally:
        model.train(was_training)
    tokens = data.block_size * sum(map(len, batches))
    return sum(parallel.total(sums).tolist()) / tokens, tokens


class Batch(NamedTuple):
    """ids and targets (B, T) int64, and each row's epoch and window: it starts at token window x T of the split.

    With --document-masks where documents begin too, as `GPT.loss` takes it.
    """

    ids: Tensor
    targets: Tensor
    windows: list[tuple[int, int]]
    cu_seqlens: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """With its tensors changed."""
        documents = None if self.cu_seqlens is None else change(self.cu_seqlens)
        return Batch(change(self.ids), change(self.targets), self.windows, documents)


def compile_loss(model: GPT, config: TrainConfig) -> Callable[..., Tensor]:
    """`model.loss`, compiled whole; on a GPU as a CUDA graph, which does not hold gradients that accumulate.

    Raises:
        UserError: when it is called first: there is nothing here to compile with.
    """
    cuda = next(model.parameters()).is_cuda
    mode = "reduce-overhead" if cuda and config.grad_accum == 1 else None
    compiled = torch.compile(model.loss, fullgraph=True, mode=mode)

    def loss(ids: Tensor, targets: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        if cu_seqlens is not None:  # of one length, whatever documents there are: another would be compiled again
            cu_seqlens = F.pad(cu_seqlens, (0, ids.numel() + 1 - len(cu_seqlens)), value=ids.numel())
        try:
            return compiled(ids, targets, cu_seqlens=cu_seqlens)
        except torch._dynamo.exc.TorchDynamoException as error:
            first = next(line for line in str(error).splitlines() if line.strip())
            raise UserError(f"--compile does not work here ({first.strip()}): mend that or leave it out") from error

    return loss


class Pretraining(Task[Batch]):
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
        masks = config.document_masks
        self.train_data = PackedDataset(
            train_shards, block_size, config.seed, document_masks=masks, rank=parallel.rank(), ranks=parallel.size()
        )
        self.val_data = PackedDataset(val_shards, block_size, config.seed, shuffle=False, document_masks=masks)
        eot = self.tokenizer.eot_id
        self.prompt = self.tokenizer.encode(config.sample_prompt) or [0 if eot is None else eot]
        if config.sample_tokens and len(self.prompt) > self.model.config.n_positions:
            raise UserError(
                f"--sample-prompt has {len(self.prompt):,} tokens, the model reads {self.model.config.n_positions:,} "
                "at most: shorten it"
            )
        self.flops_per_token = self.model.config.flops_per_token(block_size)
        rows = config.batch_size * block_size
        precision = pick_precision(config.precision, self.device, rows, self.model.config.n_embd)
        self.config = config = replace(config, block_size=block_size, precision=precision)
        if config.minutes is not None:
            mine = self._seconds_per_step(config)
            seconds = parallel.on_main(lambda: mine)
            done = latest[0] if latest else 0
            steps = done + max(1, round(60 * config.minutes / seconds))
            self.config = config = replace(config, max_steps=steps, minutes=None)
        self.compiled_loss = compile_loss(self.model, config) if config.compile else None
        # On a CPU there is nothing to gain: a batch takes 0.6% of a step of the smallest preset, read ahead 0.8%.
        self.prefetched = self._prefetch() if self.device.type == "cuda" else None

    def _build_model(self, config: TrainConfig, folder: Path | None) -> GPT:
        start = folder or config.init_from
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
        if start is None:
            sizes = {k: getattr(config, k) for k in ("n_layer", "n_head", "n_embd")}
            sizes["n_positions"] = config.block_size
            given = {k: v for k, v in sizes.items() if v is not None}
            try:
                new = GPT(GPTConfig.preset(config.preset, vocab_size=self.tokenizer.vocab_size, **given, **dropout))
            except ValueError as error:
                raise UserError(f"the model cannot be built: {error}") from None
            if config.mup:
                mup.scale_weights(new, config.mup_base_width)
            return new
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

    def _seconds_per_step(self, config: TrainConfig) -> float:
        """Measured on a copy of the model, so that the run itself starts as if nothing had been measured."""
        model = copy.deepcopy(self.model)
        optimizer = build_optimizer(model, lr=0.0, **self.optimizer_options())
        model.transformer.recompute = config.recompute
        compute_loss = compile_loss(model, config) if config.compile else model.loss
        windows = [i % self.train_data.windows for i in range(config.batch_size)]
        ids, targets, *documents = (t.to(self.device) for t in self.train_data.batch(windows))
        times = []
        for _ in range(6):
            start = time.perf_counter()
            for _ in range(config.grad_accum):
                with autocast(self.device, config.precision):
                    loss = compute_loss(ids, targets, cu_seqlens=documents[0] if documents else None)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()
            times.append(time.perf_counter() - start)
        return sorted(times[1:])[len(times[1:]) // 2]

    def _prefetch(self) -> Prefetched[Batch]:
        def pinned() -> Batch:  # from there the host need not wait for the copy to the device
            return self._read_batch().each(Tensor.pin_memory)

        device = next(self.model.parameters()).device
        return Prefetched(pinned, self.train_data, lambda: torch.cuda.set_device(device))

    def _read_batch(self) -> Batch:
        windows = self.train_data.next_windows(self.config.batch_size)
        ids, targets, *documents = self.train_data.batch([window for _, window in windows])
        return Batch(ids, targets, windows, *documents)

    def next_batch(self) -> Batch:
        return self.prefetched.next_batch() if self.prefetched else self._read_batch()

    def close(self) -> None:
        if self.prefetched:
            self.prefetched.close()

    def loss(self, batch: Batch) -> Tensor:
        ids, targets, _, documents = batch.each(lambda t: t.to(self.device, non_blocking=True))
        return (self.compiled_loss or self.model.loss)(ids, targets, cu_seqlens=documents)

    def tokens(self, batch: Batch) -> int:
        return batch.ids.numel()

    def rows(self, batch: Batch) -> list[dict[str, Any]]:
        T = self.train_data.block_size
        return [
            {"epoch": epoch, "window": window, "first_token": window * T, "ids": ids}
            for (epoch, window), ids in zip(batch.windows, batch.ids.tolist(), strict=True)
        ]

    def evaluate(self) -> dict[str, float]:
        c = self.config
        return {"val_loss": validation_loss(self.model, self.val_data, c.batch_size, c.eval_batches, c.precision)[0]}

    def sample(self) -> str | None:
        c = self.config
        if not c.sample_tokens:
            return None
        ids = torch.tensor([self.prompt], device=self.device)
        text = self.model.generate(ids, c.sample_tokens, temperature=0.8, seed=c.seed)  # the same draws each time
        return c.sample_prompt + self.tokenizer.decode(text[0, len(self.prompt) :].tolist())

    def state_dict(self) -> dict[str, Any]:
        return (self.prefetched or self.train_data).state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        (self.prefetched or self.train_data).load_state_dict(state)

    def optimizer_options(self) -> dict[str, Any]:
        c = self.config
        return {
            "name": c.optimizer,
            "lr_scales": mup.lr_scales(self.model, c.mup_base_width, c.optimizer) if c.mup else None,
            "masters": c.precision == "bf16-weights",
            "muon_dtype": torch.float32 if c.precision == "fp32" else torch.bfloat16,
        }

    def write_model(self, folder: Path) -> None:
        self._write(self.model, folder)

    def _write(self, model: GPT, folder: Path) -> None:
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def snapshot(self) -> Callable[[Path], None]:
        weights = parallel.whole_weights(self.model)

        def write(folder: Path) -> None:
            with torch.device("meta"):
                model = GPT(self.model.config)
            model.load_state_dict(weights, assign=True)
            self._write(model, folder)

        return write

    def describe(self) -> str:
        c, model = self.config, self.model.config
        assert c.block_size is not None
        n = parallel.size()
        ranks = f" on {n} ranks ({c.parallel or 'ddp'})" if n > 1 else ""
        return (
            f"{model.n_layer} layers, {model.n_head} heads, {model.n_embd} wide, "
            f"{model.num_parameters():,} parameters; {n * c.batch_size * c.grad_accum * c.block_size:,} tokens a step"
            f"{ranks}"
        )

    def about(self) -> dict[str, Any]:
        assert self.config.data is not None
        return {
            "model": self.model.config.to_hf(),
            "parameters": self.model.config.num_parameters(),
            "tokenizer_hash": self.tokenizer.hash,
            # The hash stands for the tokenizer, the division and every shard's length.
            "data_sha256": sha256_file(self.config.data / "meta.json"),
            "data_tokens": {data.data.split: len(data.data) for data in (self.train_data, self.val_data)},
        }


def train(config: TrainConfig) -> TrainResult:
    """Trains, or with `config.resume` goes on, until `config.max_steps` or SIGINT/SIGTERM; writes `config.out`.

    Raises:
        UserError: anything that a user can put right: the line says what and how.
    """
    with parallel.ranks(config.parallel, pick_device(config.device)), explained_run(config):
        if parallel.restarted():
            config = as_restarted(config)
        latest = open_run(config)
        task = Pretraining(config, latest)
        return Trainer(task.config, task, latest, config.parallel).run()
