"""What a run trains, as the trainer sees it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

from torch import Tensor, nn

Batch = TypeVar("Batch")


class Task(Generic[Batch]):
    """What a run trains: a model, where its batches come from, its loss, and how well it does.

    The trainer does the rest: steps, log, signals, checkpoints, resuming, and which checkpoint is the best.
    """

    model: nn.Module
    """On the device that it is trained on; what requires no gradient is frozen."""
    loss_unit: ClassVar[str] = "nats per token"
    best_by: ClassVar[tuple[str, Literal["min", "max"]] | None] = None
    """Which of `evaluate`'s figures says which checkpoint is the best, and which way; None: the last one is."""
    patience: int | None = None
    """After so many evaluations without a better one, the run ends."""
    flops_per_token: float | None = None
    """Of forward and backward; None where no share of the machine's peak is to be printed."""

    def next_batch(self) -> Batch:
        """The next one, on the CPU or already on the device."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends what runs beside the training, such as a thread that reads ahead; the run is over."""

    def loss(self, batch: Batch) -> Tensor:
        """The mean loss of a batch, over what `weight` counts; it runs under the run's autocast."""
        raise NotImplementedError

    def weight(self, batch: Batch) -> float:
        """How much of the step's mean a batch is, beside the others that are accumulated: its targets, or its rows."""
        return 1.0

    def tokens(self, batch: Batch) -> int:
        """How many tokens a forward pass of this batch reads."""
        raise NotImplementedError

    def rows(self, batch: Batch) -> list[dict[str, Any]]:
        """What the rows of a batch are and where they come from, as JSON, for the record of a step that went wrong."""
        return []

    def evaluate(self) -> dict[str, float]:
        """The validation figures; "val_loss" is one of them. The model is in eval mode, without gradients."""
        raise NotImplementedError

    def sample(self) -> str | None:
        """What the model writes as it is now, in eval mode, None for nothing; may touch no random state of the run."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs beside the model folder, the optimizer and torch's random states."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def optimizer_options(self) -> dict[str, Any]:
        """What `build_optimizer` takes beside what every run's config says; such a thing lies in the weights' names."""
        return {}

    def write_model(self, folder: Path) -> None:
        """The model and its tokenizer as a folder that others open."""
        raise NotImplementedError

    def snapshot(self) -> Callable[[Path], None]:
        """`write_model` of the model as it is now, for a call while the training goes on; all ranks ask for it."""
        raise NotImplementedError

    def describe(self) -> str:
        """The model in one line."""
        raise NotImplementedError

    def about(self) -> dict[str, Any]:
        """What config.json says of the run beside its config."""
        return {}
