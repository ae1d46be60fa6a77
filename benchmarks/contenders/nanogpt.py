"""GPT-2 as nanoGPT (github.com/karpathy/nanoGPT) trains it, written from its description: eager modules, torch's flash
attention, exact GELU, a tied classifier whose logits are made whole for F.cross_entropy, AdamW that is fused on CUDA
only; compiled whole by default.

Biases are there, as in GPT-2 and in nanoGPT's own GPT-2 files, though its default for training from scratch leaves them
out: without them it would be another model, and equal losses could not show that the work is the same. The vocabulary
of GPT-2 is padded to 50,304 as it does, and any other is not; the padding's zero rows add log(50,304 / 50,257) to the
loss, 0.0009.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contenders import BETAS, LR, Contender, decayed
from fastgpt import GPTConfig
from fastgpt.errors import UserError

PADDED = {50257: 50304}  # vocabularies


class CausalSelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.heads, -1).transpose(1, 2) for t in self.c_attn(x).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = CausalSelfAttention(width, heads), MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Model(nn.Module):
    def __init__(self, block_size: int, vocab_size: int, n_layer: int, n_head: int, n_embd: int) -> None:
        super().__init__()
        parts = {
            "wte": nn.Embedding(vocab_size, n_embd),
            "wpe": nn.Embedding(block_size, n_embd),
            "h": nn.ModuleList(Block(n_embd, n_head) for _ in range(n_layer)),
            "ln_f": nn.LayerNorm(n_embd),
        }
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.lm_head.weight = parts["wte"].weight

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        parts = self.transformer
        x = parts["wte"](ids) + parts["wpe"](torch.arange(ids.size(1), device=ids.device))
        for block in parts["h"]:
            x = block(x)
        logits = self.lm_head(parts["ln_f"](x))
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-1)


def _of_checkout(folder: Path) -> ModuleType:
    """The module model.py of a checkout."""
    path = folder / "model.py"
    if not path.is_file():
        raise UserError(f"--nanogpt-checkout {folder} has no model.py: name a clone of github.com/karpathy/nanoGPT")
    spec = importlib.util.spec_from_file_location("nanogpt_checkout", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


def eager(
    config: GPTConfig, weights: dict[str, Tensor], device: torch.device, checkout: Path | None, compiled: bool = False
) -> Contender:
    sizes = SimpleNamespace(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd)
    sizes.block_size, sizes.vocab_size = config.n_positions, PADDED.get(config.vocab_size, config.vocab_size)
    model: nn.Module
    if checkout is None:
        model = Model(**vars(sizes))
    else:
        real = _of_checkout(checkout)
        model = real.GPT(real.GPTConfig(**vars(sizes), dropout=0.0, bias=True))
    weights = {**weights, "transformer.wte.weight": weights["transformer.wte.weight"][: sizes.vocab_size]}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert missing in ([], ["lm_head.weight"]), missing
    assert not unexpected, unexpected
    model.to(device)
    optimizer = torch.optim.AdamW(
        decayed(model), lr=LR, betas=BETAS, **({"fused": True} if device.type == "cuda" else {})
    )
    run = torch.compile(model) if compiled else model
    source = "its own model.py" if checkout else "written from its description"
    return Contender(
        f"nanoGPT, {source}{', compiled' if compiled else ''}", model, lambda ids, y: run(ids, y)[1], optimizer
    )


def compiled(config: GPTConfig, weights: dict[str, Tensor], device: torch.device, checkout: Path | None) -> Contender:
    return eager(config, weights, device, checkout, compiled=True)
