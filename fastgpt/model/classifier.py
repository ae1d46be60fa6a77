"""A GPT-2 that says which class a text is of: the transformer, and a linear layer on one hidden state a text.

    logits = h_last W^T        h_last (B, C): the hidden state of each text's last token, which has seen all others

The folder is transformers' GPT2ForSequenceClassification. It pads on the right with `pad_token_id`, which no text's own
tokens may be, and takes the last token that is another.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastgpt.errors import UserError
from fastgpt.model.config import GPTConfig
from fastgpt.model.gpt import Transformer
from fastgpt.model.hub import (
    fill,
    is_adapter,
    read_config,
    read_json,
    read_weights,
    resolve_model_folder,
    save_pretrained,
)

ARCHITECTURE = "GPT2ForSequenceClassification"
Pooling = Literal["last", "mean"]


@dataclass(frozen=True)
class Classes:
    """What a classifier's outputs mean.

    Attributes:
        labels: the classes' names, in the order of the logits.
        pooling: "last", the last token's hidden state, as transformers has it; or "mean", that of all of them, which
            transformers would take for "last".
        pad_id: what shorter texts of a batch are filled with.
    """

    labels: tuple[str, ...]
    pad_id: int
    pooling: Pooling = "last"


class GPTClassifier(nn.Module):
    """GPT-2 with a head of one logit a class.

    `GPTClassifier(gpt.config, classes, gpt.transformer)` takes over a language model's transformer.
    """

    def __init__(self, config: GPTConfig, classes: Classes, transformer: Transformer | None = None) -> None:
        super().__init__()
        self.config, self.classes = config, classes
        self.transformer = Transformer(config) if transformer is None else transformer
        self.score = nn.Linear(config.n_embd, len(classes.labels), bias=False)
        nn.init.normal_(self.score.weight, std=0.02)
        with torch.no_grad():
            self.transformer.wte.weight[config.vocab_size :] = 0

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Logits of the classes.

        Args:
            ids: (B, T) int64, each row filled on the right.
            lengths: (B,) int64, how many of a row's ids are the text's own; at least 1.

        Returns:
            (B, number of classes).
        """
        hidden = self.transformer(ids)  # (B, T, C); causal, so that what fills the row changes nothing before it
        if self.classes.pooling == "last":
            pooled = hidden[torch.arange(len(ids), device=ids.device), lengths - 1]  # (B, C)
        else:
            own = torch.arange(ids.size(1), device=ids.device) < lengths[:, None]  # (B, T)
            pooled = (hidden * own[..., None]).sum(1) / lengths[:, None].to(hidden.dtype)
        return self.score(pooled)

    def pad(self, texts: list[list[int]]) -> tuple[Tensor, Tensor]:
        """The ids of texts as `forward` takes them: (B, T) ids and (B,) lengths."""
        lengths = torch.tensor([len(ids) for ids in texts])
        rows = torch.full((len(texts), int(lengths.max())), self.classes.pad_id)
        for row, ids in zip(rows, texts, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        return rows, lengths

    @torch.no_grad()
    def probabilities(self, texts: list[list[int]], batch_size: int = 32) -> Tensor:
        """The probability of each class for each text's ids: (number of texts, number of classes), fp32, on the CPU.

        Texts of like length go through the model together; the order is the caller's.
        """
        device = self.score.weight.device
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        result = torch.empty(len(texts), len(self.classes.labels))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            ids, lengths = self.pad([texts[i] for i in rows])
            result[rows] = self(ids.to(device), lengths.to(device)).float().softmax(-1).cpu()
        return result

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str | torch.device = "cpu") -> "GPTClassifier":
        """Loads a classifier's folder (of a run: its best model), in eval mode, in float32.

        Raises:
            UserError: it is no classifier's, or something is missing, damaged or of another shape.
        """
        folder = resolve_model_folder(path)
        values = {} if is_adapter(folder) else read_json(folder / "config.json")
        if ARCHITECTURE not in (values.get("architectures") or []):
            raise UserError(f"{folder} is no classifier: make one of it with `fastgpt finetune classify`")
        model = cls(read_config(folder), _classes(values, folder))
        fill(model, read_weights(folder), folder)
        return model.to(device).eval()

    def save_pretrained(self, folder: str | Path, eos_token_id: int | None = None) -> None:
        """Writes config.json and model.safetensors as transformers' GPT2ForSequenceClassification reads them."""
        labels = self.classes.labels
        classes = {
            "architectures": [ARCHITECTURE],
            "pad_token_id": self.classes.pad_id,
            "id2label": {str(i): label for i, label in enumerate(labels)},
            "label2id": {label: i for i, label in enumerate(labels)},
            "problem_type": "single_label_classification",
            "classifier_pooling": self.classes.pooling,
        }
        save_pretrained(self, Path(folder), eos_token_id, classes)


def _classes(values: dict[str, Any], folder: Path) -> Classes:
    names, pad_id = values.get("id2label"), values.get("pad_token_id")
    if not isinstance(names, dict) or sorted(names) != sorted(str(i) for i in range(len(names))) or len(names) < 2:
        raise UserError(f"{folder / 'config.json'}: id2label names no classes 0, 1, ...: get the folder again")
    if not isinstance(pad_id, int):
        raise UserError(f"{folder / 'config.json'}: pad_token_id is {pad_id!r}, and a classifier needs one")
    pooling = values.get("classifier_pooling", "last")
    if pooling not in ("last", "mean"):
        raise UserError(
            f"{folder / 'config.json'}: classifier_pooling is {pooling!r}, only 'last' and 'mean' are known"
        )
    return Classes(tuple(str(names[str(i)]) for i in range(len(names))), pad_id, pooling)
