"""Fine-tuning on dialogues: next-token prediction of the responses, given what they answer."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from fastgpt.chat import stream_answer
from fastgpt.errors import UserError
from fastgpt.files import atomic_write
from fastgpt.finetune.dialogues import Format, find_format, read_records, to_dialogue
from fastgpt.finetune.packing import Batch, Example, PackedExamples, TooLong, fit_example, response_length
from fastgpt.model import GPT
from fastgpt.model.hub import resolve_model_folder
from fastgpt.template import TEMPLATES, Message, encode_dialogue, encode_prompt
from fastgpt.tokenizer import Tokenizer
from fastgpt.train import (
    RunConfig,
    Task,
    Trainer,
    TrainResult,
    explained_run,
    open_run,
    pick_device,
    pick_precision,
    publish_best,
)

HELD_OUT = "held_out.json"  # in the run folder
SHOWN = 3  # held-out prompts that are answered at the end


@dataclass
class InstructConfig(RunConfig):
    """Fine-tune a model to answer, on dialogues; or resume such a run."""

    model: Path | None = None
    """Model folder, checkpoint or run folder to start from."""
    data: Path | None = None
    """Dialogues: Alpaca JSON, ShareGPT, or OpenAI's messages, as a JSON list or one a line."""
    val_data: Path | None = None
    """Dialogues to validate on, in a file of their own."""
    val_fraction: float = 0.1
    """Without --val-data, how much of --data is held out; it is written to held_out.json in the run folder."""
    format: Format | None = None
    """Of the files; found by the first record's fields if not given."""
    template: Literal["alpaca", "chatml", "tokenizer"] | None = None
    """How dialogues are written for the model; if not given, the tokenizer's own chat template, else alpaca."""
    block_size: int | None = None
    """Tokens in a row, which whole dialogues are packed into; all positions of the model if not given."""
    too_long: TooLong = "cut"
    """Dialogues longer than a row lose their beginning (cut) or are left out (skip)."""
    train_on_prompt: bool = False
    """Learn to predict the prompts too, not the responses alone."""

    epochs: int = 3
    """How often each dialogue is seen; --max-steps, if given, says it instead."""
    batch_size: int = 4
    """Rows in one forward pass."""
    lr: float | None = None  # type: ignore[assignment]
    """Peak learning rate; 1e-4 if not given, or 1e-3 with --lora-rank."""
    weight_decay: float = 0.01
    """Decoupled decay, on matrices only: not on biases or norms."""
    lora_rank: int = 0
    """Train low-rank adapters of this rank and nothing else; 0 trains all weights."""
    lora_alpha: float | None = None
    """The adapters' output is scaled by this / rank; twice the rank if not given."""
    lora_dropout: float = 0.0
    """Dropout on the adapters' inputs."""

    command: ClassVar[str] = "finetune instruct"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "epochs", "block_size")
        self._at_least(0, "lora_rank")
        self._share("val_fraction", "lora_dropout")
        if self.val_data is None and not self.val_fraction:
            raise UserError(
                "--val-fraction must be above 0, or name a file with --val-data: the best model is chosen by it"
            )


@dataclass
class Prepared:
    """Dialogues as examples that fit into rows, and what became of the others."""

    examples: list[Example]
    cut: int = 0
    """How many lost their beginning."""
    skipped: int = 0
    """How many were left out: too long, or (where the long ones are cut) their response alone is."""

    def describe(self) -> str:
        parts = [f"{len(self.examples):,} dialogues"]
        if self.cut:
            parts.append(f"{self.cut:,} of them cut at the left")
        if self.skipped:
            parts.append(f"{self.skipped:,} too long and skipped")
        return ", ".join(parts)


