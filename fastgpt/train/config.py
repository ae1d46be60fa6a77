"""All that a run is made from, in one place: the command line is made from it and the run folder keeps it."""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from fastgpt.errors import UserError
from fastgpt.train.optimizer import OptimizerName
from fastgpt.train.schedule import Schedule

Config = TypeVar("Config", bound="RunConfig")


@dataclass
class RunConfig:
    """What every run has, whatever it trains."""

    out: Path
    """Run folder to write: config.json, metrics.jsonl, log.txt, loss.png, checkpoints/step_<n>/."""
    resume: bool = False
    """Go on with the run in --out from its newest checkpoint, to the same losses as if it had never stopped."""
    config: Path | None = None
    """On the command line: start a new run from the config of this one, a run folder or a config.json; other options
    change it."""

    batch_size: int = 16
    """Sequences in one forward pass."""
    grad_accum: int = 1
    """Forward passes in one optimizer step."""
    max_steps: int | None = None
    """Optimizer steps of the whole run."""
    lr: float | None = None
    """Peak learning rate."""
    min_lr: float | None = None
    """Learning rate at the end; if not given, a tenth of --lr for the cosine and 0 for the other schedules."""
    schedule: Schedule = "cosine"
    """After the warm-up: cosine falls to --min-lr over the whole run, linear too, and wsd stays at --lr and falls only
    over the last --decay-steps, so that a longer --max-steps can be decided on until then."""
    decay_steps: int | None = None
    """Steps over which --schedule wsd falls at the end of the run, as 1 - sqrt; a fifth of --max-steps if not given."""
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
    save_interval: int = 500
    """Steps between checkpoints; one is written at the end and on Ctrl-C or SIGTERM too."""
    keep: int = 2
    """How many checkpoints to keep, the newest ones."""
    skip_nan: bool = False
    """Step over steps whose loss or gradient is not finite, up to ten in a row; without it the run stops there."""
    tensorboard: bool = False
    """Write the figures for TensorBoard too, into tensorboard/ in --out."""
    wandb: str | None = None
    """Send the figures to this project of Weights & Biases too."""
    seed: int = 0
    """Of all that is drawn: weights, order and division of the data, dropout."""
    device: str = "auto"
    """cpu, cuda, cuda:1, or auto: a GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 is autocast; auto measures which of the two is faster here for this model."""
    recompute: bool = False
    """Keep only the input of each block for the backward pass, which makes the rest again: a third more work, and
    memory for many more tokens in a batch. The losses are the same."""

    command: ClassVar[str] = ""  # what makes and resumes such a run
    of_a_call: ClassVar[set[str]] = {"resume", "config", "parallel"}
    # What may differ between the calls of one run: it changes nothing of the steps that were made already.
    changeable: ClassVar[set[str]] = {
        *("out", "resume", "config", "device", "max_steps", "eval_interval", "save_interval", "keep"),
        *("decay_steps", "recompute", "skip_nan", "tensorboard", "wandb"),
    }

    def __post_init__(self) -> None:
        for f in fields(self):  # as config.json has them
            value = getattr(self, f.name)
            if "Path" in str(f.type) and value is not None:
                setattr(self, f.name, Path(value))
        self._at_least(1, "batch_size", "grad_accum", "max_steps", "eval_interval", "save_interval", "keep")
        self._at_least(0, "lr", "weight_decay", "grad_clip", "min_lr", "warmup_steps", "decay_steps")
        self._share("beta1", "beta2")

    def _at_least(self, least: float, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise UserError(f"{option(name)} must be at least {least}, got {value}")

    def _share(self, *names: str) -> None:
        for name in names:
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{option(name)} must be at least 0 and below 1, got {getattr(self, name)}")

    def to_json(self) -> dict[str, Any]:
        """As the run folder keeps it; `load` reads it back. What is of a call, not of the run, is left out."""
        values = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items() if k not in self.of_a_call}
        return {"command": self.command, **values}

    @classmethod
    def load(cls: type[Config], run: Path) -> Config:
        """The config of a run folder, or in a config.json.

        Raises:
            UserError: there is none, it is damaged, or another command made the run.
        """
        path = Path(run) if Path(run).is_file() else Path(run) / "config.json"
        try:
            values = json.loads(path.read_text())
            command = values.get("command", cls.command)
            if command == cls.command:
                return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})
        except FileNotFoundError:
            raise UserError(f"{run} holds no run (no config.json): leave --resume out to start one there") from None
        except (ValueError, TypeError, AttributeError):
            raise UserError(f"{path} is damaged: it is no run's config; restore it or start a new run") from None
        raise UserError(f"{run} is a run of `fastgpt {command}`, not of `fastgpt {cls.command}`: resume it with that")


