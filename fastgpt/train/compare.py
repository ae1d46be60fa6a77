"""Runs beside one another: what each came to, and what their configs differ in."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from fastgpt.errors import UserError
from fastgpt.train.metrics import read_metrics
from fastgpt.train.plots import draw_comparison

# What config.json says that is no choice of the user's, or that the table has already.
_NOT_COMPARED = {"out", "parameters", "versions", "git", "examples", "chat_template", "data_tokens", "labels"}


@dataclass
class Run:
    """What a run folder says.

    Attributes:
        name: the folder's name, or its path where others have the same name.
        parameters: of the whole model; None where config.json does not say.
        val_loss, best_val_loss, tokens_per_s, mfu: None where metrics.jsonl has none. The last two are medians.
        seconds: of training, without validations and checkpoints.
        settings: of config.json, nested keys joined by dots.
    """

    name: str
    records: list[dict[str, Any]]
    settings: dict[str, Any]
    parameters: int | None
    steps: int
    tokens: int
    val_loss: float | None
    best_val_loss: float | None
    tokens_per_s: float | None
    mfu: float | None
    seconds: float


def read_run(folder: Path) -> Run:
    """Reads a run folder, also of a run that is still going.

    Raises:
        UserError: there is no run, or it has no step or validation yet.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        settings = _flat(config)
    except FileNotFoundError:
        raise UserError(f"{folder} holds no run (no config.json): name a folder that `fastgpt train` wrote") from None
    except (ValueError, AttributeError, OSError):
        raise UserError(f"{folder / 'config.json'} cannot be read: it is no run's config") from None
    records = read_metrics(folder / "metrics.jsonl")
    if not records:
        raise UserError(f"{folder / 'metrics.jsonl'} has no records yet: leave that run out")

    def column(name: str) -> list[Any]:
        return [r[name] for r in records if name in r]

    val, rates, mfu, seconds = (column(name) for name in ("val_loss", "tokens_per_s", "mfu", "seconds"))
    return Run(
        name=folder.resolve().name,
        records=records,
        settings=settings,
        parameters=config.get("parameters"),
        steps=records[-1]["step"],
        tokens=records[-1]["tokens"],
        val_loss=val[-1] if val else None,
        best_val_loss=min(val, default=None),
        tokens_per_s=median(rates) if rates else None,
        mfu=median(mfu) if mfu else None,
        seconds=max(seconds, default=0.0),
    )


def compare(folders: Sequence[Path], out: Path) -> tuple[list[Run], dict[str, list[Any]]]:
    """Reads runs and draws them into the picture `out`.

    Returns:
        The runs, and each setting that is not the same in all of them with its values, None where a run lacks it.

    Raises:
        UserError: there is none, as `read_run`, or `out` cannot be written.
    """
    if not folders:
        raise UserError("no run to compare: name run folders")
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        if names.count(run.name) > 1:
            run.name = str(folder)
    draw_comparison([(run.name, run.records) for run in runs], out, "nats")
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    values = {key: [run.settings.get(key) for run in runs] for key in keys}
    return runs, {key: row for key, row in values.items() if any(value != row[0] for value in row)}


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        if prefix or key not in _NOT_COMPARED:
            found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found
