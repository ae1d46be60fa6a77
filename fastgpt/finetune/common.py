"""What fine-tuning runs have in common: their options, and how the model comes and goes."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import nn

from fastgpt.errors import UserError
from fastgpt.model import GPT
from fastgpt.model.adapter import load_adapter, save_adapter
from fastgpt.model.hub import is_adapter, resolve_model_folder
from fastgpt.model.lora import apply_lora
from fastgpt.template import TEMPLATES
from fastgpt.tokenizer import Tokenizer
from fastgpt.train import RunConfig, Task, option, pick_device, pick_precision

Config = TypeVar("Config", bound="FinetuneConfig")
Batch = TypeVar("Batch")


@dataclass
class FinetuneConfig(RunConfig):
    model: Path | None = None
    """Model to start from: a model folder, a checkpoint, or a run folder."""
    data: Path | None = None
    """File of examples."""
    epochs: float = 3.0
    """How often each example is seen; --max-steps says it in steps instead."""
    lr: float | None = None
    """Peak learning rate; one that suits the model's width and what is trained if not given."""
    lora_rank: int = 0
    """Train low-rank adapters of this rank, and leave the model's own weights as they are; 0 trains the weights."""
    lora_alpha: float | None = None
    """The adapters' scaling is this over the rank; twice the rank if not given."""
    lora_dropout: float = 0.0
    """Dropout on the adapters' input."""
    use_rslora: bool = False
    """Scale the adapters by alpha over the root of their rank, which suits large ranks (rsLoRA)."""
    use_dora: bool = False
    """Learn the length of each row of the adapted weights apart from its direction (DoRA)."""
    quantize: Literal["nf4"] | None = None
    """Hold the weights that adapters are on in 4 bits while they train (QLoRA)."""
    patience: int | None = None
    """Stop after so many validations without a better one."""
    weight_decay: float = 0.01
    """Decoupled decay, on matrices only: not on biases or norms."""

    changeable: ClassVar[set[str]] = RunConfig.changeable | {"epochs", "patience"}
    adapters_by: ClassVar[str] = "with --lora-rank 16"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, "lora_rank", "lora_alpha")
        self._at_least(1, "patience")
        self._share("lora_dropout")
        adapter_options = ("use_rslora", "use_dora", "quantize")
        if not self.trains_adapters and (given := [name for name in adapter_options if getattr(self, name)]):
            raise UserError(f"{option(given[0])} is of adapters: train them {self.adapters_by}, or leave it out")
        if not self.epochs > 0:
            raise UserError(f"--epochs must be above 0, got {self.epochs}")
        for name in ("model", "data"):
            if getattr(self, name) is None:
                raise UserError(f"--{name} is missing: name {'a model folder' if name == 'model' else 'a file'}")

    @property
    def trains_adapters(self) -> bool:
        return self.lora_rank > 0


def load_base(config: FinetuneConfig) -> tuple[GPT, Tokenizer, Path]:
    """The model to start from, on the CPU, its tokenizer, and the folder they are in.

    Raises:
        UserError: it is none, or an adapter alone, or the tokenizer is not the model's.
    """
    assert config.model is not None
    folder = resolve_model_folder(config.model)
    if is_adapter(folder):
        raise UserError(f"{folder} is an adapter, not a whole model: `fastgpt merge` it into one first")
    tokenizer = Tokenizer.from_pretrained(folder)
    model = GPT.from_pretrained(folder)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise tokenizer.mismatch(model.config.vocab_size, folder)
    return model, tokenizer, folder


def adapt(model: nn.Module, config: FinetuneConfig, checkpoint: Path | None = None) -> None:
    """Freezes the model and gives it the adapter that trains: a checkpoint's, or a new one."""
    if checkpoint is not None:
        load_adapter(model, checkpoint, quantize=config.quantize)
        return
    alpha = 2.0 * config.lora_rank if config.lora_alpha is None else config.lora_alpha
    apply_lora(
        model,
        config.lora_rank,
        alpha,
        dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        quantize=config.quantize,
    )


