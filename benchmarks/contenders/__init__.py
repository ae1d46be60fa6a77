"""What `fastgpt bench train` compares with: GPT-2 as others train it, in plain torch, by their published descriptions.

A contender is a function of a module here, named in CONTENDERS. It is called with the model's `GPTConfig`, the weights
to start from (a state dict of `fastgpt.GPT`), the device and the folder of a checkout of the real one, or None. What it
returns computes the same function of the same weights, so that the losses agree; its kernels, its optimizer's
implementation and the shape of its code are its own, as its users run it by default.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

CONTENDERS = {
    "nanogpt": ("nanogpt", "eager"),
    "nanogpt-compile": ("nanogpt", "compiled"),
    "transformers": ("transformers_gpt2", "eager"),
    "torch-compile": ("reference", "compiled"),
}
LR, WEIGHT_DECAY, BETAS, GRAD_CLIP = 6e-4, 0.1, (0.9, 0.95), 1.0  # nanoGPT's for GPT-2 124M; all take them


@dataclass
class Contender:
    """What is trained, how, and in one line what it is.

    Attributes:
        loss: of ids and targets, (B, T) int64 each: their mean cross-entropy.
        optimizer: its step follows a clip of the gradient's norm to GRAD_CLIP.
    """

    about: str
    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Optimizer

    def update(self) -> None:
        """From gradients to new weights."""
        nn.utils.clip_grad_norm_(self.model.parameters(), GRAD_CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def decayed(model: nn.Module) -> list[dict[str, object]]:
    """Groups of parameters as nanoGPT and we have them: matrices and embeddings decay, vectors do not."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
