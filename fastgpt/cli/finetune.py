"""fastgpt finetune ..."""

from rich.console import Console
from rich.table import Table

from fastgpt.cli.train import exit_as, parse_run
from fastgpt.finetune.classify import ClassifyConfig
from fastgpt.finetune.classify import classify as finetune_classify
from fastgpt.finetune.instruct import InstructConfig, finetune_instruct
from fastgpt.finetune.prefer import PreferConfig, finetune_prefer
from fastgpt.finetune.scores import Scores


def instruct(argv: list[str]) -> None:
    exit_as(finetune_instruct(parse_run(InstructConfig, argv)))


def prefer(argv: list[str]) -> None:
    exit_as(finetune_prefer(parse_run(PreferConfig, argv)))


def classify(argv: list[str]) -> None:
    config = parse_run(ClassifyConfig, argv)
    result = finetune_classify(config)
    exit_as(result.run)
    assert result.scores is not None
    print_scores(result.scores)
    print(f"pictures and figures in {config.out}/: confusion.png, test.json, test_predictions.jsonl")
    print(f'ask it with: fastgpt classify --model {config.out} "text"')


def print_scores(scores: Scores) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"test: {scores.count:,} texts, accuracy {scores.accuracy:.2%}, macro F1 {scores.macro_f1:.4f}, "
        f"calibration error {scores.calibration_error:.4f}, loss {scores.nll:.4f} nats per text"
    )
    table = Table("is \\ taken for", *scores.labels, "F1")
    for label, row, f1 in zip(scores.labels, scores.confusion, scores.f1, strict=True):
        table.add_row(label, *(f"{n:,}" for n in row), f"{f1:.4f}")
    console.print(table)
    table = Table("how sure it was", "texts", "was right", title="calibration", title_justify="left")
    for count, confidence, accuracy in scores.bins:
        table.add_row(f"{confidence:.1%}", f"{count:,}", f"{accuracy:.1%}")
    console.print(table)