def prepare(
    tokenizer: Tokenizer,
    dialogues: Sequence[tuple[str, list[Message]]],
    block_size: int,
    too_long: TooLong = "cut",
    train_on_prompt: bool = False,
) -> Prepared:
    """Examples of dialogues, which come with their places for errors.

    Raises:
        UserError: the template does not take one of them, or none fits; names its place.
    """
    prepared = Prepared([])
    lengths = []
    for where, messages in dialogues:
        try:
            ids, trained = encode_dialogue(tokenizer, messages)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        example = fit_example(ids, trained, block_size)
        whole = len(trained) - trained[::-1].index(True)
        lengths.append((where, whole, response_length(trained[:whole])))
        is_cut = whole > block_size + 1
        if example is None or (is_cut and too_long == "skip"):
            prepared.skipped += 1
            continue
        prepared.cut += is_cut
        if train_on_prompt:
            example = Example(example.ids, [True] * len(example.ids))
        prepared.examples.append(example)
    if not prepared.examples:
        where, whole, response = lengths[0]
        raise UserError(
            f"{where}: the dialogue has {whole:,} tokens, its last response alone {response:,}, and the context is "
            f"{block_size:,}; none of the {len(lengths):,} dialogues fits into it: shorten them, or take a model that "
            "reads more"
        )
    return prepared


def pick_template(tokenizer: Tokenizer, name: str | None, folder: Path) -> str:
    """The Jinja source of a `--template` option."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    if name == "tokenizer" and tokenizer.chat_template is None:
        raise UserError(f"the tokenizer in {folder} has no chat template: take --template alpaca or chatml")
    return tokenizer.chat_template or TEMPLATES["alpaca"]


class InstructionTuning(Task[Batch]):
    """A model, from `config.model` or from the checkpoint `latest`, and the dialogues that it learns.

    `config` is the given one with `block_size`, `lr`, `precision` and `max_steps` settled. Dropout is off, but for the
    adapters'.
    """

    best_by = ("val_loss", "min")

    def __init__(self, config: InstructConfig, latest: tuple[int, Path] | None) -> None:
        if config.model is None or config.data is None:
            missing = "--model" if config.model is None else "--data"
            raise UserError(f"{missing} is missing: name a model folder with --model and dialogues with --data")
        self.base = resolve_model_folder(config.model)
        self.device = pick_device(config.device)
        self.tokenizer = Tokenizer.from_pretrained(latest[1] if latest else self.base)
        if self.tokenizer.eot_id is None:
            raise UserError(f"the tokenizer in {self.base} has no end-of-text token to end a response with")
        self.tokenizer.chat_template = pick_template(self.tokenizer, config.template, self.base)
        self.train_records, self.held_out, self.records = self._read(config)
        torch.manual_seed(config.seed)
        self.model: GPT = self._build_model(config, latest[1] if latest else None)
        width, limit = self.model.config.n_embd, self.model.config.n_positions
        block_size = config.block_size or limit
        if block_size > limit:
            raise UserError(f"--block-size {block_size} is more than the {limit} positions of {self.base}")
        self.prepared, self.prepared_val = (
            prepare(self.tokenizer, part, block_size, config.too_long, config.train_on_prompt)
            for part in (self.train_records, self.held_out)
        )
        self.data = PackedExamples(self.prepared.examples, block_size, config.seed)
        self.val_data = PackedExamples(self.prepared_val.examples, block_size, config.seed)
        steps = -(-self.data.rows(config.epochs) // (config.batch_size * config.grad_accum))
        self.config = replace(
            config,
            block_size=block_size,
            lr=config.lr or (1e-3 if config.lora_rank else 1e-4),
            precision=pick_precision(config.precision, self.device, config.batch_size * block_size, width),
            max_steps=config.max_steps or steps,
        )

    def _read(self, config: InstructConfig) -> tuple[list[Any], list[Any], list[Any]]:
        """Training dialogues, held-out ones, each with its place, and the held-out ones' records."""
        assert config.data is not None
        records = read_records(config.data)
        kind = config.format or find_format(records[0][1], records[0][0])
        if config.val_data is not None:
            val_records = read_records(config.val_data)
            val_kind = config.format or find_format(val_records[0][1], val_records[0][0])
        else:
            order = np.random.default_rng(config.seed).permutation(len(records)).tolist()
            count = max(1, round(config.val_fraction * len(records)))
            if count == len(records):
                raise UserError(f"{config.data} has too few dialogues to hold some out: name others with --val-data")
            val_records, val_kind = [records[i] for i in sorted(order[:count])], kind
            records = [records[i] for i in sorted(order[count:])]
        train = [(where, to_dialogue(record, kind, where)) for where, record in records]
        held_out = [(where, to_dialogue(record, val_kind, where)) for where, record in val_records]
        return train, held_out, [record for _, record in val_records]

    def _build_model(self, config: InstructConfig, checkpoint: Path | None) -> GPT:
        model = GPT.from_pretrained(checkpoint or self.base)
        if model.config.vocab_size != self.tokenizer.vocab_size:
            raise UserError(
                f"the tokenizer in {self.base} has {self.tokenizer.vocab_size:,} ids, the model "
                f"{model.config.vocab_size:,}: put the tokenizer.json there that the model was trained with"
            )
        model.set_dropout(0.0)
        return model.to(self.device)

    def next_batch(self) -> Batch:
        return self.data.next_batch(self.config.batch_size)

    def loss(self, batch: Batch) -> Tensor:
        ids, targets, cu_seqlens = batch.to(self.device)
        return self.model.loss(ids, targets, cu_seqlens=cu_seqlens)

    def weight(self, batch: Batch) -> float:
        return batch.weight

    def tokens(self, batch: Batch) -> int:
        return batch.ids.numel()

    def evaluate(self) -> dict[str, float]:
        total, count = 0.0, 0
        for batch in self.val_data.sequential_batches(self.config.batch_size):
            total += self.loss(batch).item() * batch.weight
            count += batch.weight
        return {"val_loss": total / count}

    def state_dict(self) -> dict[str, Any]:
        return self.data.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.data.load_state_dict(state)

    def write_model(self, folder: Path) -> None:
        self.model.save_pretrained(folder, self.tokenizer.eot_id)
        self.tokenizer.save_pretrained(folder)

    def describe(self) -> str:
        tokens, rows = sum(self.data.lengths), self.data.rows()
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return (
            f"{trained:,} trained parameters; {self.prepared.describe()}: {tokens:,} tokens in {rows:,} rows of "
            f"{self.data.block_size:,} ({tokens / rows / self.data.block_size:.0%} full); held out: "
            f"{self.prepared_val.describe()}"
        )

    def about(self) -> dict[str, Any]:
        return {"tokenizer_hash": self.tokenizer.hash, "chat_template": self.tokenizer.chat_template}


