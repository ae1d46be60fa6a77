"""Kills a run with SIGKILL at random moments and goes on with it: python -m tests.train.killer SHARDS OUT SEED KILLS.

A process of its own: it imports all that training needs once, with one thread, and forks for each restart, which then
takes a tenth of a second. Writes OUT/whole, a run that nobody stops, and OUT/killed_<n>, which were killed on their
way; prints how many kills there were, and how many of them came in the middle of writing a checkpoint.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

torch.set_num_threads(1)

from fastgpt.train import TrainConfig, train, trainer  # noqa: E402
from fastgpt.train.plots import draw_run  # noqa: E402
from fastgpt.train.provenance import environment  # noqa: E402


def start(shards: Path, out: Path) -> int:
    """Trains, or goes on, in a child; returns its id."""
    if child := os.fork():
        return child
    code = 1
    try:
        terminal = os.open(out.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(terminal, 1)
        os.dup2(terminal, 2)
        config = TrainConfig(
            out=out,
            data=shards,
            resume=(out / "config.json").exists(),
            preset="micro",
            batch_size=2,
            grad_accum=2,
            block_size=32,
            dropout=0.1,
            max_steps=40,
            eval_interval=8,
            eval_batches=2,
            save_interval=2,
            sample_tokens=4,
            precision="fp32",
            device="cpu",
        )
        train(config)
        code = 0
    finally:
        os._exit(code)


def half_written(out: Path) -> bool:
    return any((out / "checkpoints").glob("step_*.tmp-*"))


def main(shards: Path, out: Path, seed: int, kills: int) -> None:
    draw_run([{"tokens": 1, "loss": 1.0}], out / "warm.png", "nats")
    environment(torch.device("cpu"))
    trainer.peak_flops = lambda *_: (1e12, "given")  # measuring it takes 0.2 s
    rng = random.Random(seed)
    began = time.monotonic()
    child = start(shards, out / "whole")
    assert os.waitpid(child, 0)[1] == 0, (out / "whole.txt").read_text()
    whole = time.monotonic() - began
    killed = midway = run = 0
    while True:
        folder = out / f"killed_{run}"
        child = start(shards, folder)
        if killed < kills:
            # At any moment of a quarter of a run, and every third time while a checkpoint is being written.
            end = time.monotonic() + rng.uniform(0, whole / 4)
            while time.monotonic() < end or (killed % 3 == 2 and not half_written(folder)):
                if os.waitpid(child, os.WNOHANG)[0]:
                    break
                time.sleep(0.0005)
            else:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                killed += 1
                midway += half_written(folder)
                continue
            # It had finished before: whether it failed is seen from what it has left.
        else:
            os.waitpid(child, 0)
        run += 1
        if killed == kills:
            break
    print(json.dumps({"kills": killed, "midway": midway, "runs": run}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
