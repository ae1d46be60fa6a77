"""Training: the trainer, what every run is configured by, optimizer, schedule, checkpoints; and pre-training on it."""

from fastgpt.train.config import RunConfig, TrainConfig, option
from fastgpt.train.optimizer import AdamW, build_optimizer
from fastgpt.train.pretrain import train, validation_loss
from fastgpt.train.schedule import cosine_lr
from fastgpt.train.task import Task
from fastgpt.train.trainer import (
    Step,
    Trainer,
    TrainResult,
    autocast,
    explained_run,
    open_run,
    pick_device,
    pick_precision,
    publish_best,
)

__all__ = [
    "AdamW",
    "RunConfig",
    "Step",
    "Task",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "autocast",
    "build_optimizer",
    "cosine_lr",
    "explained_run",
    "open_run",
    "option",
    "pick_device",
    "pick_precision",
    "publish_best",
    "train",
    "validation_loss",
]
