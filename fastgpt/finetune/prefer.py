"""Fine-tuning on preferences: of two answers to a prompt, the chosen one becomes likelier against the rejected one.

Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290), with p the model, q the model as it came (the
reference), x a prompt, y+ the chosen and y- the rejected answer:

    r(y)  = beta (log p(y | x) - log q(y | x))          the reward that the model gives an answer, by what it has learnt
    loss  = -log sigmoid(r(y+) - r(y-))                 log 2 at the start, where p is q

and where a share eps of the preferences is taken to be the wrong way round (label smoothing, "conservative DPO"):

    loss  = -(1 - eps) log sigmoid(r(y+) - r(y-)) - eps log sigmoid(r(y-) - r(y+))

log q of every answer is computed once, before the first step, and kept in the checkpoints: there is no second model.

    {"prompt": "...", "chosen": "...", "rejected": "..."}                texts, or prompt a list of messages
    {"chosen": [{"role": ..., "content": ...}, ...], "rejected": [...]}   the prompt is what both begin with
    {"instruction": "...", "input": "...", "chosen": "...", "rejected": "..."}
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import ops
from fastgpt.errors import UserError
from fastgpt.finetune.common import DialogueConfig, DialogueTask, default_lr, settle
from fastgpt.finetune.dialogues import get_field, read_records, to_dialogue
from fastgpt.finetune.packing import Example
from fastgpt.model import GPT
from fastgpt.template import Message, encode_dialogue
from fastgpt.tokenizer import Tokenizer
from fastgpt.train import Trainer, TrainResult, autocast, explained_run, open_run, publish_best


@dataclass
class PreferConfig(DialogueConfig):
    """Fine-tune a model on preferences (DPO), or resume such a run."""

    data: Path | None = None
    """Pairs with prompt, chosen and rejected, as a JSON list or one a line."""
    beta: float = 0.1
    """How strongly the model is held to what it was: the loss's inverse temperature."""
    label_smoothing: float = 0.0
    """Share of the preferences that are taken to be the wrong way round."""
    block_size: int | None = None
    """Tokens of a prompt with its answer at the most: longer ones lose the prompt's beginning; all positions of the
    model if not given."""
    epochs: float = 1.0
    """How often each pair is seen; --max-steps says it in steps instead."""
    batch_size: int = 4
    """Pairs in one forward pass."""
    lr: float | None = None
    """Peak learning rate; a tenth of what suits other fine-tuning if not given."""

    command: ClassVar[str] = "finetune prefer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0:
            raise UserError(f"--beta must be above 0, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"--label-smoothing must be at least 0 and below 0.5, got {self.label_smoothing}")


@dataclass(frozen=True)
class Preference:
    """Two dialogues that begin with the same `prompt` messages; `where` is the pair's file and row, for errors."""

    where: str
    prompt: int
    chosen: list[Message]
    rejected: list[Message]


def read_preferences(path: Path) -> list[Preference]:
    """The pairs of a file, in any of the forms above, mixed or not.

    Raises:
        UserError: a field is missing or is not what it should be, or the two answers are the same; names the row.
    """
    return [_preference(record, where) for where, record in read_records(path)]


def _preference(record: dict[str, Any], where: str) -> Preference:
    for field in ("chosen", "rejected"):
        get_field(record, field, where)
    chosen, rejected = (_dialogue(record, field, where) for field in ("chosen", "rejected"))
    if chosen == rejected:
        raise UserError(f"{where}: chosen and rejected are the same: remove that pair")
    same = [a == b for a, b in zip(chosen, rejected, strict=False)]
    prompt = same.index(False) if False in same else len(same)
    first = (chosen if prompt < len(chosen) else rejected)[prompt]
    if first["role"] != "assistant" or prompt == 0:
        raise UserError(f"{where}: chosen and rejected must begin with the same prompt and differ in the answer to it")
    return Preference(where, prompt, chosen, rejected)


def _dialogue(record: dict[str, Any], field: str, where: str) -> list[Message]:
    """The whole dialogue of one side: the prompt, if its messages do not begin with one, and the answer."""
    answer, before = record[field], []
    if isinstance(answer, str):
        if not answer.strip():
            raise UserError(f"{where}: the field {field!r} is empty")
        answer = [{"role": "assistant", "content": answer}]
    if not isinstance(answer, list) or not answer or not all(isinstance(message, dict) for message in answer):
        raise UserError(f"{where}: the field {field!r} must be a text or a list of messages")
    if answer[0].get("role") == "assistant":
        prompt = record.get("prompt") if "instruction" in record else get_field(record, "prompt", where)
        if prompt is None:
            before = to_dialogue({**record, "output": "-"}, "alpaca", where)[:1]
        else:
            before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    return to_dialogue({"messages": [*before, *answer]}, "messages", f"{where}, {field}")


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The loss of each pair, and its margin r(y+) - r(y-), which is above 0 where the model prefers the chosen answer.

    Args:
        chosen, rejected, reference_chosen, reference_rejected: (n,), log p and log q of the answers, in nats.
        beta, label_smoothing: as in the formulas on top.

    Returns:
        (n,) each.
    """
    margin = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    wrong_way = F.logsigmoid(-margin) * label_smoothing if label_smoothing else 0.0
    return -F.logsigmoid(margin) * (1 - label_smoothing) - wrong_way, margin


def sequence_log_probs(model: GPT, examples: Sequence[Example]) -> Tensor:
    """log p of what is trained in each example, given what is before it: (n,), in nats.

    All of them stand in one row, as documents that do not see each other: no padding, whatever their lengths.
    """
    device = model.classifier.device
    ids = [i for e in examples for i in e.ids[:-1]]
    wanted = [i if t else -100 for e in examples for i, t in zip(e.ids[1:], e.trained[1:], strict=True)]
    places = [n for n, i in enumerate(wanted) if i != -100]  # logits are made for these only
    boundaries = torch.tensor(np.cumsum([0, *(e.length for e in examples)]), dtype=torch.int32)
    hidden = model.hidden(torch.tensor([ids], device=device), boundaries.to(device))[0]  # (tokens, C)
    losses = ops.linear_cross_entropy(
        hidden[torch.tensor(places, device=device)],
        model.classifier[: model.config.vocab_size],
        torch.tensor([wanted[n] for n in places], device=device),
        reduction="none",
    )
    return -torch.stack([part.sum() for part in losses.split([sum(e.trained[1:]) for e in examples])])


@dataclass
class Pairs:
    """Preferences as examples that the model can read, and what became of the others."""

    examples: list[tuple[Example, Example]]  # chosen, rejected
    cut: int = 0
    skipped: int = 0

    def describe(self) -> str:
        parts = [f"{len(self.examples):,} pairs"]
        if self.cut:
            parts.append(f"{self.cut:,} of them cut at the left")
        if self.skipped:
            parts.append(f"{self.skipped:,} skipped, whose answers alone are too long")
        return ", ".join(parts)


def prepare(tokenizer: Tokenizer, preferences: Sequence[Preference], block_size: int) -> Pairs:
    """The pairs' ids, and which of them are the answer's; both prompts of a pair are cut alike, at the left.

    Raises:
        UserError: the template does not take a dialogue, or no pair fits; names its place.
    """
    pairs = Pairs([])
    for p in preferences:
        try:
            sides = [_encode(tokenizer, dialogue, p.prompt) for dialogue in (p.chosen, p.rejected)]
        except UserError as error:
            raise UserError(f"{p.where}: {error}") from None
        cut = max(0, *(side.length - block_size for side in sides))
        if any(side.trained.index(True) <= cut for side in sides):  # one token must stand before the answer
            pairs.skipped += 1
            continue
        pairs.cut += cut > 0
        chosen, rejected = (Example(side.ids[cut:], side.trained[cut:]) for side in sides)
        pairs.examples.append((chosen, rejected))
    if not pairs.examples:
        raise UserError(
            f"{preferences[0].where}: its answers alone do not fit into the {block_size:,} tokens of the context, and "
            f"no other pair's do: shorten them, or take a model that reads more"
        )
    return pairs


def _encode(tokenizer: Tokenizer, dialogue: list[Message], prompt: int) -> Example:
    """The dialogue up to its last answer's end; trained is what the assistant says behind `prompt` messages."""
    ids, trained = encode_dialogue(tokenizer, dialogue)
    end = len(trained) - trained[::-1].index(True)
    ids, trained = ids[:end], trained[:end]
    for _ in range(sum(message["role"] == "assistant" for message in dialogue[:prompt])):
        start = trained.index(True)
        stop = trained.index(False, start)
        trained[start:stop] = [False] * (stop - start)
    return Example(ids, trained)


class PreferenceTuning(DialogueTask[list[int]]):
    """A model, from `config.model` or from the checkpoint `latest`, and the pairs that it learns to tell apart.

    A batch is the pairs' indices. `config` is the given one with `block_size` and all that `settle` settles as numbers.
    Dropout is off, but for the adapters'.
    """

    loss_unit = "nats per pair"

    def __init__(self, config: PreferConfig, latest: tuple[int, Path] | None) -> None:
        assert config.data is not None
        preferences = read_preferences(config.data)
        order = np.random.default_rng(config.seed).permutation(len(preferences)).tolist()
        held_out = max(1, round(config.val_fraction * len(preferences)))
        if held_out == len(preferences):
            raise UserError(f"{config.data} has too few pairs to hold some out: it has {len(preferences)}")
        super().__init__(config, latest)
        block_size, width = self.block_size, self.model.config.n_embd
        self.val_pairs, self.pairs = (
            prepare(self.tokenizer, [preferences[i] for i in sorted(part)], block_size)
            for part in (order[:held_out], order[held_out:])
        )
        lengths = [a.length + b.length for a, b in self.pairs.examples]
        tokens = round(config.batch_size * sum(lengths) / len(lengths))
        if config.lr is None:
            config = replace(config, lr=default_lr(width, trains_all=not self.base) / 10)
        settled = settle(config, len(lengths), tokens, width, trains_all=not self.base)
        self.config = replace(settled, block_size=block_size)
        self.epoch = self.position = 0
        self._order = self._permutation()
        self.since = torch.zeros(3, dtype=torch.float64)  # the last validation: pairs, right ones, sum of margins
        # log q (pairs, 2). A new adapter changes nothing, so the model that is there is still the reference.
        self.reference, self.val_reference = torch.empty(0, 2), torch.empty(0, 2)
        if latest is None:
            self.model.eval()
            self.reference, self.val_reference = (self._reference(p.examples) for p in (self.pairs, self.val_pairs))

    @torch.no_grad()
    def _reference(self, pairs: Sequence[tuple[Example, Example]]) -> Tensor:
        size = self.config.batch_size
        with autocast(self.device, self.config.precision):
            parts = [self._log_probs(pairs[start : start + size]) for start in range(0, len(pairs), size)]
        return torch.cat(parts)

    def _log_probs(self, pairs: Sequence[tuple[Example, Example]]) -> Tensor:
        """log p of the chosen and the rejected answers, (n, 2)."""
        return sequence_log_probs(self.model, [side for pair in pairs for side in pair]).view(-1, 2)

    def _loss(self, pairs: Pairs, reference: Tensor, batch: list[int]) -> tuple[Tensor, Tensor]:
        log_p, log_q = self._log_probs([pairs.examples[i] for i in batch]), reference[batch]
        sides = (log_p[:, 0], log_p[:, 1], log_q[:, 0], log_q[:, 1])
        return dpo_loss(*sides, self.config.beta, self.config.label_smoothing)

    def _permutation(self) -> list[int]:
        return np.random.default_rng([self.config.seed, self.epoch]).permutation(len(self.pairs.examples)).tolist()

    def next_batch(self) -> list[int]:
        """The next pairs of an order that seed and epoch decide; the last batch of an epoch may be smaller."""
        if self.position >= len(self.pairs.examples):
            self.epoch, self.position = self.epoch + 1, 0
            self._order = self._permutation()
        batch = self._order[self.position : self.position + self.config.batch_size]
        self.position += len(batch)
        return batch

    def loss(self, batch: list[int]) -> Tensor:
        losses, margin = self._loss(self.pairs, self.reference, batch)
        margin = margin.detach().double().cpu()
        self.since += torch.tensor([len(batch), (margin > 0).sum(), margin.sum()])
        return losses.mean()

    def weight(self, batch: list[int]) -> float:
        return len(batch)

    def tokens(self, batch: list[int]) -> int:
        return sum(side.length for i in batch for side in self.pairs.examples[i])

    def rows(self, batch: list[int]) -> list[dict[str, Any]]:
        pairs = [(i, *self.pairs.examples[i]) for i in batch]
        return [{"pair": i, "chosen": chosen.ids, "rejected": rejected.ids} for i, chosen, rejected in pairs]

    def evaluate(self) -> dict[str, float]:
        """Of the held-out pairs, and of the training steps since the last time: how many rewards are in the right
        order, and by how much on average."""
        size = self.config.batch_size
        indices = list(range(len(self.val_pairs.examples)))
        parts = [
            self._loss(self.val_pairs, self.val_reference, indices[start : start + size])
            for start in range(0, len(indices), size)
        ]
        losses, margins = (torch.cat(column).double() for column in zip(*parts, strict=True))
        figures = {
            "val_loss": losses.mean().item(),
            "val_reward_accuracy": (margins > 0).double().mean().item(),
            "val_reward_margin": margins.mean().item(),
        }
        count, right, margin = self.since.tolist()
        if count:
            figures |= {"train_reward_accuracy": right / count, "train_reward_margin": margin / count}
        self.since.zero_()
        return figures

    def state_dict(self) -> dict[str, Any]:
        names = ("epoch", "position", "since", "reference", "val_reference")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, pairs in (("reference", self.pairs), ("val_reference", self.val_pairs)):
            if len(state[name]) != len(pairs.examples):
                raise UserError(
                    f"{self.config.data} is not the file that the run was started on: it gives "
                    f"{len(pairs.examples):,} pairs where there were {len(state[name]):,}"
                )
        self.epoch, self.position, self.since = state["epoch"], state["position"], state["since"]
        self._order = self._permutation()
        self.reference, self.val_reference = (state[n].to(self.device) for n in ("reference", "val_reference"))

    def describe(self) -> str:
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return f"{trained:,} trained parameters; {self.pairs.describe()}; held out: {self.val_pairs.describe()}"


def finetune_prefer(config: PreferConfig) -> TrainResult:
    """Fine-tunes, or with `config.resume` goes on; writes `config.out`, at the end its model/: the best one.

    Raises:
        UserError: anything that a user can put right: the line says what and how.
    """
    with explained_run(config):
        latest = open_run(config)
        task = PreferenceTuning(config, latest)
        result = Trainer(task.config, task, latest).run()
        if result.signal is None:
            publish_best(config.out, result)
            print(f"talk to it: fastgpt chat --model {config.out}")
    return result