def default_lr(width: int, trains_all: bool) -> float:
    """A tenth of what one pre-trains that width with, and ten times that for adapters or a part of the weights.

    5e-5 at GPT-2's width of 768, which is what it is usually fine-tuned with; narrower models take more.
    """
    return 5e-5 * 768 / width * (1 if trains_all else 10)


def settle(config: Config, examples: int, rows: int, width: int, trains_all: bool) -> Config:
    """The config with its steps, learning rate, validations and precision as numbers.

    Args:
        examples: of training, in an epoch; rows: tokens in a forward pass; width: of the model.
        trains_all: whether all weights are trained.
    """
    per_epoch = max(1, math.ceil(examples / (config.batch_size * config.grad_accum)))
    max_steps = config.max_steps or max(1, round(per_epoch * config.epochs))
    return replace(
        config,
        max_steps=max_steps,
        lr=config.lr if config.lr is not None else default_lr(width, trains_all),
        eval_interval=config.eval_interval or max(1, min(250, per_epoch // 2)),
        precision=pick_precision(config.precision, pick_device(config.device), rows, width),
    )


@dataclass
class DialogueConfig(FinetuneConfig):
    """What those on dialogues have."""

    val_fraction: float = 0.1
    """How much of --data is held out to validate on."""
    template: Literal["alpaca", "chatml", "tokenizer"] | None = None
    """How dialogues are written for the model; if not given, the tokenizer's own chat template, else alpaca."""
    block_size: int | None = None
    """Tokens of a row, at most the model's positions; all of them if not given."""
    batch_size: int = 4
    """Rows in one forward pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "block_size")
        if not 0 < self.val_fraction < 1:
            raise UserError(
                f"--val-fraction must be above 0 and below 1, got {self.val_fraction}: the best model is chosen by it"
            )


class DialogueTask(Task[Batch]):
    """A model that learns from dialogues, from `config.model` or from the checkpoint `latest`, and its tokenizer with
    the chat template. Dropout is off, but for the adapters'."""

    model: GPT
    best_by = ("val_loss", "min")

    def __init__(self, config: DialogueConfig, latest: tuple[int, Path] | None) -> None:
        self.device, self.patience = pick_device(config.device), config.patience
        torch.manual_seed(config.seed)
        # A checkpoint of all weights is a model itself; one of adapters needs its base.
        start = replace(config, model=latest[1]) if latest and not config.trains_adapters else config
        self.model, self.tokenizer, folder = load_base(start)
        self.model.set_dropout(0.0)
        self.base = folder if config.trains_adapters else None
        if self.base:
            adapt(self.model, config, latest[1] if latest else None)
        self.model.to(self.device)
        if self.tokenizer.eot_id is None:
            raise UserError(f"the tokenizer in {folder} has no end-of-text token, which a response would end with")
        self.tokenizer.chat_template = pick_template(self.tokenizer, config.template, folder)
        limit = self.model.config.n_positions
        self.block_size = config.block_size or limit
        if self.block_size > limit:
            raise UserError(f"--block-size {self.block_size} is more than the {limit} positions of {folder}")

    def write_model(self, folder: Path) -> None:
        if self.base:
            save_adapter(self.model, folder, self.base)
        else:
            self.model.save_pretrained(folder, self.tokenizer.eot_id)
        self.tokenizer.save_pretrained(folder)

    def about(self) -> dict[str, Any]:
        return {"tokenizer_hash": self.tokenizer.hash, "chat_template": self.tokenizer.chat_template}


def pick_template(tokenizer: Tokenizer, name: str | None, folder: Path) -> str:
    """The Jinja source of a `--template` option."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    if name == "tokenizer" and tokenizer.chat_template is None:
        raise UserError(f"the tokenizer in {folder} has no chat template: take --template alpaca or chatml")
    return tokenizer.chat_template or TEMPLATES["alpaca"]
