"""Measures training against others: `fastgpt bench train`. train_process.py is one contender, train_report.py shows.

Each contender trains in a process of its own, all from the same weights on the same batches, and they make their steps
in turn, in another order each round. A ratio is the median of the rounds' ratios. That all do the same work is seen by
their losses, which agree.
"""

import contextlib
import multiprocessing
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from fastgpt.bench.environment import Neighbours, environment, machine_name
from fastgpt.bench.measure import BUSY
from fastgpt.bench.train_process import OURS, Job, contender_names, serve
from fastgpt.cpus import cpus
from fastgpt.errors import UserError
from fastgpt.model import GPTConfig
from fastgpt.train.speed import data_sheet_flops, matmul_flops
from fastgpt.train.trainer import pick_device, pick_precision

TURN = 1.0  # seconds, about, that the slowest contender's steps of a turn take; at least one step
# How far losses may be apart in the first steps, in nats; later, rounding makes any two runs part.
LOSSES_AGREE = {"fp32": 5e-3, "bf16": 5e-2}
AGREEING_STEPS = 20


@dataclass
class Trained:
    """One contender. `ratio` is the median over rounds of its time over fastgpt's, `ratios` least and greatest."""

    name: str
    about: str = ""
    failed: str | None = None
    seconds: list[float] = field(default_factory=list)  # of a step, one a round
    losses: list[float] = field(default_factory=list)  # of all steps from the first, warm-up included
    tokens_per_s: float = 0.0
    ratio: float | None = None
    ratios: tuple[float, float] | None = None
    mfu: float = 0.0
    mfu_data_sheet: float | None = None
    peak_bytes: int | None = None
    memory_ratio: float | None = None  # fastgpt's peak over its


@dataclass
class TrainBench:
    """All about one model and batch on one device."""

    device: str
    machine: str
    precision: str
    model: dict[str, Any]
    parameters: int
    batch_size: int
    block_size: int
    environment: dict[str, str | int]
    matmul_flops: float
    matmul: str
    notes: list[str]
    contenders: list[Trained]
    shares: dict[str, float]


class Contestant:
    """The parent's end of a contender's process."""

    def __init__(self, name: str, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        self.result = Trained(name)
        self.pipe: Connection
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(name, job, other), daemon=True)
        self.process.start()
        other.close()  # ours alone: so that its death ends our wait
        about = self._answer()
        if about is not None:
            self.result.about, self.result.losses = about["about"], about["losses"]
            self.step_seconds: float = about["seconds"]

    def ask(self, method: str, argument: int = 0) -> Any:
        """What the method of its `Worker` returns; None, with `result.failed` set, if it failed."""
        with contextlib.suppress(OSError):  # it is dead: reading says so
            self.pipe.send((method, argument))
        return self._answer()

    def _answer(self) -> Any:
        try:
            kind, value = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            kind, value = (
                "failed",
                f"its process ended with code {self.process.exitcode} (-9: killed, for want of memory)",
            )
        if kind == "ok":
            return value
        self.result.failed = value
        return None

    def stop(self) -> None:
        self.pipe.close()
        self.process.join(10)
        self.process.kill()
        self.process.join()


@contextlib.contextmanager
def _contestants(names: list[str], job: Job, say: Callable[[str], None]) -> Iterator[list[Contestant]]:
    started: list[Contestant] = []
    try:
        for name in names:
            say(f"{name}: builds its model, and its first steps")
            started.append(Contestant(name, job))
        yield started
    finally:
        for contestant in started:
            contestant.stop()


def check_contenders(names: Sequence[str], checkout: Path | None) -> None:
    """Raises UserError unless they are there, a checkout's model too."""
    known = contender_names() if names else []
    for name in names:
        if name not in known:
            raise UserError(f"--vs {name} is no contender: take one or more of {', '.join(known)}")
    if checkout is not None and not (checkout / "model.py").is_file():
        raise UserError(
            f"--nanogpt-checkout {checkout} has no model.py: name a clone of https://github.com/karpathy/nanoGPT"
        )


def job_of(
    preset: str,
    sizes: dict[str, int | None],
    batch_size: int,
    block_size: int,
    device: str,
    precision: str,
    checkout: Path | None,
) -> Job:
    """What the options of `fastgpt bench train` ask for.

    Raises:
        UserError: there is no such preset, model or device.
    """
    for name, value in (("--batch-size", batch_size), ("--block-size", block_size)):
        if value < 1:
            raise UserError(f"{name} {value} is no size: take at least 1")
    where = pick_device(device)
    try:
        config = GPTConfig.preset(preset, **{name: size for name, size in sizes.items() if size is not None})
    except ValueError as error:
        raise UserError(f"the model cannot be built: {error}") from None
    config = replace(config, n_positions=max(config.n_positions, block_size))
    chosen = pick_precision(precision, where, batch_size * block_size, config.n_embd)
    return Job(config, batch_size, block_size, where.type, chosen, torch.get_num_threads(), checkout)