def finetune_instruct(config: InstructConfig) -> TrainResult:
    """Fine-tunes, or with `config.resume` goes on; writes `config.out`, at the end its model/: the best one.

    Then it answers some held-out prompts and prints the answers beside the expected ones.

    Raises:
        UserError: anything that a user can put right: the line says what and how.
    """
    with explained_run(config):
        latest = open_run(config)
        task = InstructionTuning(config, latest)
        trainer = Trainer(task.config, task, latest)
        if config.val_data is None:
            atomic_write(config.out / HELD_OUT, json.dumps(task.records, ensure_ascii=False, indent=1) + "\n")
        result = trainer.run()
        if result.signal is None:
            folder = publish_best(config.out, result)
            show_answers(folder, task.held_out[:SHOWN], task.device)
            print(f"talk to it: fastgpt chat --model {config.out}")
    return result


def show_answers(folder: Path, dialogues: Sequence[tuple[str, list[Message]]], device: torch.device) -> None:
    """Prints what a model answers to the last messages of some dialogues, beside what they have there."""
    model, tokenizer = GPT.from_pretrained(folder, device=device), Tokenizer.from_pretrained(folder)
    for where, messages in dialogues:
        *prompt, expected = messages
        print(f"\n{where}: {prompt[-1]['content']}")
        print(f"  expected: {expected['content']}")
        # The end of a prompt that is too long; half of the context is left for the answer.
        ids = encode_prompt(tokenizer, prompt)[-(model.config.n_positions // 2) :]
        print(f"  model:    {''.join(stream_answer(model, tokenizer, ids, temperature=0)).strip()}", flush=True)
    print()
