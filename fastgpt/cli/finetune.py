"""fastgpt finetune ..."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from fastgpt.cli import parse
from fastgpt.cli.train import option_value
from fastgpt.finetune.config import FinetuneConfig
from fastgpt.finetune.instruct import InstructConfig, finetune_instruct
from fastgpt.finetune.prefer import PreferConfig, finetune_prefer
from fastgpt.train import TrainResult

Config = TypeVar("Config", bound=FinetuneConfig)


def instruct(argv: list[str]) -> None:
    _run(InstructConfig, finetune_instruct, argv)


def prefer(argv: list[str]) -> None:
    _run(PreferConfig, finetune_prefer, argv)


def _run(config: type[Config], finetune: Callable[[Config], TrainResult], argv: list[str]) -> None:
    # A resumed run starts from its own config, so that only the options given here change it.
    out = option_value(argv, "--out")
    default = config.load(Path(out)) if "--resume" in argv and out else None
    result = finetune(parse(config, config.command, argv, default))
    if result.signal:
        raise SystemExit(128 + result.signal)
