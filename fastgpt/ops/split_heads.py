"""The fused projection of attention as q, k and v, without a copy forward or backward.

    q, k, v = qkv.view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)        dqkv = the same of (dq, dk, dv), stacked

`ops.attention` writes the three gradients as the views of one tensor where it can, which is then dqkv itself. Plain
autograd would stack them again: at GPT-2's sizes on a CPU that took 3% of a training step.
"""

from typing import Any

import torch
from torch import Tensor

from fastgpt.ops import registry


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, n_head: int) -> tuple[Tensor, ...]:
        return as_heads(qkv, n_head)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return join_heads(*grads), None


def join_heads(dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
    """dqkv, (B, T, 3 * C): without a copy where the three, (B, H, T, D) each, lie as `split_heads` gives them."""
    B, H, T, D = dq.shape
    C = H * D
    start = dq.storage_offset()
    together = not torch.is_grad_enabled() and all(
        g.stride() == (3 * T * C, D, 3 * C, 1)
        and g.untyped_storage().data_ptr() == dq.untyped_storage().data_ptr()
        and g.storage_offset() == start + i * C
        for i, g in enumerate((dq, dk, dv))
    )
    if together:
        return dq.as_strided((B, T, 3 * C), (3 * T * C, 3 * C, 1), start)
    return torch.stack((dq, dk, dv)).permute(1, 3, 0, 2, 4).reshape(B, T, 3 * C)


def as_heads(qkv: Tensor, n_head: int) -> tuple[Tensor, ...]:
    """Views (B, H, T, D) of q, k and v."""
    B, T, C3 = qkv.shape
    return qkv.view(B, T, 3, n_head, C3 // 3 // n_head).permute(2, 0, 3, 1, 4).unbind()


def split_heads(qkv: Tensor, n_head: int) -> tuple[Tensor, ...]:
    """q, k and v of a fused projection, as views of it.

    Args:
        qkv: (B, T, 3 * H * D), any dtype: the queries of all heads, then their keys, then their values.
        n_head: H.

    Returns:
        q, k, v: (B, H, T, D) each. Differentiable; not to be changed in place.

    Raises:
        ValueError: the last dimension is no multiple of 3 * n_head.
    """
    if qkv.dim() != 3 or n_head < 1 or qkv.size(2) % (3 * n_head):
        raise ValueError(f"split_heads: qkv must have shape (B, T, 3 * {n_head} * D), got {tuple(qkv.shape)}")
    if torch.compiler.is_compiling() or registry.is_transformed():
        return as_heads(qkv, n_head)
    return _SplitHeads.apply(qkv, n_head)
