"""Embedding and classifier of one weight, whose two gradients are made in one tensor.

The classifier's gradient is a dense (V, C), and the embedding's adds to the rows of the tokens that were seen. Left to
autograd, each is a dense tensor of its own, the classifier's is copied once more because the padding's rows are cut off
by a view, and the sum is another pass: of GPT-2 124M, four times 154 MB are written where once is enough. Here the
loss's backward leaves its gradient in a `TiedGradient`, and the embedding's backward, which comes last, adds its rows
to it and returns it.
"""

from typing import Any

import torch
from torch import Tensor

from fastgpt.ops.linear_cross_entropy import check, through_chunks

_ops = torch.ops.fastgpt


class TiedGradient:
    """What the loss's backward hands to the embedding's, in one pass through one graph."""

    def __init__(self) -> None:
        self.dweight: Tensor | None = None

    def embedding(self, ids: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
        """`ops.embedding`, (B, T) -> (B, T, C)."""
        return _Embedding.apply(self, ids, wte, wpe)

    def loss(self, hidden: Tensor, wte: Tensor, vocab_size: int, targets: Tensor, reduction: str) -> Tensor:
        """`ops.linear_cross_entropy` with the first `vocab_size` rows of `wte`, reduction "mean" or "sum"."""
        return _Loss.apply(self, hidden, wte, vocab_size, targets, reduction)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tie: TiedGradient, ids: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.tie, ctx.positions = tie, len(wpe)
        return _ops.embedding.default(ids, wte, wpe, 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dwte, ctx.tie.dweight = ctx.tie.dweight, None
        dwpe = _ops.embedding_backward_add_.default(dy, ctx.saved_tensors[0], dwte, ctx.positions, 0)
        return None, None, dwte, dwpe


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tie: TiedGradient, hidden: Tensor, wte: Tensor, vocab_size: int, targets: Tensor, reduction: str
    ) -> Tensor:
        rows, flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        dweight = torch.empty_like(wte)
        dweight[vocab_size:] = 0
        check(rows, wte[:vocab_size], flat, -100, reduction)
        count = (flat != -100).sum() if reduction == "mean" else torch.ones((), dtype=torch.int64)
        factor = (1 / count.clamp(min=1)).to(rows.dtype).expand(len(rows)).contiguous()
        losses, dhidden, _ = through_chunks(
            rows, wte[:vocab_size], flat, -100, 0.0, [True, True], factor, dweight[:vocab_size]
        )
        ctx.tie = tie
        ctx.save_for_backward(dhidden.view_as(hidden), dweight)
        return losses.sum() / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors
        last = not torch._C._autograd._get_current_graph_task_keep_graph()
        if not last or dloss.item() != 1:
            dhidden, dweight = (torch.mul(t, dloss, out=t if last else torch.empty_like(t)) for t in (dhidden, dweight))
        ctx.tie.dweight = dweight
        return None, dhidden, None, None, None, None
