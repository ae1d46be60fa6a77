"""Fine-tuning on dialogues: next-token prediction of the responses, given what they answer."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fastgpt.chat import stream_answer
from fastgpt.errors import UserError
from fastgpt.files import atomic_write
from fastgpt.finetune.common import DialogueConfig, DialogueTask, settle
from fastgpt.finetune.dialogues import Format, find_format, read_records, to_dialogue
from fastgpt.finetune.packing import Batch, Example, PackedExamples, TooLong, fit_example, response_length
from fastgpt.model import GPT
from fastgpt.template import Message, encode_dialogue, encode_prompt
from fastgpt.tokenizer import Tokenizer
from fastgpt.train import Trainer, TrainResult, explained_run, open_run, publish_best

HELD_OUT = "held_out.json"  # in the run folder
SHOWN = 3  # held-out prompts that are answered at the end
Dialogues = list[tuple[str, list[Message]]]  # each with its place, for errors


@dataclass
class InstructConfig(DialogueConfig):
    """Fine-tune a model to answer, on dialogues; or resume such a run."""

    data: Path | None = None
    """Dialogues: Alpaca JSON, ShareGPT, or OpenAI's messages, as a JSON list or one a line."""
    val_data: Path | None = None
    """Dialogues to validate on, in a file of their own; without it a part of --data is held out, and written to
    held_out.json in the run folder."""
    format: Format | None = None
    """Of the files; found by the first record's fields if not given."""
    too_long: TooLong = "cut"
    """Dialogues longer than a row lose their beginning (cut) or are left out (skip)."""
    train_on_prompt: bool = False
    """Learn to predict the prompts too, not the responses alone."""

    command: ClassVar[str] = "finetune instruct"


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
    dialogues: Dialogues,
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


def _read(config: InstructConfig) -> tuple[Dialogues, Dialogues, list[dict[str, Any]]]:
    """The dialogues to train on, those that are held out, and the held-out ones as they stand in the file."""
    assert config.data is not None
    records, kind = _read_file(config.data, config.format)
    if config.val_data is not None:
        held_out, val_kind = _read_file(config.val_data, config.format)
    else:
        order = np.random.default_rng(config.seed).permutation(len(records)).tolist()
        count = max(1, round(config.val_fraction * len(records)))
        if count == len(records):
            raise UserError(f"{config.data} has too few dialogues to hold some out: name others with --val-data")
        held_out, val_kind = [records[i] for i in sorted(order[:count])], kind
        records = [records[i] for i in sorted(order[count:])]
    train = [(where, to_dialogue(record, kind, where)) for where, record in records]
    val = [(where, to_dialogue(record, val_kind, where)) for where, record in held_out]
    return train, val, [record for _, record in held_out]


def _read_file(path: Path, format: Format | None) -> tuple[list[tuple[str, dict[str, Any]]], Format]:
    records = read_records(path)
    return records, format or find_format(records[0][1], records[0][0])


class InstructionTuning(DialogueTask[Batch]):
    """A model, from `config.model` or from the checkpoint `latest`, and the dialogues that it learns.

    `config` is the given one with `block_size` and all that `settle` settles as numbers. Dropout is off, but for the
    adapters'.
    """

    def __init__(self, config: InstructConfig, latest: tuple[int, Path] | None) -> None:
        train, self.held_out, self.held_out_records = _read(config)
        super().__init__(config, latest)
        block_size, width = self.block_size, self.model.config.n_embd
        self.prepared, self.prepared_val = (
            prepare(self.tokenizer, part, block_size, config.too_long, config.train_on_prompt)
            for part in (train, self.held_out)
        )
        self.data = PackedExamples(self.prepared.examples, block_size, config.seed)
        self.val_data = PackedExamples(self.prepared_val.examples, block_size, config.seed)
        settled = settle(config, self.data.rows(), config.batch_size * block_size, width, trains_all=not self.base)
        self.config = replace(settled, block_size=block_size)

    def next_batch(self) -> Batch:
        return self.data.next_batch(self.config.batch_size)

    def loss(self, batch: Batch) -> Tensor:
        ids, targets, cu_seqlens = batch.to(self.device)
        return self.model.loss(ids, targets, cu_seqlens=cu_seqlens)

    def weight(self, batch: Batch) -> float:
        return batch.weight

    def tokens(self, batch: Batch) -> int:
        return batch.ids.numel()

    def rows(self, batch: Batch) -> list[dict[str, Any]]:
        return [{"ids": ids} for ids in batch.ids.tolist()]

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

    def describe(self) -> str:
        tokens, rows = sum(self.data.lengths), self.data.rows()
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return (
            f"{trained:,} trained parameters; {self.prepared.describe()}: {tokens:,} tokens in {rows:,} rows of "
            f"{self.data.block_size:,} ({tokens / rows / self.data.block_size:.0%} full); held out: "
            f"{self.prepared_val.describe()}"
        )


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
            held_out = json.dumps(task.held_out_records, ensure_ascii=False, indent=1)
            atomic_write(config.out / HELD_OUT, held_out + "\n")
        result = trainer.run()
        if result.signal is None:
            folder = publish_best(config.out, result)
            show_answers(folder, task.held_out[:SHOWN], task.device)
            print(f"talk to it: fastgpt chat --model {config.out}")
    return result


def show_answers(folder: Path, dialogues: Dialogues, device: torch.device) -> None:
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
