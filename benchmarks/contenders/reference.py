"""fastgpt's own model on the plain-torch references of its ops, under torch.compile: what its kernels must beat."""

from pathlib import Path

import torch
from torch import Tensor

from contenders import BETAS, LR, Contender, decayed
from fastgpt import GPT, GPTConfig, ops


def compiled(config: GPTConfig, weights: dict[str, Tensor], device: torch.device, checkout: Path | None) -> Contender:
    model = GPT(config)
    model.load_state_dict(weights)
    model.to(device)
    optimizer = torch.optim.AdamW(decayed(model), lr=LR, betas=BETAS, fused=True)
    run = torch.compile(model.loss)

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        with ops.using("reference"):
            return run(ids, targets)

    return Contender("fastgpt's references, compiled", model, loss, optimizer)