def measure(
    job: Job, others: list[str], rounds: int, machine: str | None, profile: bool, say: Callable[[str], None]
) -> TrainBench:
    """Trains fastgpt and the others in turn; `say` is told what is being done.

    Args:
        others: contenders of benchmarks/contenders; one that fails is in the result with the reason.
        machine: a name for the machine; derived from the device if None.

    Raises:
        UserError: fastgpt itself failed.
    """
    device = torch.device(job.device)
    rates, neighbours = [], Neighbours()
    with _contestants([OURS, *others], job, say) as all_of_them:
        running = [c for c in all_of_them if c.result.failed is None]
        if all_of_them[0] not in running:
            raise UserError(f"fastgpt's own steps failed: {all_of_them[0].result.failed}")
        steps = max(1, round(TURN / max(c.step_seconds for c in running)))
        order = random.Random(0)
        for i in range(rounds):
            say(f"round {i + 1} of {rounds}, {steps} steps of each")
            rates.append(matmul_flops(device, job.precision))
            for contestant in order.sample(running, len(running)):
                if (made := contestant.ask("steps", steps)) is not None:
                    contestant.result.losses += made["losses"]
                    contestant.result.seconds.append(made["seconds"])
            running = [c for c in running if c.result.failed is None]
        for contestant in running:
            contestant.result.peak_bytes = contestant.ask("peak")
        shares = all_of_them[0].ask("profile") if profile else {}
        results = [c.result for c in all_of_them]
    taken = neighbours.cores() or 0.0  # now that they have ended, the contenders' own time counts as ours
    rate = statistics.median(rate for rate, _ in rates)
    _compare(results, job, rate)
    return TrainBench(
        device=job.device,
        machine=machine or machine_name(job.device),
        precision=job.precision,
        model=asdict(job.config),
        parameters=job.config.num_parameters(),
        batch_size=job.batch_size,
        block_size=job.block_size,
        environment={**environment(job.device), "threads": job.threads},
        matmul_flops=rate,
        matmul=rates[0][1],
        notes=_notes(results, job.precision, taken),
        contenders=results,
        shares=shares,
    )


def _compare(results: list[Trained], job: Job, rate: float) -> None:
    ours = results[0]
    flops = job.config.flops_per_token(job.block_size)
    sheet = data_sheet_flops(torch.device(job.device), job.precision)
    for result in results:
        if result.failed is not None or not result.seconds:
            continue
        result.tokens_per_s = job.batch_size * job.block_size / statistics.median(result.seconds)
        result.mfu = result.tokens_per_s * flops / rate
        result.mfu_data_sheet = result.tokens_per_s * flops / sheet[0] if sheet else None
        ratios = [a / b for a, b in zip(result.seconds, ours.seconds, strict=True)]
        result.ratio, result.ratios = statistics.median(ratios), (min(ratios), max(ratios))
        if ours.peak_bytes and result.peak_bytes:
            result.memory_ratio = ours.peak_bytes / result.peak_bytes


def _notes(results: list[Trained], precision: str, taken: float) -> list[str]:
    """What makes figures doubtful: a contender whose losses are not ours does not do the same work."""
    lines = []
    if taken > BUSY * cpus():
        lines.append(
            f"busy machine: others took {taken:.1f} of {cpus()} cores meanwhile; measure again when it is idle"
        )
    for other in results[1:]:
        if other.failed is None:
            pairs = zip(results[0].losses[:AGREEING_STEPS], other.losses, strict=False)
            furthest = max(abs(a - b) for a, b in pairs)
            if not furthest <= LOSSES_AGREE[precision]:
                lines.append(
                    f"{other.name}: its losses differ from fastgpt's, by up to {furthest:.4f}: not the same work"
                )
    return lines


def grown(
    job: Job, others: list[str], rounds: int, machine: str | None, say: Callable[[str], None]
) -> dict[str, list[TrainBench]]:
    """The same for longer sequences, wider and deeper models: "T", "width" and "depth" -> results, in that order."""
    config, head = job.config, job.config.n_embd // job.config.n_head
    jobs: dict[str, list[Job]] = {"T": [], "width": [], "depth": []}
    for factor in (0.25, 0.5, 1, 2, 4):
        length = max(1, round(job.block_size * factor))
        longer = replace(config, n_positions=max(config.n_positions, length))
        jobs["T"].append(replace(job, block_size=length, config=longer))
    for factor in (0.25, 0.5, 1, 1.5):
        heads = max(1, round(config.n_head * factor))
        jobs["width"].append(replace(job, config=replace(config, n_head=heads, n_embd=heads * head)))
    for factor in (0.25, 0.5, 1, 1.5):
        jobs["depth"].append(replace(job, config=replace(config, n_layer=max(1, round(config.n_layer * factor)))))
    found: dict[str, list[TrainBench]] = {}
    for axis, list_of_jobs in jobs.items():
        found[axis] = []
        for i, one in enumerate(dict.fromkeys(list_of_jobs)):
            tell = _prefixed(say, f"{axis}, {i + 1} of {len(list_of_jobs)}: ")
            found[axis].append(measure(one, others, rounds, machine, False, tell))
    return found


def _prefixed(say: Callable[[str], None], prefix: str) -> Callable[[str], None]:
    return lambda text: say(prefix + text)
