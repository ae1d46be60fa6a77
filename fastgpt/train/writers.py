"""Where a run's figures can go beside its folder: TensorBoard and Weights & Biases."""

import json
import uuid
from pathlib import Path
from typing import Any, Protocol

from fastgpt.errors import UserError
from fastgpt.files import atomic_write
from fastgpt.train.config import RunConfig


class Writer(Protocol):
    def record(self, values: dict[str, Any]) -> None:
        """Takes one record of metrics.jsonl."""

    def sample(self, step: int, text: str) -> None:
        """Takes what the model wrote at a validation."""

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run folder's tensorboard/; `tensorboard --logdir runs` shows all runs beside one another."""

    def __init__(self, run: Path, first_step: int) -> None:
        # What a killed run wrote after its last checkpoint is dropped, as in metrics.jsonl.
        self._writer = _import_tensorboard().SummaryWriter(
            str(run / "tensorboard"), purge_step=first_step + 1 if first_step else None
        )

    def record(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if name != "step":
                self._writer.add_scalar(name, value, values["step"])

    def sample(self, step: int, text: str) -> None:
        self._writer.add_text("sample", f"```\n{text}\n```", step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of a Weights & Biases project, under the run folder's name; wandb_id in the folder says which it is."""

    def __init__(self, config: RunConfig) -> None:
        wandb = _import_wandb()
        path = config.out / "wandb_id"
        if not path.exists():
            atomic_write(path, uuid.uuid4().hex[:12] + "\n")
        settings = json.loads((config.out / "config.json").read_text())
        try:
            self._run = wandb.init(
                project=config.wandb,
                name=config.out.name,
                id=path.read_text().strip(),
                resume="allow",
                dir=str(config.out),
                config=settings,
            )
        except wandb.Error as error:
            raise UserError(f"--wandb {config.wandb}: {' '.join(str(error).split())}") from None
        self._html = wandb.Html

    def record(self, values: dict[str, Any]) -> None:
        # Steps that a killed run has sent already are the same ones again, and wandb leaves them out.
        self._run.log({k: v for k, v in values.items() if k != "step"}, step=values["step"])

    def sample(self, step: int, text: str) -> None:
        from html import escape

        self._run.log({"sample": self._html(f"<pre>{escape(text)}</pre>")}, step=step)

    def close(self) -> None:
        self._run.finish()


def check_writers(config: RunConfig) -> None:
    """Raises a UserError if a package that the config's writers need is missing."""
    if config.tensorboard:
        _import_tensorboard()
    if config.wandb:
        _import_wandb()


def open_writers(config: RunConfig, first_step: int) -> list[Writer]:
    """Those that the config asks for; the run folder has its config.json already.

    Raises:
        UserError: a package is missing, or Weights & Biases refuses.
    """
    writers: list[Writer] = []
    if config.tensorboard:
        writers.append(TensorBoard(config.out, first_step))
    if config.wandb:
        writers.append(WandB(config))
    return writers


def _import_tensorboard() -> Any:
    try:
        from torch.utils import tensorboard
    except ImportError:
        raise UserError("--tensorboard needs the package tensorboard: pip install 'fastgpt[tensorboard]'") from None
    return tensorboard


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb needs the package wandb: pip install 'fastgpt[wandb]'") from None
    return wandb
