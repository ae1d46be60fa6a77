"""fastgpt train"""

from pathlib import Path

from fastgpt import train as training
from fastgpt.cli import parse
from fastgpt.train import TrainConfig


def train(argv: list[str]) -> None:
    # A resumed run starts from its own config, so that only the options given here change it.
    default = None
    if "--resume" in argv and (out := option_value(argv, "--out")):
        default = TrainConfig.load(Path(out))
    result = training.train(parse(TrainConfig, "train", argv, default))
    if result.signal:
        raise SystemExit(128 + result.signal)


def option_value(argv: list[str], option: str) -> str | None:
    for i, arg in enumerate(argv):
        if arg == option and i + 1 < len(argv):
            return argv[i + 1]
        if arg.startswith(option + "="):
            return arg.split("=", 1)[1]
    return None
