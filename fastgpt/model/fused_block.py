"""A transformer block as one differentiable function, which saves less for backward than its parts do.

    s1 = residual + x                q, k, v = ln_1(s1) @ Wa.T + ba       y = attention(q, k, v)
    s2 = s1 + y @ Wo.T + bo          h = ln_2(s2) @ Wf.T                  out = gelu(h + bf) @ Wp.T + bp

Saved are s1, q k v, y, s2 and h: 10 C numbers a token, and a few statistics. The parts would also save both norms and
gelu(h + bf), 6 C more; backward makes these again, which are three passes over memory beside the block's twelve
matmuls. So of GPT-2 124M's saved activations at 4 x 256 tokens, 600 MB, 380 MB are left.

Backwards it is the chain rule through the lines above from right to left; the gradients of biases are sums over rows.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fastgpt.ops import attention_cpu

NAMES = (
    "ln_1.weight",
    "ln_1.bias",
    "attn.c_attn.weight",
    "attn.c_attn.bias",
    "attn.c_proj.weight",
    "attn.c_proj.bias",
    "ln_2.weight",
    "ln_2.bias",
    "mlp.c_fc.weight",
    "mlp.c_fc.bias",
    "mlp.c_proj.weight",
    "mlp.c_proj.bias",
)
_ops = torch.ops.fastgpt


def _heads(qkv: Tensor, n_head: int) -> tuple[Tensor, ...]:
    """Views (B, H, T, D) of q, k and v in (B, T, 3 C)."""
    B, T, C3 = qkv.shape
    return qkv.view(B, T, 3, n_head, C3 // 3 // n_head).permute(2, 0, 3, 1, 4).unbind()


def _weight_grad(dy: Tensor, x: Tensor) -> Tensor:
    """Of y = x @ W.T: dy^T x, over all rows."""
    return dy.flatten(0, -2).t() @ x.flatten(0, -2)


class FusedBlock(torch.autograd.Function):
    """(x, residual, n_head, eps, the parameters of NAMES) -> (out, s2): the parts of the residual stream's next sum."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, n_head: int, eps: float, *params: Tensor
    ) -> tuple[Tensor, Tensor]:
        w1, b1, wa, ba, wo, bo, w2, b2, wf, bf, wp, bp = params
        B, T, C = x.shape
        with torch._C._AutoDispatchBelowAutograd():
            if residual is None:
                s1 = x
                norm, mean1, rstd1 = _ops.layer_norm.default(x, w1, b1, eps)
            else:
                s1, norm, mean1, rstd1 = _ops.add_layer_norm.default(x, residual, w1, b1, eps)
            qkv = torch.nn.functional.linear(norm, wa, ba)  # (B, T, 3 C)
            q, k, v = _heads(qkv, n_head)
            y, lse = attention_cpu.forward(q, k, v, True, 1 / math.sqrt(C // n_head), 0.0, None, None)
            y = y.transpose(1, 2).reshape(B, T, C)
            projected = torch.nn.functional.linear(y, wo, bo)
            s2, norm, mean2, rstd2 = _ops.add_layer_norm.default(projected, s1, w2, b2, eps)
            del projected
            h = norm @ wf.t()  # (B, T, 4 C)
            del norm
            out = torch.nn.functional.linear(_ops.bias_gelu.default(h, bf), wp, bp)
        ctx.save_for_backward(s1, mean1, rstd1, qkv, y, lse, s2, mean2, rstd2, h, *params)
        ctx.options = n_head, eps
        ctx.set_materialize_grads(False)
        return out, s2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, ds2: Tensor | None) -> tuple[Tensor | None, ...]:
        s1, mean1, rstd1, qkv, y, lse, s2, mean2, rstd2, h, *params = ctx.saved_tensors
        w1, b1, wa, _, wo, _, w2, b2, wf, bf, wp, _ = params
        n_head, eps = ctx.options
        B, T, C = s1.shape
        dout = torch.zeros_like(s1) if dout is None else dout.contiguous()

        gelu = _ops.bias_gelu.default(h, bf)
        dwp, dbp = _weight_grad(dout, gelu), dout.sum((0, 1))
        dgelu = torch.matmul(dout, wp, out=gelu)
        dh, dbf = _ops.bias_gelu_backward.default(dgelu, h, bf)
        del gelu, dgelu
        norm = _ops.layer_norm.default(s2, w2, b2, eps)[0]
        dwf = _weight_grad(dh, norm)
        dnorm = torch.matmul(dh, wf, out=norm)
        del dh
        ds2, dw2, db2 = _ops.add_layer_norm_backward.default(dnorm, ds2, s2, w2, mean2, rstd2)

        dwo, dbo = _weight_grad(ds2, y), ds2.sum((0, 1))
        dy = torch.matmul(ds2, wo, out=dnorm).view(B, T, n_head, C // n_head).transpose(1, 2)
        q, k, v = _heads(qkv, n_head)
        out = y.view(B, T, n_head, C // n_head).transpose(1, 2)
        dheads = attention_cpu.backward(
            dy, q, k, v, out, lse, True, 1 / math.sqrt(C // n_head), 0.0, None, None
        )
        dqkv = torch.stack([d.transpose(1, 2) for d in dheads], dim=2).view(B, T, 3 * C)
        del dheads
        norm = _ops.layer_norm.default(s1, w1, b1, eps)[0]
        dwa, dba = _weight_grad(dqkv, norm), dqkv.sum((0, 1))
        dnorm = torch.matmul(dqkv, wa, out=norm)
        ds1, dw1, db1 = _ops.add_layer_norm_backward.default(dnorm, ds2, s1, w1, mean1, rstd1)
        grads = (dw1, db1, dwa, dba, dwo, dbo, dw2, db2, dwf, dbf, dwp, dbp)
        return (ds1, ds1 if ctx.needs_input_grad[1] else None, None, None, *grads)