@dataclass
class TrainConfig(RunConfig):
    """Train a GPT on token shards, or resume a run."""

    data: Path | None = None
    """Folder of token shards that `fastgpt data prepare` wrote."""
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
    document_masks: bool = False
    """Let no token see another document: each begins anew, at position 0, with the end-of-text that is before it."""
    dropout: float = 0.0
    """Dropout on embeddings, attention and residuals."""
    init_from: Path | None = None
    """Start from this model folder's weights, not from random ones; it decides the model's size."""
    max_steps: int = 1000
    """Optimizer steps of the whole run."""
    lr: float = 1e-3
    """Peak learning rate."""
    optimizer: OptimizerName = "adamw"
    """adamw, or muon: orthogonalized momentum for the matrices inside of the blocks, AdamW for the rest, by one --lr.
    Muon often needs fewer steps; it pays where a step has many tokens, several thousand for each matrix row."""
    mup: bool = False
    """Scale initial weights and learning rates with the width (muP), so that the best --lr of a small model is the best
    of a wide one."""
    mup_base_width: int = 256
    """The width (n_embd) at which --mup changes nothing, the one that --lr was found at."""
    precision: Literal["auto", "fp32", "bf16", "bf16-weights"] = "auto"  # type: ignore[assignment]
    """bf16 is autocast; auto measures which of fp32 and bf16 is faster here for this model; bf16-weights keeps the
    weights in bf16 too, with fp32 masters in the optimizer, which the checkpoints are written from."""
    compile: bool = False
    """Compile the loss with torch.compile, which needs a C++ compiler, on a GPU Triton, and a minute at the start."""
    minutes: float | None = None
    """Instead of --max-steps: as many steps as take this long here, which is measured first."""
    parallel: Literal["ddp", "fsdp"] | None = None
    """With torchrun, one process for each device: ddp keeps all of the model on each (taken if not given), fsdp a part.
    A step then takes --batch-size x --grad-accum sequences on every device."""
    eval_batches: int = 20
    """Validation batches in each validation loss, always the same ones."""
    sample_prompt: str = ""
    """What the model goes on with at each validation, in log.txt and samples.jsonl; a new text if not given."""
    sample_tokens: int = 60
    """How many tokens it writes then; 0 for none."""

    command: ClassVar[str] = "train"
    changeable: ClassVar[set[str]] = RunConfig.changeable | {
        *("data", "minutes", "eval_batches", "sample_prompt", "sample_tokens", "parallel"),
        *("batch_size", "grad_accum"),  # if a step stays as large: see check_step_size
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "eval_batches", "block_size", "mup_base_width")
        self._at_least(0, "minutes", "sample_tokens")
        self._share("dropout")
        if self.compile and self.parallel == "fsdp":
            raise UserError("--compile does not go with --parallel fsdp: take --parallel ddp, or leave it out")


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_same_run(saved: RunConfig, given: RunConfig) -> None:
    """Refuses to resume a run with a config that would make it another run."""
    for f in fields(given):
        was, now = getattr(saved, f.name), getattr(given, f.name)
        if was != now and f.name not in given.changeable:
            raise UserError(
                f"{option(f.name)} {now} differs from the run's own {was}: "
                f"leave it out to resume {given.out}, or start a new run with another --out"
            )


def check_step_size(saved: RunConfig, ranks_then: int, given: RunConfig, ranks: int) -> None:
    """Refuses to resume with another number of sequences in a step: how many ranks share them is free."""
    was, now = (c.batch_size * c.grad_accum * n for c, n in ((saved, ranks_then), (given, ranks)))
    if was != now:
        fits, rest = divmod(was, given.batch_size * ranks)
        take = f"--grad-accum {fits}" if fits and not rest else "another --batch-size or number of ranks"
        raise UserError(
            f"--batch-size {given.batch_size} x --grad-accum {given.grad_accum} x ranks {ranks} is {now} sequences in "
            f"a step, those of the run in {given.out} have {was}: take {take}"
        )


def as_restarted(given: Config) -> Config:
    """The config of a run that torchrun has started again by the same command: the run's own, to be resumed."""
    if not (given.out / "config.json").exists():
        return given
    saved = type(given).load(given.out)
    # What was left to be measured or found then is settled now.
    settled = {f.name: getattr(saved, f.name) for f in fields(given) if getattr(given, f.name) in (None, "auto")}
    check_same_run(saved, replace(given, **settled))
    now = {f.name: getattr(given, f.name) for f in fields(given) if f.name in given.of_a_call | {"out", "device"}}
    return replace(saved, **{**now, "resume": True})
