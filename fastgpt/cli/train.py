"""fastgpt train"""

from pathlib import Path
from typing import TypeVar

from fastgpt import train as training
from fastgpt.cli import parse
from fastgpt.train import RunConfig, TrainConfig, TrainResult

Config = TypeVar("Config", bound=RunConfig)


def train(argv: list[str]) -> None:
    exit_as(training.train(parse_run(TrainConfig, argv)))


def exit_as(result: TrainResult) -> None:
    """Exits as the signal that stopped the run would have it; does nothing if none did."""
    if result.signal:
        raise SystemExit(128 + result.signal)


def parse_run(config: type[Config], argv: list[str]) -> Config:
    """The config by a command line; a resumed run's starts from its own, so that only what is given changes, and a
    new one's from that of `--config`."""
    default = None
    if start := _value(argv, "--out" if "--resume" in argv else "--config"):
        default = config.load(Path(start))
    return parse(config, config.command, argv, default)


def _value(argv: list[str], option: str) -> str | None:
    for i, arg in enumerate(argv):
        if arg == option and i + 1 < len(argv):
            return argv[i + 1]
        if arg.startswith(option + "="):
            return arg.split("=", 1)[1]
    return None
