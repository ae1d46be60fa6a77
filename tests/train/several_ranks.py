"""What each rank of test_parallel.py does: torchrun several_ranks.py agree|die SHARDS OUT."""

import math
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch

from fastgpt import cli
from fastgpt.errors import UserError
from fastgpt.train import TrainConfig, Trainer, checkpoint, parallel, train
from fastgpt.train.pretrain import Pretraining

STEPS = 8
# Sixteen sequences in a step, and as many in the validation.
SHARED = {
    "preset": "micro",
    "block_size": 16,
    "grad_accum": 2,
    "max_steps": STEPS,
    "eval_interval": 4,
    "save_interval": 2,
    "keep": 10,
    "lr": 3e-3,
    "precision": "fp32",
    "device": "cpu",
    "sample_tokens": 0,
}
ONE = {**SHARED, "batch_size": 8, "eval_batches": 2}
TWO = {**SHARED, "batch_size": 4, "eval_batches": 4}
plain_step, plain_loss = Trainer.train_step, Pretraining.loss


def at_step(step: int, rank: int, act) -> None:
    """Has that rank `act` when it is about to launch that step."""

    def train_step(self):
        if self.step + 1 == step and parallel.rank() == rank:
            act()
        return plain_step(self)

    Trainer.train_step = train_step


def bad_loss(self, batch):
    """Not a number on rank 1, the third time."""
    self.calls = getattr(self, "calls", 0) + 1
    return plain_loss(self, batch) * (math.nan if parallel.rank() == 1 and self.calls == 3 else 1)


def agree(shards: Path, out: Path) -> None:
    def run(name: str, **changes) -> None:
        train(TrainConfig(data=shards, out=out / name, **{**TWO, **changes}))

    def resume(name: str, **changes) -> None:
        train(replace(TrainConfig.load(out / name), out=out / name, resume=True, **changes))

    with parallel.ranks(None, torch.device("cpu")):
        run("ddp")
        run("fsdp", parallel="fsdp")
        resume("one-cut", parallel="fsdp", batch_size=4, eval_batches=4)
        for mode in ("ddp", "fsdp"):
            # With dropout, so that each rank's random state counts. What is resumed from was written while the training
            # went on and changed what it was written from.
            run(f"{mode}-whole", parallel=mode, dropout=0.1)
            at_step(7, 1, lambda: signal.raise_signal(signal.SIGTERM))
            run(f"{mode}-cut", parallel=mode, dropout=0.1)
            Trainer.train_step = plain_step
            if parallel.is_main():
                assert list(checkpoint.steps(out / f"{mode}-cut"))[-1] == 7
                shutil.rmtree(out / f"{mode}-cut" / "checkpoints" / "step_7")
            torch.distributed.barrier()
            resume(f"{mode}-cut", parallel=mode)
        run("recompute", parallel="fsdp", recompute=True)
        run("bf16", parallel="fsdp", precision="bf16")
        Pretraining.loss = bad_loss
        run("nan", skip_nan=True)


def die(shards: Path, out: Path) -> None:
    """Rank 1 is killed, then it has an error, then all goes well."""

    def refuse():
        raise UserError("rank 1 cannot go on: try again")

    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if attempt < 2:
        at_step((5, 7)[attempt], 1, (lambda: os.kill(os.getpid(), signal.SIGKILL), refuse)[attempt])
    given = {**TWO, "data": shards, "out": out / "killed", "parallel": "ddp"}
    options = [part for k, v in given.items() for part in ("--" + k.replace("_", "-"), str(v))]
    sys.argv = ["fastgpt", "train", *options]
    cli.main()


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"agree": agree, "die": die}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
