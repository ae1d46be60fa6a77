"""What a run writes down while it goes: metrics.jsonl, log.txt, loss.png, and the progress bar on the terminal."""

import json
import sys
import time
from itertools import accumulate
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastgpt.files import atomic_write


class RunLog:
    """The run folder's files and the terminal, for one call of the trainer.

    Args:
        run: the run folder.
        first_step: the step that this call starts from; records of later steps, which a killed run wrote after its last
            checkpoint, are dropped, so that each step stands in metrics.jsonl once.
        max_steps: the last step, for the bar.
        loss_unit: of the loss, for the picture.
    """

    def __init__(self, run: Path, first_step: int, max_steps: int, loss_unit: str) -> None:
        self.run, self.loss_unit = run, loss_unit
        self.metrics_path = run / "metrics.jsonl"
        self.records = [r for r in read_metrics(self.metrics_path) if r["step"] <= first_step]
        atomic_write(self.metrics_path, "".join(json.dumps(r) + "\n" for r in self.records))
        self._metrics = self.metrics_path.open("a")
        self._log = (run / "log.txt").open("a")
        self.console = Console(highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=max_steps, completed=first_step, status="")
        self._val = next((r["val_loss"] for r in reversed(self.records) if "val_loss" in r), None)
        self._printed = time.monotonic()

    def __enter__(self) -> "RunLog":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        self._metrics.close()
        self._log.close()

    def say(self, line: str) -> None:
        """A line to the terminal and, with the time, to log.txt."""
        self.console.print(line, markup=False)
        self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
        self._log.flush()

    def record(self, **values: Any) -> None:
        """One line of metrics.jsonl."""
        self.records.append(values)
        self._metrics.write(json.dumps(values) + "\n")
        self._metrics.flush()
        self._val = values.get("val_loss", self._val)

    def progress(self, step: int, loss: float, tokens_per_s: float) -> None:
        val = f"  val {self._val:.3f}" if self._val is not None else ""
        status = f"loss {loss:.3f}{val}  {tokens_per_s:,.0f} tokens/s"
        self._bar.update(self._task, completed=step, status=status)
        # Where nobody sees a bar (a file, a pipe, a batch system's log), a line every ten seconds instead.
        if not self.console.is_terminal and time.monotonic() - self._printed >= 10:
            self._printed = time.monotonic()
            print(f"step {step}  {status}", file=sys.stdout, flush=True)

    def draw(self) -> None:
        draw_loss(self.records, self.run / "loss.png", self.loss_unit)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line cut short by a kill is left out."""
    records = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
    return records


def draw_loss(records: list[dict[str, Any]], path: Path, loss_unit: str) -> None:
    """Training loss (each step faint, a running mean over it) and validation loss against tokens seen, as a PNG."""
    import io

    from matplotlib.figure import Figure

    train = [(r["tokens"], r["loss"]) for r in records if "loss" in r]
    val = [(r["tokens"], r["val_loss"]) for r in records if "val_loss" in r]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    if train:
        tokens, losses = zip(*train, strict=True)
        n, half = len(losses), len(losses) // 50
        sums = [0.0, *accumulate(losses)]
        ends = [(max(0, i - half), min(n, i + half + 1)) for i in range(n)]
        smooth = [(sums[b] - sums[a]) / (b - a) for a, b in ends]
        axes.plot(tokens, losses, color="#9ecae1", linewidth=0.8)
        axes.plot(tokens, smooth, color="#08519c", linewidth=1.5, label=f"training, {smooth[-1]:.3f} at the end")
    if val:
        tokens, losses = zip(*val, strict=True)
        axes.plot(tokens, losses, "o-", color="#d94801", markersize=4, label=f"validation, {losses[-1]:.3f} at the end")
    axes.set_xlabel("tokens seen")
    axes.set_ylabel(f"loss ({loss_unit})")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g}M" if x >= 1e6 else f"{x / 1e3:g}k" if x else "0")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if train or val:
        axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    atomic_write(path, buffer.getvalue())
