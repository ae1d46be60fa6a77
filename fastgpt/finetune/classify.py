"""Classification: a GPT becomes one that says which class a text is of."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.data.padded import batches_by_length
from fastgpt.errors import UserError
from fastgpt.files import atomic_write
from fastgpt.finetune.common import FinetuneConfig, adapt, load_base, settle
from fastgpt.finetune.labelled import Example, balance, class_counts, divide, read_labelled
from fastgpt.finetune.scores import Scores, draw_scores, score
from fastgpt.model.classifier import Classes, GPTClassifier, Pooling
from fastgpt.train import Task, Trainer, TrainResult, explained_run, open_run, pick_device, publish_best

PARTS = ("train", "val", "test")


@dataclass
class ClassifyConfig(FinetuneConfig):
    """Fine-tune a model to tell classes of text apart, or resume such a run.

    The data is a .tsv, .csv or .jsonl file with a column of texts and one of labels. It is divided by --seed into
    training, validation and test, texts that repeat on one side. The best model on validation is tested at the end and
    is in the run folder's model/, for `fastgpt classify` and for transformers.
    """

    text_column: str | None = None
    """Name of the text's column, or its number from 1; found by its name if not given."""
    label_column: str | None = None
    """Name of the label's column, or its number from 1; found by its name if not given."""
    val_fraction: float = 0.1
    """Share of the data that says when to stop and which checkpoint is the best."""
    test_fraction: float = 0.2
    """Share of the data that is looked at once, at the end."""
    test_data: Path | None = None
    """Test on this file instead, with columns of the same names."""
    balance: bool = False
    """Take as many examples of each class as the rarest has."""
    train: Literal["all", "last-block", "lora"] = "all"
    """What learns, beside the new head: all weights, the last block and norm, or low-rank adapters."""
    lora_rank: int = 16
    """Rank of the adapters of --train lora."""
    pooling: Pooling = "last"
    """What the head reads: the last token's hidden state, as transformers has it, or the mean of all tokens'."""
    max_length: int | None = None
    """Tokens of a text that are read, its first ones; all that the model can if not given."""
    dropout: float = 0.1
    """Dropout on embeddings, attention and residuals."""
    epochs: float = 10.0
    """How often each example is seen at most; --max-steps says it in steps instead."""
    patience: int | None = 6
    """Stop after so many validations (two an epoch) without a more accurate one."""

    command: ClassVar[str] = "finetune classify"
    adapters_by: ClassVar[str] = "with --train lora"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "max_length")
        self._share("dropout", "val_fraction", "test_fraction")
        if self.trains_adapters:
            self._at_least(1, "lora_rank")
        if self.val_fraction + self.test_fraction >= 1 or self.val_fraction == 0:
            raise UserError("--val-fraction must be above 0, and with --test-fraction below 1: something must be left")
        if self.test_fraction == 0 and self.test_data is None:
            raise UserError("--test-fraction is 0: give a --test-data file to test on instead")

    @property
    def trains_adapters(self) -> bool:
        return self.train == "lora"


Batch = tuple[Tensor, Tensor, Tensor]  # ids (B, T), lengths (B,), classes (B,)


