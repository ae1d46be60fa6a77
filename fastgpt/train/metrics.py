"""What a run writes down while it goes: metrics.jsonl, log.txt, samples.jsonl, loss.png, and the progress bar."""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastgpt.errors import UserError
from fastgpt.files import atomic_write, explained
from fastgpt.train.plots import draw_run
from fastgpt.train.writers import Writer

# A picture takes up to a second, so one is drawn only when this many times as long has passed since the last.
DRAWN_EVERY = 20


class RunLog:
    """The run folder's files and the terminal, for one call of the trainer.

    A run ends where metrics.jsonl cannot be written: what is the best checkpoint is read from it, and a disk that is
    full now will not take the next checkpoint either. The other files only show what happened: the first failure of
    each is told, and the run goes on without it.

    Args:
        run: the run folder.
        first_step: the step that this call starts from; records of later steps, which a killed run wrote after its last
            checkpoint, are dropped, so that each step stands in metrics.jsonl once.
        max_steps: the last step, for the bar.
        loss_unit: of the loss, for the picture.
        writers: where the figures go too.
    """

    def __init__(
        self, run: Path, first_step: int, max_steps: int, loss_unit: str, writers: Sequence[Writer] = ()
    ) -> None:
        self.run, self.loss_unit, self.writers = run, loss_unit, writers
        self.metrics_path = run / "metrics.jsonl"
        self.records = _drop_later(self.metrics_path, first_step)
        with explained(self.metrics_path):
            self._metrics = self.metrics_path.open("a")
        self._failed: set[str] = set()
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
        if (run / "samples.jsonl").exists():
            self._try("samples.jsonl", lambda path: _drop_later(path, first_step))
        self._draw_from = self._printed + 5  # the first picture brings the import of matplotlib with it

    def __enter__(self) -> "RunLog":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        with suppress(OSError):  # a write that failed has been told already
            self._metrics.close()
        for writer in self.writers:
            writer.close()

    def say(self, line: str) -> None:
        """A line to the terminal and, with the time, to log.txt."""
        self.console.print(line, markup=False)
        self._append("log.txt", f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def record(self, **values: Any) -> None:
        """One line of metrics.jsonl.

        Raises:
            UserError: it could not be written.
        """
        self.records.append(values)
        with explained(self.metrics_path):
            self._metrics.write(json.dumps(values) + "\n")
            self._metrics.flush()
        self._val = values.get("val_loss", self._val)
        for writer in self.writers:
            writer.record(values)

    def sample(self, step: int, text: str) -> None:
        """What the model wrote at a validation, to the log on one line and to samples.jsonl."""
        self.say(f"step {step}: sample {text!r}")
        self._append("samples.jsonl", json.dumps({"step": step, "text": text}, ensure_ascii=False) + "\n")
        for writer in self.writers:
            writer.sample(step, text)

    def progress(self, step: int, loss: float, tokens_per_s: float, mfu: float | None = None) -> None:
        val = f"  val {self._val:.3f}" if self._val is not None else ""
        share = f"  MFU {mfu:.0%}" if mfu is not None else ""
        status = f"loss {loss:.3f}{val}  {tokens_per_s:,.0f} tokens/s{share}"
        self._bar.update(self._task, completed=step, status=status)
        # Where nobody sees a bar (a file, a pipe, a batch system's log), a line every ten seconds instead.
        if not self.console.is_terminal and time.monotonic() - self._printed >= 10:
            self._printed = time.monotonic()
            print(f"step {step}  {status}", file=sys.stdout, flush=True)

    def sync(self) -> None:
        """Puts metrics.jsonl on the disk: a checkpoint must not outlive, in a power failure, the records before it."""
        with explained(self.metrics_path):
            os.fsync(self._metrics.fileno())

    def draw(self, last: bool = False) -> None:
        """Draws loss.png anew, unless that would take more than a small part of the run's time; the `last` always."""
        start = time.monotonic()
        if last or start >= self._draw_from:
            self._try("loss.png", lambda path: draw_run(self.records, path, self.loss_unit))
            end = time.monotonic()
            self._draw_from = end + DRAWN_EVERY * (end - start)

    def _append(self, name: str, text: str) -> None:
        def append(path: Path) -> None:
            with path.open("a", encoding="utf-8") as file:
                file.write(text)

        self._try(name, append)

    def _try(self, name: str, write: Callable[[Path], object]) -> None:
        """Writes a file of the run that it can go on without."""
        try:
            with explained(self.run / name):
                write(self.run / name)
        except UserError as error:
            if name not in self._failed:
                self._failed.add(name)
                self.say(f"warning: {error}; the run goes on without it")


class QuietLog(RunLog):
    """That of a rank which writes nothing: the records alone, by which all ranks decide alike."""

    def __init__(self) -> None:
        self.records = []

    def __enter__(self) -> "QuietLog":
        return self

    def __exit__(self, *_: object) -> None: ...

    def say(self, line: str) -> None: ...

    def record(self, **values: Any) -> None:
        self.records.append(values)

    def sample(self, step: int, text: str) -> None: ...

    def progress(self, step: int, loss: float, tokens_per_s: float, mfu: float | None = None) -> None: ...

    def sync(self) -> None: ...

    def draw(self, last: bool = False) -> None: ...


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl or samples.jsonl; a last line cut short by a kill is left out."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                records.append(json.loads(line))
            except ValueError:
                break
    return records


def _drop_later(path: Path, step: int) -> list[dict[str, Any]]:
    """Rewrites a file of records without those of steps after `step`; returns what is left."""
    records = [r for r in read_metrics(path) if r["step"] <= step]
    atomic_write(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    return records
