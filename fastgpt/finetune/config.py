"""What every fine-tuning run has, and how its model comes and goes."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

from fastgpt.errors import UserError
from fastgpt.model import GPT
from fastgpt.model.adapter import load_adapter
from fastgpt.model.hub import is_adapter, resolve_model_folder
from fastgpt.model.lora import adapted_layers, apply_lora
from fastgpt.tokenizer import Tokenizer
from fastgpt.train import RunConfig, pick_device, pick_precision

Config = TypeVar("Config", bound="FinetuneConfig")


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
    patience: int | None = None
    """Stop after so many validations without a better one."""
    weight_decay: float = 0.01
    """Decoupled decay, on matrices only: not on biases or norms."""

    changeable: ClassVar[set[str]] = RunConfig.changeable | {"epochs", "patience"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, "lora_rank", "lora_alpha")
        self._at_least(1, "patience")
        self._share("lora_dropout")
        if not self.epochs > 0:
            raise UserError(f"--epochs must be above 0, got {self.epochs}")
        for name in ("model", "data"):
            if getattr(self, name) is None:
                raise UserError(f"--{name} is missing: name {'a model folder' if name == 'model' else 'a file'}")


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
        raise UserError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size:,} ids, the model {model.config.vocab_size:,}: "
            "put the tokenizer.json there that the model was trained with"
        )
    return model, tokenizer, folder


def adapt(model: GPT, config: FinetuneConfig, checkpoint: Path | None, quantize: Literal["nf4"] | None = None) -> None:
    """With --lora-rank, freezes the model and gives it the adapter that trains: a checkpoint's, or a new one.

    Args:
        quantize: "nf4" holds the weights beside the adapter in 4 bits.
    """
    if checkpoint is not None:
        load_adapter(model, checkpoint)
        for layer in adapted_layers(model).values() if quantize else ():
            layer.quantize()
    else:
        alpha = 2.0 * config.lora_rank if config.lora_alpha is None else config.lora_alpha
        apply_lora(model, config.lora_rank, alpha, dropout=config.lora_dropout, quantize=quantize)


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