class Classification(Task[Batch]):
    """The examples, and a classifier on the model to start from or out of the checkpoint `latest`."""

    model: GPTClassifier
    loss_unit = "nats per text"
    best_by = ("accuracy", "max")

    def __init__(self, config: ClassifyConfig, latest: tuple[int, Path] | None) -> None:
        self.device = pick_device(config.device)
        self.parts = read_parts(config)
        gpt, self.tokenizer, _ = load_base(config)
        if self.tokenizer.eot_id is None:
            raise UserError(
                "this tokenizer has no end-of-text token, which batches are filled with: take another model"
            )
        gpt.set_dropout(config.dropout)
        torch.manual_seed(config.seed)
        labels = tuple(class_counts(self.parts["train"]))
        self.model = GPTClassifier(
            gpt.config, Classes(labels, self.tokenizer.eot_id, config.pooling), gpt.transformer
        ).to(self.device)
        if config.trains_adapters:
            adapt(self.model, config)
            self.model.score.requires_grad_(True)
        elif config.train == "last-block":
            self.model.requires_grad_(False)
            for module in (self.model.score, self.model.transformer.h[-1], self.model.transformer.ln_f):
                module.requires_grad_(True)
        self.limit = min(config.max_length or gpt.config.n_positions, gpt.config.n_positions)
        self.ids, self.targets, self.cut = {}, {}, 0
        for part, examples in self.parts.items():
            whole = self.tokenizer.encode_batch([example.text for example in examples])
            self.cut += sum(len(ids) > self.limit for ids in whole)
            self.ids[part] = [ids[: self.limit] for ids in whole]
            self.targets[part] = torch.tensor([labels.index(example.label) for example in examples])
        tokens = sum(map(len, self.ids["train"]))
        self.patience = config.patience
        self.config = settle(
            config,
            examples=len(self.ids["train"]),
            rows=max(1, config.batch_size * tokens // len(self.ids["train"])),
            width=gpt.config.n_embd,
            trains_all=config.train == "all",
        )
        self.epoch = self.position = 0
        self._batches = self._arrange()

    def _arrange(self) -> list[list[int]]:
        lengths = [len(ids) for ids in self.ids["train"]]
        return batches_by_length(lengths, self.config.batch_size, self.config.seed, self.epoch)

    def next_batch(self) -> Batch:
        if self.position == len(self._batches):
            self.epoch, self.position = self.epoch + 1, 0
            self._batches = self._arrange()
        rows = self._batches[self.position]
        self.position += 1
        return *self.model.pad([self.ids["train"][i] for i in rows]), self.targets["train"][rows]

    def loss(self, batch: Batch) -> Tensor:
        ids, lengths, targets = (t.to(self.device) for t in batch)
        return F.cross_entropy(self.model(ids, lengths).float(), targets)

    def weight(self, batch: Batch) -> float:
        return len(batch[0])

    def tokens(self, batch: Batch) -> int:
        return int(batch[1].sum())

    def rows(self, batch: Batch) -> list[dict[str, Any]]:
        ids, lengths, targets = (t.tolist() for t in batch)
        labels = self.model.classes.labels
        return [{"ids": row[:n], "label": labels[target]} for row, n, target in zip(ids, lengths, targets, strict=True)]

    def evaluate(self) -> dict[str, float]:
        labels = self.model.classes.labels
        scores = score(self.model.probabilities(self.ids["val"]), self.targets["val"], labels)
        return {"val_loss": scores.nll, "accuracy": scores.accuracy, "macro_f1": scores.macro_f1}

    def state_dict(self) -> dict[str, Any]:
        # The weights as they are trained: the folder's are merged where there are adapters.
        trained = {n: p.detach().cpu() for n, p in self.model.named_parameters() if p.requires_grad}
        return {"epoch": self.epoch, "position": self.position, "trained": trained}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self._batches = self._arrange()
        self.model.load_state_dict(state["trained"], strict=False)

    def write_model(self, folder: Path) -> None:
        self.model.save_pretrained(folder, self.tokenizer.eot_id)
        self.tokenizer.save_pretrained(folder)

    def describe(self) -> str:
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        shares = ", ".join(f"{label} {n:,}" for label, n in class_counts(self.parts["train"]).items())
        cut = f"; {self.cut:,} are longer than {self.limit:,} tokens and cut" if self.cut else ""
        return (
            f"{len(self.parts['train']):,} texts to train on ({shares}), {len(self.parts['val']):,} to validate, "
            f"{len(self.parts['test']):,} to test{cut}; {trained:,} parameters learn"
        )

    def about(self) -> dict[str, Any]:
        return {
            "labels": self.model.classes.labels,
            "examples": {part: class_counts(examples) for part, examples in self.parts.items()},
            "tokenizer_hash": self.tokenizer.hash,
        }


def read_parts(config: ClassifyConfig) -> dict[str, list[Example]]:
    """The data of a run, divided: "train", "val" and "test".

    Raises:
        UserError: there is only one class, a class is too small to be in each part, or the test file has a label that
            the data does not have; names them.
    """
    assert config.data is not None
    examples = read_labelled(config.data, config.text_column, config.label_column)
    counts = class_counts(examples)
    if len(counts) < 2:
        raise UserError(
            f"{config.data}: all {len(examples):,} labels are {next(iter(counts))!r}: give at least two classes"
        )
    if config.balance:
        examples = balance(examples, config.seed)
    test_fraction = 0.0 if config.test_data else config.test_fraction
    val, test, train = divide(examples, [config.val_fraction, test_fraction], config.seed)
    parts = {"train": train, "val": val, "test": test}
    if config.test_data:
        parts["test"] = read_labelled(config.test_data, config.text_column, config.label_column)
        for example in parts["test"]:
            if example.label not in counts:
                known = ", ".join(map(repr, list(counts)[:8]))
                raise UserError(f"{example.place}: the label {example.label!r} is not in {config.data}: it has {known}")
    if missing := counts.keys() - {example.label for example in train}:
        raise UserError(
            f"{config.data}: the class {min(missing)!r} has {counts[min(missing)]} examples, too few to train on: "
            "give more, or take the class out"
        )
    for part, found in parts.items():
        if not found:
            raise UserError(f"{config.data} has too few examples for a {part} part: give more, or larger fractions")
    return parts


@dataclass
class ClassifyResult:
    """How a run ended; `scores` are the best model's on the test part, None if a signal stopped it before."""

    run: TrainResult
    model: Path | None = None
    scores: Scores | None = None


def classify(config: ClassifyConfig) -> ClassifyResult:
    """Fine-tunes, or with `config.resume` goes on; then tests the best model and writes it to out/model.

    Beside what every run has, out/ gets test.json, confusion.png and test_predictions.jsonl.

    Raises:
        UserError: anything that a user can put right: the line says what and how.
    """
    with explained_run(config):
        latest = open_run(config)
        task = Classification(config, latest)
        result = Trainer(task.config, task, latest).run()
        if result.signal:
            return ClassifyResult(result)
        folder = publish_best(config.out, result)
        model = GPTClassifier.from_pretrained(folder, device=task.device)
        probabilities = model.probabilities(task.ids["test"])
        scores = score(probabilities, task.targets["test"], model.classes.labels)
        atomic_write(config.out / "test.json", json.dumps(scores.to_json(), indent=1) + "\n")
        lines = [
            json.dumps(
                {**asdict(example), "guess": scores.labels[int(p.argmax())], "probability": round(p.max().item(), 4)},
                ensure_ascii=False,
            )
            for example, p in zip(task.parts["test"], probabilities, strict=True)
        ]
        atomic_write(config.out / "test_predictions.jsonl", "\n".join(lines) + "\n")
        draw_scores(scores, config.out / "confusion.png")
        return ClassifyResult(result, folder, scores)
