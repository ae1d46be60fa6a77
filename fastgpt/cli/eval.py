"""fastgpt eval"""

from rich.console import Console

from fastgpt import evaluate as evaluation
from fastgpt.cli import parse
from fastgpt.cli.progress import counter


def evaluate(argv: list[str]) -> None:
    config = parse(evaluation.EvalConfig, "eval", argv)
    console = Console(highlight=False, soft_wrap=True)
    with counter(console, "evaluating", "texts") as count:
        evaluation.evaluate(config, lambda line: console.print(line, markup=False), count)
