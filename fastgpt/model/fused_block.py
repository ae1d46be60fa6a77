"""A transformer block as one differentiable function, which saves less for backward than its parts do.

    s1 = residual + x                q, k, v = ln_1(s1) @ Wa.T + ba       y = attention(q, k, v)
    s2 = s1 + y @ Wo.T + bo          h = ln_2(s2) @ Wf.T                  out = gelu(h + bf) @ Wp.T + bp

Saved are s1, q k v, y, s2 and h: 10 C numbers a token, and a few statistics. The parts would also save both norms and
gelu(h + bf), 6 C more; backward makes these again, which are three passes over memory beside the block's twelve matrix
products. Of GPT-2 124M at 4 x 256 tokens in fp32, that leaves 370 of 590 MiB.

Backwards it is the chain rule through the lines above, from the last to the first; a bias's gradient is a sum over
rows. What a product was made for is written over where it is not needed any more.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops import attention_cpu
from fastgpt.ops.split_heads import as_heads, join_heads

# The parameters of a block, in the order that FusedBlock takes them.
PARAMETERS = (
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


def _linear_grads(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of y = x @ W.T + b: those of W and b."""
    rows = dy.flatten(0, -2)
    return rows.t() @ x.flatten(0, -2), rows.sum(0)


class FusedBlock(torch.autograd.Function):
    """(x, residual or None, cu_seqlens or None, n_head, eps, *PARAMETERS) -> (out, s2): the next x and residual.

    x and residual: (B, T, C), of the parameters' dtype, on a CPU. Each parameter gets a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        cu_seqlens: Tensor | None,
        n_head: int,
        eps: float,
        *params: Tensor,
    ) -> tuple[Tensor, Tensor]:
        w1, b1, wa, ba, wo, bo, w2, b2, wf, bf, wp, bp = params
        scale = 1 / math.sqrt(x.size(2) // n_head)
        with torch._C._AutoDispatchBelowAutograd():
            if residual is None:
                s1 = x
                norm, mean1, rstd1 = _ops.layer_norm.default(x, w1, b1, eps)
            else:
                s1, norm, mean1, rstd1 = _ops.add_layer_norm.default(x, residual, w1, b1, eps)
            qkv = F.linear(norm, wa, ba)  # (B, T, 3 C)
            q, k, v = as_heads(qkv, n_head)  # (B, H, T, D) each
            y, lse = attention_cpu.forward(q, k, v, True, scale, 0.0, None, cu_seqlens)
            y = y.transpose(1, 2).reshape(x.shape)
            s2, norm, mean2, rstd2 = _ops.add_layer_norm.default(F.linear(y, wo, bo), s1, w2, b2, eps)
            h = norm @ wf.t()  # (B, T, 4 C)
            out = F.linear(_ops.bias_gelu.default(h, bf), wp, bp)
        ctx.save_for_backward(s1, mean1, rstd1, qkv, y, lse, s2, mean2, rstd2, h, cu_seqlens, *params)
        ctx.options = n_head, eps, scale
        return out, s2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor, ds2: Tensor) -> tuple[Tensor | None, ...]:
        s1, mean1, rstd1, qkv, y, lse, s2, mean2, rstd2, h, cu_seqlens, *params = ctx.saved_tensors
        w1, b1, wa, _, wo, _, w2, b2, wf, bf, wp, _ = params
        n_head, eps, scale = ctx.options
        B, T, _ = s1.shape

        gelu = _ops.bias_gelu.default(h, bf)
        dwp, dbp = _linear_grads(dout, gelu)
        dgelu = torch.matmul(dout, wp, out=gelu)
        dh, dbf = _ops.bias_gelu_backward.default(dgelu, h, bf)
        del gelu, dgelu
        norm = _ops.layer_norm.default(s2, w2, b2, eps)[0]
        dwf = dh.flatten(0, -2).t() @ norm.flatten(0, -2)
        dnorm = torch.matmul(dh, wf, out=norm)
        del dh
        ds2, dw2, db2 = _ops.add_layer_norm_backward.default(dnorm, ds2, s2, w2, mean2, rstd2)

        dwo, dbo = _linear_grads(ds2, y)
        dy, out = (t.view(B, T, n_head, -1).transpose(1, 2) for t in (torch.matmul(ds2, wo, out=dnorm), y))
        q, k, v = as_heads(qkv, n_head)
        dheads = attention_cpu.backward(dy, q, k, v, out, lse, True, scale, 0.0, None, cu_seqlens, together=True)
        dqkv = join_heads(*dheads)
        norm = _ops.layer_norm.default(s1, w1, b1, eps)[0]
        dwa, dba = _linear_grads(dqkv, norm)
        dnorm = torch.matmul(dqkv, wa, out=norm)
        ds1, dw1, db1 = _ops.add_layer_norm_backward.default(dnorm, ds2, s1, w1, mean1, rstd1)
        grads = (dw1, db1, dwa, dba, dwo, dbo, dw2, db2, dwf, dbf, dwp, dbp)
        return ds1, ds1 if ctx.needs_input_grad[1] else None, None, None, None, *grads
