"""LoRA fine-tuning here against PEFT on transformers: time of a step, peak memory, and the loss that is reached.

    python benchmarks/lora.py                      # GPT-2 124M, rank 16, all linear layers, on this machine
    python benchmarks/lora.py --precision bf16 --out benchmarks/results

Both start from the same weights and the same adapter and see the same batches. Both clip the gradient's norm to 1 and
take AdamW's fused step; bf16 is autocast for both. Their steps are taken in turn in one process, in another order each
time, and the ratio is the median of the steps' ratios. Memory is measured in a process for each: on a CPU the peak of
resident memory, from before the model is loaded; on a GPU the peak that torch's allocator gave out.
"""

import contextlib
import json
import multiprocessing
import random
import statistics
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import peft
import torch
import transformers
import tyro
from rich.console import Console
from rich.table import Table

from fastgpt import GPT, GPTConfig
from fastgpt.bench.environment import Neighbours, environment, machine_name
from fastgpt.files import atomic_write
from fastgpt.model.adapter import load_adapter, save_adapter
from fastgpt.model.lora import apply_lora
from fastgpt.train import build_optimizer
from fastgpt.train.trainer import autocast

# transformers' own, of what it will remove; in the processes that are started too
warnings.filterwarnings("ignore", category=FutureWarning)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

OURS, PEFT = "fastgpt", "PEFT"
WARM_UP = 2  # steps that are not counted in the time
MEMORY_STEPS = 3  # the optimizer's state is there from the second on


@dataclass
class Options:
    """LoRA fine-tuning here against PEFT on transformers."""

    preset: str = "gpt2"
    batch_size: int = 4
    block_size: int = 256
    rank: int = 16
    precision: Literal["fp32", "bf16"] = "fp32"
    steps: int = 22
    """Of training; the first two are not timed."""
    lr: float = 1e-3
    device: Literal["auto", "cpu", "cuda"] = "auto"
    out: Path | None = None
    """Folder of results: writes OUT/MACHINE/lora_<preset>_<precision>.json."""


class Run:
    """One contender's model and optimizer, from the folders `base` and `adapter`."""

    def __init__(self, name: str, folder: Path, options: Options) -> None:
        self.device, self.precision, self.ours = torch.device(options.device), options.precision, name == OURS
        if self.ours:
            self.model = GPT.from_pretrained(folder / "base")
            load_adapter(self.model, folder / "adapter")
        else:
            base = transformers.GPT2LMHeadModel.from_pretrained(folder / "base")
            self.model = peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
        self.model.to(self.device).train()
        if self.ours:
            self.optimizer = build_optimizer(self.model, options.lr, weight_decay=0.0, grad_clip=1.0)
        else:
            self.trained = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizer = torch.optim.AdamW(
                self.trained, options.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
            )

    def step(self, ids: torch.Tensor) -> float:
        """One step on ids (B, T); its loss."""
        with autocast(self.device, self.precision):
            if self.ours:
                targets = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], 1)
                loss = self.model.loss(ids, targets)
            else:
                loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        if not self.ours:
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()  # waits for the GPU


def write_start(options: Options, folder: Path) -> None:
    """The weights and the adapter that both start from."""
    torch.manual_seed(0)
    config = GPTConfig.preset(options.preset)
    GPT(config).save_pretrained(folder / "base")
    model = GPT.from_pretrained(folder / "base")
    apply_lora(model, rank=options.rank, alpha=2 * options.rank)
    save_adapter(model, folder / "adapter", folder / "base")


def batches(options: Options) -> list[torch.Tensor]:
    """Text with something to learn in it: of 200 tokens, each is followed by one of two."""
    rng = random.Random(0)
    vocabulary = rng.sample(range(GPTConfig.preset(options.preset).vocab_size), 200)
    follows = {token: rng.sample(vocabulary, 2) for token in vocabulary}

    def text() -> list[int]:
        tokens = [rng.choice(vocabulary)]
        while len(tokens) < options.block_size:
            tokens.append(rng.choice(follows[tokens[-1]]))
        return tokens

    return [torch.tensor([text() for _ in range(options.batch_size)]) for _ in range(options.steps)]


