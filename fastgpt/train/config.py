"""All that a training run is made from, in one place: the command line is made from it and the run folder keeps it."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from fastgpt.errors import UserError


@dataclass
class TrainConfig:
    """Train a GPT on token shards, or resume a run."""

    out: Path
    """Run folder to write: config.json, metrics.jsonl, log.txt, loss.png, checkpoints/step_<n>/."""
    data: Path | None = None
    """Folder of token shards that `fastgpt data prepare` wrote."""
    resume: bool = False
    """Go on with the run in --out from its newest checkpoint, to the same losses as if it had never stopped."""

    preset: str = "mini"
    """Model size: micro, mini, nano, gpt2, gpt2-medium, gpt2-large, gpt2-xl."""
    n_layer: int | None = None
    """Blocks, instead of the preset's."""
    n_head: int | None = None
    """Attention heads, instead of the preset's."""
    n_embd: int | None = None
    """Width, instead of the preset's."""
    block_size: int | None = None
    """Tokens in a training sequence; also the model's n_positions, unless it starts from --init-from."""
    dropout: float = 0.0
    """Dropout on embeddings, attention and residuals."""
    init_from: Path | None = None
    """Start from this model folder's weights, not from random ones; it decides the model's size."""

    batch_size: int = 16
    """Sequences in one forward pass."""
    grad_accum: int = 1
    """Forward passes in one optimizer step."""
    max_steps: int = 1000
    """Optimizer steps of the whole run."""
    minutes: float | None = None
    """Instead of --max-steps: as many steps as take this long here, which is measured first."""
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float | None = None
    """Learning rate at the end of the cosine; a tenth of --lr if not given."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; a fifth of --max-steps, at most 500, if not given: short runs need that much."""
    weight_decay: float = 0.1
    """Decoupled decay, on matrices only: not on biases or norms."""
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    """Largest norm of the whole gradient; 0 turns clipping off."""

    eval_interval: int | None = None
    """Steps between validation losses, one is taken at the start and the end too; an eighth of the run, at most 250, if
    not given."""
    eval_batches: int = 20
    """Validation batches in each of them, always the same ones."""
    save_interval: int = 500
    """Steps between checkpoints; one is written at the end and on Ctrl-C or SIGTERM too."""
    keep: int = 2
    """How many checkpoints to keep, the newest ones."""
    seed: int = 0
    """Of the weights, the order of the data, and dropout."""
    device: str = "auto"
    """cpu, cuda, cuda:1, or auto: a GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 is autocast; auto measures which of the two is faster here for this model."""

    def __post_init__(self) -> None:
        self.out = Path(self.out)
        self.data = None if self.data is None else Path(self.data)
        self.init_from = None if self.init_from is None else Path(self.init_from)
        positive = ("batch_size", "grad_accum", "max_steps", "eval_interval", "eval_batches", "save_interval", "keep")
        for name in positive:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{option(name)} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "weight_decay", "grad_clip", "min_lr", "warmup_steps", "minutes"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise UserError(f"{option(name)} must be at least 0, got {value}")
        for name in ("beta1", "beta2", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{option(name)} must be at least 0 and below 1, got {getattr(self, name)}")
        if self.block_size is not None and self.block_size < 1:
            raise UserError(f"--block-size must be at least 1, got {self.block_size}")

    def to_json(self) -> dict[str, Any]:
        """As the run folder keeps it; `load` reads it back. `resume` is of a call, not of a run."""
        values = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}
        del values["resume"]
        return values

    @classmethod
    def load(cls, run: Path) -> "TrainConfig":
        """The config of a run folder."""
        path = Path(run) / "config.json"
        try:
            values = json.loads(path.read_text())
            return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})
        except FileNotFoundError:
            raise UserError(f"{run} holds no run (no config.json): leave --resume out to start one there") from None
        except (ValueError, TypeError):
            raise UserError(f"{path} is damaged: it is no run's config; restore it or start a new run") from None


# What may differ between the calls of one run: it changes nothing of the steps that were made already.
CHANGEABLE = {
    "out",
    "data",
    "resume",
    "device",
    "max_steps",
    "minutes",
    "eval_interval",
    "eval_batches",
    "save_interval",
    "keep",
}


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_same_run(saved: TrainConfig, given: TrainConfig) -> None:
    """Refuses to resume a run with a config that would make it another run."""
    for f in fields(TrainConfig):
        was, now = getattr(saved, f.name), getattr(given, f.name)
        if was != now and f.name not in CHANGEABLE:
            raise UserError(
                f"{option(f.name)} {now} differs from the run's own {was}: "
                f"leave it out to resume {given.out}, or start a new run with another --out"
            )
