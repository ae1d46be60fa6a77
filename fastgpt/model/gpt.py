"""GPT-2 (Radford et al. 2019), on fastgpt's ops.

    x = wte[ids] + wpe[positions]
    for each block:  x = x + attention(ln_1(x));  x = x + mlp(ln_2(x))
    logits = ln_f(x) @ wte.T

Names are those of Hugging Face's GPT-2, so that a state dict's keys are the files' keys. Shapes: B sequences, T tokens,
C = n_embd, H heads of D = C / H, V = vocab_size.
"""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastgpt import ops
from fastgpt.model.config import GPTConfig
from fastgpt.model.fused_block import PARAMETERS, FusedBlock
from fastgpt.model.kv_cache import KVCache
from fastgpt.model.tied import TiedGradient
from fastgpt.ops import registry
from fastgpt.ops.attention_spans import check_boundaries


class LayerNorm(nn.Module):
    """`ops.layer_norm` with its two parameters."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """residual + x, and its norm."""
        if x.dtype != residual.dtype:  # under autocast x has 16 bits, and the residual stream keeps its 32
            total = residual + x
            return total, self(total)
        return ops.add_layer_norm(x, residual, self.weight, self.bias, self.eps)


class Linear(nn.Linear):
    """torch's, whose bias can be left to the op that follows."""

    def without_bias(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)
        self.attn_pdrop = config.attn_pdrop
        self.n_head = config.n_head
        self.layer = layer

    def forward(self, x: Tensor, cache: KVCache | None, cu_seqlens: Tensor | None) -> Tensor:
        B, T, C = x.shape
        q, k, v = ops.split_heads(self.c_attn(x), self.n_head)  # (B, H, T, D) each, views of one tensor
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        dropout = self.attn_pdrop if self.training else 0.0
        y = ops.attention(q, k, v, dropout_p=dropout, cu_seqlens=cu_seqlens)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.c_fc.without_bias(x)
        return self.dropout(self.c_proj(ops.bias_gelu(hidden, self.c_fc.bias.to(hidden.dtype))))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, residual: Tensor | None, cache: KVCache | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Takes and gives the residual stream as two parts whose sum is not made yet: the next norm makes it."""
        if cache is None and self._fuses(x):
            params = [self.get_parameter(name) for name in PARAMETERS]
            return FusedBlock.apply(x, residual, cu_seqlens, self.attn.n_head, self.ln_1.eps, *params)
        residual, norm = (x, self.ln_1(x)) if residual is None else self.ln_1.add(x, residual)
        residual, norm = self.ln_2.add(self.attn(norm, cache, cu_seqlens), residual)
        return self.mlp(norm), residual

    def _fuses(self, x: Tensor) -> bool:
        """Whether `FusedBlock` computes this block: plain parts, all of which learn, without dropout."""
        parts = list(self.modules())
        return (
            not torch.compiler.is_compiling()
            and torch.is_grad_enabled()
            and x.is_cpu
            and x.numel() > 0
            and registry.takes_kernel("bias_gelu", x)
            and not torch.is_autocast_enabled("cpu")
            and not registry.is_transformed()
            and not (self.training and self.attn.attn_pdrop)
            and all(is_plain(m) and not (type(m) is nn.Dropout and m.training and m.p) for m in parts[1:])
            and all(type(p) is nn.Parameter and p.requires_grad and p.dtype == x.dtype for p in self.parameters())
        )


_PLAIN = (LayerNorm, Linear, Attention, MLP, nn.Dropout, nn.Embedding)


def is_plain(module: nn.Module) -> bool:
    """Whether it is what this file makes it, not an adapter in its place, and nobody listens to its calls."""
    return type(module) in _PLAIN and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class Transformer(nn.Module):
    """All of it but the classifier.

    With `recompute` set, a block keeps for backward only what went into it, and backward runs it again (Chen et al.
    2016, arXiv:1604.06174), with the same dropout: memory for a third more work, and the same gradients.
    """

    recompute = False

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.vocab_size = config.vocab_size

    def forward(
        self,
        ids: Tensor,
        cache: KVCache | None = None,
        cu_seqlens: Tensor | None = None,
        tie: TiedGradient | None = None,
    ) -> Tensor:
        """Hidden states (B, T, C) of ids (B, T), after the last norm; arguments and errors as for `GPT.hidden`.

        With `tie` the gradient of wte is made together with a loss's.
        """
        start = cache.length if cache is not None else 0
        self._check(ids, start, cu_seqlens)
        if tie is not None:
            x = tie.embedding(ids, self.wte.weight, self.wpe.weight)
        elif cu_seqlens is None:
            x = ops.embedding(ids, self.wte.weight, self.wpe.weight, start)
        else:
            x = self.wte(ids) + self.wpe(_positions(ids, cu_seqlens))
        x = self.drop(x)
        residual: Tensor | None = None
        for block in self.h:
            if self.recompute and torch.is_grad_enabled():
                x, residual = checkpoint(block, x, residual, cache, cu_seqlens, use_reentrant=False)
            else:
                x, residual = block(x, residual, cache, cu_seqlens)
        if cache is not None:
            cache.advance(ids.size(1))
        assert residual is not None  # there is at least one block
        return self.ln_f.add(x, residual)[1]

    def _check(self, ids: Tensor, start: int, cu_seqlens: Tensor | None) -> None:
        if ids.dtype != torch.int64:
            raise TypeError(f"ids must be int64, got {ids.dtype}")
        if ids.dim() != 2:
            raise ValueError(f"ids must have shape (B, T), got {tuple(ids.shape)}")
        # On a GPU the checks of values would make the host wait for it; there the ops' own behaviour is what is left.
        on_cpu = ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling()
        longest = start + ids.size(1)
        if cu_seqlens is not None:
            if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
                raise ValueError(f"cu_seqlens must have shape (n + 1,), n >= 1, got {tuple(cu_seqlens.shape)}")
            ends = check_boundaries(cu_seqlens, ids.numel()) if on_cpu else [0]
            longest = min(longest, max(b - a for a, b in pairwise(ends))) if on_cpu else 0
        if longest > self.wpe.num_embeddings:
            raise ValueError(f"ids has {longest} tokens, the model has n_positions={self.wpe.num_embeddings}")
        if on_cpu:
            low, high = ids.aminmax()
            if low < 0 or high >= self.vocab_size:
                bad = int(low if low < 0 else high)
                raise ValueError(f"ids holds {bad}, the vocabulary has {self.vocab_size} ids from 0")


def _positions(ids: Tensor, cu_seqlens: Tensor) -> Tensor:
    """How far each token is from the start of its document or of its row, whichever is nearer: (B, T)."""
    B, T = ids.shape
    index = torch.arange(B * T, device=ids.device)
    document = torch.searchsorted(cu_seqlens, index.to(cu_seqlens.dtype), right=True) - 1
    return torch.minimum(index - cu_seqlens[document], index % T).view(B, T)


class GPT(nn.Module):
    """GPT-2 of any size.

    `GPT(GPTConfig.preset("gpt2"))` has random weights, by GPT-2's rule; `GPT.from_pretrained(folder)` loads them.

    Inside, the vocabulary is padded to a multiple of 64; the padding is never seen, learnt or saved.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        """Normal of deviation 0.02; each projection into the residual stream less, by 1/sqrt of how many there are."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                deviation = 0.02
                if name.endswith("c_proj"):
                    deviation /= math.sqrt(2 * self.config.n_layer)
                nn.init.normal_(module.weight, std=deviation)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        self.transformer.wte.weight[self.config.vocab_size :] = 0
        if not self.config.tie_word_embeddings:
            self.lm_head.weight[self.config.vocab_size :] = 0

    @property
    def classifier(self) -> Tensor:
        """The weight that turns hidden states into logits: (padded V, C)."""
        return self.transformer.wte.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, ids: Tensor, cache: KVCache | None = None, last_only: bool = False) -> Tensor:
        """Logits of the next token at each position.

        Args:
            ids: (B, T) int64, each in [0, vocab_size); with a cache, the tokens that follow those it has seen.
            cache: keys and values of the tokens before, which is extended by these.
            last_only: only the last position's logits, which is all that generating needs.

        Returns:
            (B, T, vocab_size), or (B, 1, vocab_size) with `last_only`.

        Raises:
            TypeError, ValueError: `ids` has another dtype or shape, an id outside the vocabulary (checked on a CPU,
                where it costs nothing), or more tokens than n_positions.
        """
        hidden = self.transformer(ids, cache)  # (B, T, C)
        if last_only:
            hidden = hidden[:, -1:]
        return F.linear(hidden, self.classifier)[..., : self.config.vocab_size]

    def hidden(self, ids: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """The hidden states behind the last norm, which the classifier turns into logits.

        Args:
            ids: (B, T) int64.
            cu_seqlens: (n + 1,) int32, boundaries of documents over the B * T tokens, row after row: 0, ascending,
                B * T. No token sees another document's, and positions start at 0 in each; T may then be more than
                n_positions, as long as no document is.

        Returns:
            (B, T, C).

        Raises:
            TypeError, ValueError: as for `forward`, and if `cu_seqlens` is not what it should be.
        """
        return self.transformer(ids, None, cu_seqlens)

    def loss(self, ids: Tensor, targets: Tensor, reduction: str = "mean", cu_seqlens: Tensor | None = None) -> Tensor:
        """Cross-entropy of `targets` (B, T), in nats; targets of -100 count for nothing.

        The logits are made some rows at a time (`ops.linear_cross_entropy`), and never whole.

        Args:
            reduction: "mean" over the targets that count, "sum", or "none" for (B, T).
            cu_seqlens: documents, as for `hidden`.
        """
        if targets.shape != ids.shape:
            raise ValueError(f"targets must have the shape of ids {tuple(ids.shape)}, got {tuple(targets.shape)}")
        if cu_seqlens is None and self._ties(ids, reduction):
            tie = TiedGradient()
            wte = self.transformer.wte.weight
            return tie.loss(self.transformer(ids, tie=tie), wte, self.config.vocab_size, targets, reduction)
        hidden = self.hidden(ids, cu_seqlens)  # (B, T, C)
        weight = self.classifier[: self.config.vocab_size]  # a view: the padding is not seen
        return ops.linear_cross_entropy(hidden, weight, targets, ignore_index=-100, reduction=reduction)

    def _ties(self, ids: Tensor, reduction: str) -> bool:
        """Whether `TiedGradient` makes the gradient of the embedding and the classifier."""
        tables = [self.transformer.wte, self.transformer.wpe]
        wte = self.transformer.wte.weight
        return (
            not torch.compiler.is_compiling()
            and torch.is_grad_enabled()
            and self.config.tie_word_embeddings
            and reduction in ("mean", "sum")
            and ids.is_cpu
            and ids.numel() > 0
            and all(registry.takes_kernel(op, wte) for op in ("embedding", "linear_cross_entropy"))
            and not torch.is_autocast_enabled("cpu")
            and not registry.is_transformed()
            and all(is_plain(m) and type(m.weight) is nn.Parameter and m.weight.requires_grad for m in tables)
            and wte.dtype in (torch.float32, torch.float64)  # of 16 bits, the classifier's is summed in fp32
        )

    def set_dropout(self, p: float) -> None:
        """Sets every dropout of the model to `p`, as for fine-tuning a model that was trained with another."""
        self.config = GPTConfig(**{**vars(self.config), "resid_pdrop": p, "embd_pdrop": p, "attn_pdrop": p})
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = p
            if isinstance(module, Attention):
                module.attn_pdrop = p

    def generate(self, ids: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        """`fastgpt.generate.generate` with this model: (B, T) ids in, (B, T + new) ids out."""
        from fastgpt.generate import generate

        return generate(self, ids, max_new_tokens, **options)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> "GPT":
        """Loads a Hugging Face GPT-2 folder, or a model of that kind from the hub by its id, in eval mode.

        Args:
            path: folder with config.json and model.safetensors or pytorch_model.bin (sharded or not), or a hub id; or
                an adapter's folder (see `fastgpt.model.adapter`), which gives its base with the adapter active.
            dtype: of the weights; float32 if not given, whatever the file holds.

        Raises:
            UserError: something is missing, damaged or of another shape; names the file or the tensor and both shapes.
        """
        from fastgpt.model.hub import load_pretrained

        return load_pretrained(cls, path).to(device=device, dtype=dtype or torch.float32).eval()

    def save_pretrained(self, folder: str | Path, eos_token_id: int | None = None) -> None:
        """Writes config.json and model.safetensors as transformers reads them; each file appears whole or not at all.

        What is written computes what the model computes now: an active adapter is merged into it (and the model stays
        as it is). `fastgpt.model.adapter.save_adapter` writes the adapter alone.

        Args:
            eos_token_id: the tokenizer's end-of-text id, for config.json, where transformers' `generate` looks.
        """
        from fastgpt.model.hub import save_pretrained

        save_pretrained(self, Path(folder), eos_token_id)
