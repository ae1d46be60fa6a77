"""fastgpt classify"""

import json
import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from fastgpt.errors import UserError
from fastgpt.finetune.labelled import check_texts, lines, read_texts
from fastgpt.model.classifier import GPTClassifier
from fastgpt.model.hub import resolve_model_folder
from fastgpt.tokenizer import Tokenizer
from fastgpt.train import pick_device


def classify(
    texts: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    *,
    model: Path,
    input: Path | None = None,
    text_column: str | None = None,
    batch_size: int = 32,
    device: str = "auto",
) -> None:
    """Which class each text is of, with each class's probability.

    Texts given here make a table; those of a file or of standard input, one a line, a JSON line each.

    Args:
        texts: The texts; without any and without --input they are read from standard input.
        model: Folder of a classifier, or the run folder of `fastgpt finetune classify`.
        input: File of texts, one a line; or a .tsv, .csv or .jsonl table with a column of them. - is standard input.
        text_column: Name of that column, or its number from 1; found by its name if not given.
        batch_size: Texts in one forward pass.
        device: cpu, cuda, cuda:1, or auto.
    """
    if texts and input:
        raise UserError("give texts or --input, not both")
    if batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {batch_size}")
    folder = resolve_model_folder(model)
    classifier = GPTClassifier.from_pretrained(folder, pick_device(device))
    tokenizer = Tokenizer.from_pretrained(folder)
    labels = classifier.classes.labels
    if texts:
        read = check_texts(list(texts), "text")
    elif input is None or str(input) == "-":
        read = check_texts(lines(sys.stdin.read()), "standard input")
    else:
        read = read_texts(input, text_column)
    limit = classifier.config.n_positions
    ids = [encoded[:limit] for encoded in tokenizer.encode_batch([text.strip() for text in read])]
    probabilities = classifier.probabilities(ids, batch_size)
    if not texts:
        for text, row in zip(read, probabilities.tolist(), strict=True):
            rounded = {label: round(p, 6) for label, p in zip(labels, row, strict=True)}
            line = {"text": text, "label": labels[row.index(max(row))], "probabilities": rounded}
            print(json.dumps(line, ensure_ascii=False))
        return
    table = Table("text", "class", *labels)
    for text, row in zip(read, probabilities.tolist(), strict=True):
        table.add_row(text, labels[row.index(max(row))], *(f"{p:.2%}" for p in row))
    Console(highlight=False).print(table)
