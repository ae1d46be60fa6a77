"""fastgpt finetune ..."""

from pathlib import Path

from fastgpt.cli import parse
from fastgpt.cli.train import option_value
from fastgpt.finetune.instruct import InstructConfig, finetune_instruct


def instruct(argv: list[str]) -> None:
    # A resumed run starts from its own config, so that only the options given here change it.
    out = option_value(argv, "--out")
    default = InstructConfig.load(Path(out)) if "--resume" in argv and out else None
    result = finetune_instruct(parse(InstructConfig, "finetune instruct", argv, default))
    if result.signal:
        raise SystemExit(128 + result.signal)
