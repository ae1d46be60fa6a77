"""Pre-training: the trainer, its config, optimizer, schedule and checkpoints."""

from fastgpt.train.config import TrainConfig
from fastgpt.train.optimizer import AdamW, build_optimizer
from fastgpt.train.schedule import cosine_lr
from fastgpt.train.trainer import Trainer, TrainResult, autocast, pick_device, train, validation_loss

__all__ = [
    "AdamW",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "autocast",
    "build_optimizer",
    "cosine_lr",
    "pick_device",
    "train",
    "validation_loss",
]