def train_in_turn(options: Options, folder: Path) -> dict[str, dict[str, list[float]]]:
    """The losses and the seconds of each contender's steps."""
    runs = {name: Run(name, folder, options) for name in (OURS, PEFT)}
    found: dict[str, dict[str, list[float]]] = {name: {"losses": [], "seconds": []} for name in runs}
    for i, ids in enumerate(batches(options)):
        ids = ids.to(options.device)
        for name in list(runs)[:: 1 if i % 2 else -1]:
            start = time.perf_counter()
            found[name]["losses"].append(runs[name].step(ids))
            found[name]["seconds"].append(time.perf_counter() - start)
    return found


def peak_memory(name: str, folder: Path, options: Options) -> int | None:
    """Bytes; None where the system does not tell. To be called in a process of its own."""
    if options.device == "cpu":
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        except OSError:
            return None
        before = resident("VmRSS")
    run = Run(name, folder, options)
    for ids in batches(options)[:MEMORY_STEPS]:
        run.step(ids.to(options.device))
    return resident("VmHWM") - before if options.device == "cpu" else torch.cuda.max_memory_allocated()


def resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def in_new_process(name: str, folder: Path, options: Options) -> int | None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_memory, name, folder, options).result()


def main() -> None:
    options = tyro.cli(Options)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    console = Console(soft_wrap=True, highlight=False)
    with tempfile.TemporaryDirectory() as name, console.status("") as status:
        folder = Path(name)
        write_start(options, folder)
        peaks = {}
        for contender in (OURS, PEFT):
            status.update(f"memory of {contender}")
            peaks[contender] = in_new_process(contender, folder, options)
        status.update(f"{options.steps} steps of each, in turn")
        neighbours = Neighbours()
        found = train_in_turn(options, folder)
        others = neighbours.cores()
    seconds = {n: f["seconds"][WARM_UP:] for n, f in found.items()}
    time_ratio = statistics.median(a / b for a, b in zip(seconds[OURS], seconds[PEFT], strict=True))
    memory_ratio = None
    with contextlib.suppress(TypeError):
        memory_ratio = peaks[OURS] / peaks[PEFT]  # type: ignore[operator]
    final = {n: statistics.mean(f["losses"][-5:]) for n, f in found.items()}
    table = Table("", "ms per step", "tokens/s", "peak memory", "first loss", "loss of the last 5 steps")
    for contender in (OURS, PEFT):
        median = statistics.median(seconds[contender])
        peak = peaks[contender]
        table.add_row(
            contender,
            f"{median * 1e3:.1f}",
            f"{options.batch_size * options.block_size / median:,.0f}",
            "unknown" if peak is None else f"{peak / 2**20:,.0f} MiB",
            f"{found[contender]['losses'][0]:.4f}",
            f"{final[contender]:.4f}",
        )
    difference = final[OURS] - final[PEFT]
    table.add_row(
        "ratio",
        f"{time_ratio:.2f}",
        "",
        "" if memory_ratio is None else f"{memory_ratio:.2f}",
        "",
        f"{difference:+.4f}",
    )
    console.print(
        f"{options.preset}, rank {options.rank}, {options.batch_size} x {options.block_size} tokens, "
        f"{options.precision}, {options.device}"
    )
    console.print(table)
    if others is not None and others > 0.2:
        console.print(f"others took {others:.1f} cores meanwhile: measure again when the machine is quiet")
    if options.out is not None:
        path = options.out / machine_name(options.device) / f"lora_{options.preset}_{options.precision}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "options": {**asdict(options), "out": None},
            "environment": {**environment(options.device), "transformers": transformers.__version__},
            "cores_of_others": others,
            "time_ratio": time_ratio,
            "memory_ratio": memory_ratio,
            "contenders": {n: {**found[n], "peak_bytes": peaks[n], "final_loss": final[n]} for n in found},
        }
        atomic_write(path, json.dumps(result, indent=1) + "\n")
        console.print(f"saved {path}")


if __name__ == "__main__":
    main()
