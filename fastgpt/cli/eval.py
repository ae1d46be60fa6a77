"""fastgpt eval"""

from fastgpt import evaluate as evaluation
from fastgpt.cli import parse


def evaluate(argv: list[str]) -> None:
    evaluation.evaluate(parse(evaluation.EvalConfig, "eval", argv), say=print)
