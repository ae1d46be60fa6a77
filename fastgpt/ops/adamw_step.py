"""One AdamW update of a list of parameters (Loshchilov & Hutter 2019, arXiv:1711.05101), with the clip factor in it.

For each element, at step k, in fp32 (fp64 for float64):

    g = grad * grad_scale
    p = p * (1 - lr * weight_decay)
    m = m + (1 - beta1) * (g - m)            v = beta2 * v + (1 - beta2) * g^2
    p = p - lr / (1 - beta1^k) * m / (sqrt(v) / sqrt(1 - beta2^k) + eps)

Where grad_scale is NaN or infinite, nothing changes: a gradient that is not finite, which `clip_grad_norm` finds on the
device, costs a run one update and not its weights. Who counts the steps counts this one too.

With masters, p is read from and written to its fp32 master, and the parameter gets the rounded copy: a bf16 parameter
alone has 8 bits, and an update of less than 1/512 of it would be lost.

All parameters go through one call (one launch on a GPU), which moves 28 bytes an element in fp32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgpt.ops import registry
from fastgpt.ops.registry import DTYPES

SCALAR_DTYPES = (torch.float32, torch.float64, torch.int64)

torch.library.define(
    "fastgpt::adamw_step",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] masters, "
    "Tensor step, Tensor lr, Tensor grad_scale, float beta1, float beta2, float eps, float weight_decay) -> ()",
)


@torch.no_grad()
def adamw_step_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: float | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: float | Tensor = 1.0,
    masters: Sequence[Tensor] | None = None,
) -> None:
    """The definition, in plain torch; also what runs where there is no kernel."""
    step, lr, grad_scale = (s.double() if isinstance(s, Tensor) else s for s in (step, lr, grad_scale))
    finite = torch.as_tensor(grad_scale).isfinite()
    beta1, beta2 = betas
    size = lr / (1 - beta1**step)
    root = (1 - beta2**step) ** 0.5
    for i, (param, grad, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        g = (grad.to(m.dtype) * grad_scale).to(m.dtype)  # a 0-dim gradient would take on grad_scale's dtype
        p = masters[i] if masters else param.to(m.dtype)
        mean = m.lerp(g, 1 - beta1)
        square = (v * beta2).addcmul_(g, g, value=1 - beta2)
        after = p * (1 - lr * weight_decay) - size * mean / (square.sqrt() / root + eps)
        for t, new in ((p, after), (m, mean), (v, square)):
            t.copy_(torch.where(finite.to(t.device), new, t))
        if p is not param:
            param.copy_(p)


@torch.no_grad()
def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: float | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: float | Tensor = 1.0,
    masters: Sequence[Tensor] | None = None,
) -> None:
    """Updates `params`, `exp_avgs`, `exp_avg_sqs` and `masters` in place.

    Args:
        params: tensors of any shapes on one device, of one dtype: float32, float64, bfloat16 or float16. One that is
            not contiguous is updated through a copy.
        grads: their gradients, of their shapes and dtype; any strides; not modified.
        exp_avgs, exp_avg_sqs: the running means of the gradient and of its square, zeros at first; of the parameters'
            shapes, float32 (float64 for float64).
        step: the number of this update, from 1.
        lr: learning rate.
        betas: decay rates of the two running means, in [0, 1).
        eps: added to the denominator; at least 0.
        weight_decay: decoupled decay; at least 0.
        grad_scale: a factor on all gradients, such as `clip_grad_norm` returns; with NaN or infinity the call does
            nothing.
        masters: for 16-bit parameters, their float32 values, which are updated in their place.

    `step`, `lr` and `grad_scale` may be 0-dim tensors (float32, float64, int64) on the parameters' device. They are
    never waited for, so that a CUDA graph replays with their new values; a number is written into the graph.

    Raises:
        TypeError: an argument is no tensor where one is expected, or has another dtype.
        ValueError: a list's length, a tensor's shape or device does not fit, or a number is out of its range.
    """
    params, grads, exp_avgs, exp_avg_sqs = list(params), list(grads), list(exp_avgs), list(exp_avg_sqs)
    masters = list(masters) if masters is not None else []
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    _check(params, lists | ({"masters": masters} if masters else {}))
    _check_numbers(step, lr, betas, eps, weight_decay)
    if not params:
        return
    for name, s in (("step", step), ("lr", lr), ("grad_scale", grad_scale)):
        _check_scalar(name, s, params[0].device)
    if not registry.takes_kernel("adamw_step", params[0]):
        adamw_step_reference(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            step=step,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            grad_scale=grad_scale,
            masters=masters,
        )
        return
    mutated = [params, exp_avgs, exp_avg_sqs, masters]
    dense = [[t if t.is_contiguous() else t.contiguous() for t in tensors] for tensors in mutated]
    torch.ops.fastgpt.adamw_step.default(
        dense[0],
        grads,
        *dense[1:],
        *(_scalar(s) for s in (step, lr, grad_scale)),
        float(betas[0]),
        float(betas[1]),
        float(eps),
        float(weight_decay),
    )
    if not torch.compiler.is_compiling():  # a graph that saved one of them for backward must notice
        torch.autograd.graph.increment_version(t for tensors in dense for t in tensors)
    for tensors, copies in zip(mutated, dense, strict=True):
        for t, copy in zip(tensors, copies, strict=True):
            if copy is not t:
                t.copy_(copy)


def _scalar(s: float | Tensor) -> Tensor:
    return s if isinstance(s, Tensor) else torch.full((), s, dtype=torch.float64, device="cpu")


def _check(params: list[Tensor], others: dict[str, list[Tensor]]) -> None:
    for name, tensors in others.items():
        if len(tensors) != len(params):
            raise ValueError(f"adamw_step: {name} must be {len(params)} tensors as params, got {len(tensors)}")
    for name, tensors in {"params": params, **others}.items():
        for i, t in enumerate(tensors):
            if not isinstance(t, Tensor):
                raise TypeError(f"adamw_step: {name}[{i}] must be a tensor, got {type(t).__name__}")
    if not params:
        return
    device, dtype = params[0].device, params[0].dtype
    if dtype not in DTYPES:
        raise TypeError(f"adamw_step: params[0] must be float32, float64, bfloat16 or float16, got {dtype}")
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    if "masters" in others and dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"adamw_step: masters are for bfloat16 and float16 params, got {dtype} params")
    for name, tensors in {"params": params, **others}.items():
        want = dtype if name in ("params", "grads") else sums
        for i, t in enumerate(tensors):
            if t.dtype != want or t.layout != torch.strided:
                raise TypeError(f"adamw_step: {name}[{i}] must be dense and {want}, got {t.dtype} {t.layout}")
            if t.device != device:
                raise ValueError(f"adamw_step: {name}[{i}] is on {t.device} but params[0] is on {device}")
            if t.shape != params[i].shape:
                raise ValueError(
                    f"adamw_step: {name}[{i}] must have its parameter's shape {tuple(params[i].shape)}, "
                    f"got {tuple(t.shape)}"
                )


def _check_numbers(
    step: float | Tensor, lr: float | Tensor, betas: tuple[float, float], eps: float, weight_decay: float
) -> None:
    if not isinstance(step, Tensor) and not step >= 1:
        raise ValueError(f"adamw_step: step must be at least 1, got {step}")
    if not isinstance(lr, Tensor) and not lr >= 0:
        raise ValueError(f"adamw_step: lr must be at least 0, got {lr}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"adamw_step: betas must be two numbers in [0, 1), got {betas}")
    for name, number in (("eps", eps), ("weight_decay", weight_decay)):
        if not number >= 0:
            raise ValueError(f"adamw_step: {name} must be at least 0, got {number}")


def _check_scalar(name: str, s: float | Tensor, device: torch.device) -> None:
    if not isinstance(s, Tensor):
        return
    if s.dim() != 0 or s.dtype not in SCALAR_DTYPES:
        raise ValueError(
            f"adamw_step: {name} must be a number or a 0-dim float32, float64 or int64 tensor, "
            f"got {s.dtype} of shape {tuple(s.shape)}"
        )
    if s.device != device and s.device.type != "cpu":
        raise ValueError(f"adamw_step: {name} is on {s.device} but params are on {device}")


@torch.library.register_fake("fastgpt::adamw_step")
def _fake(*_: object) -> None:
    return None


registry.register("adamw_step", cpu="C++", cuda="CUDA C++")
