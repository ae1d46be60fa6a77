"""The update of a model's weights: AdamW or Muon, the gradient's norm clipped in the same call, fp32 masters."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.errors import UserError
from fastgpt.model.gpt import Block
from fastgpt.ops import registry
from fastgpt.train import parallel

OptimizerName = Literal["adamw", "muon"]


class AdamW(torch.optim.AdamW):
    """torch's AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), whose step() clips the whole gradient's norm first.

    Where `ops.adamw_step` and `ops.clip_grad_norm` have kernels, they do it: the gradients are then left as they are,
    because the factor goes into the update. Elsewhere (no kernel, 16-bit parameters without masters, sharded ones,
    amsgrad and the like) torch's own do it, and scale the gradients. The state is torch's: either side goes on with the
    other's.

    After a step, `grad_norm` is the norm before clipping: a tensor on the parameters' device, so that reading it late
    costs no synchronization. Where it is NaN or infinite, the step has changed neither weights nor moments, and nothing
    had to be read for that. (`step` in the state counts our steps of that kind; torch's fused update does not.)

    `keep_masters` makes the parameters bfloat16; their float32 values are then `state["master"]`, which each update
    reads and writes, and both moments are float32. Gradients are bfloat16 too, also where passes accumulate in them.
    """

    def __init__(self, params: Iterable[Any], *, grad_clip: float = 0.0, **options: Any) -> None:
        super().__init__(params, **options)
        self.grad_clip = grad_clip
        self.grad_norm: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        limit = self.grad_clip if self.grad_clip > 0 else float("inf")
        if self._is_ours(params):
            self.grad_norm, factor = ops.clip_grad_norm([_local(p.grad) for p in params], limit)
            if any(_is_sharded(p) for p in params):
                self.grad_norm = parallel.total(self.grad_norm.square()).sqrt()
                factor = (limit / (self.grad_norm + 1e-6)).clamp(max=1.0)
                factor = torch.where(self.grad_norm.isfinite(), factor, torch.nan)
            for group in self.param_groups:
                self._update(group, factor)
        else:
            self._step_by_torch(params, limit)
        return loss

    def _step_by_torch(self, params: list[Tensor], limit: float) -> None:
        self.grad_norm = nn.utils.clip_grad_norm_(params, limit)
        for group in self.param_groups:
            if group["fused"]:
                self._move_steps(group, None)
        scaler = getattr(self, "found_inf", None)
        if scaler is None:  # torch's fused update skips where this is 1
            self.found_inf = (~self.grad_norm.isfinite()).float()
        try:
            super().step()
        finally:
            if scaler is None:
                del self.found_inf

    def _is_ours(self, params: list[Tensor]) -> bool:
        """Whether `_update` can do it, and not slower than torch's own."""
        if any("master" in self.state[p] for p in params if p in self.state):
            return True
        scaler = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))  # set by torch.amp.GradScaler.step
        return (
            all(s is None for s in scaler)
            and all(registry.takes_kernel(op, _local(p)) for op in ("adamw_step", "clip_grad_norm") for p in params[:1])
            and all(_is_plain(p) and p.device == params[0].device for p in params)
            and not any(
                g[o] for g in self.param_groups for o in ("amsgrad", "maximize", "capturable", "differentiable")
            )
        )

    def _update(self, group: dict[str, Any], factor: Tensor) -> None:
        self._move_steps(group, "cpu")  # a number that is known here: nothing waits for it
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            self._make_state(p, "exp_avg", "exp_avg_sq")
        if params:
            torch._foreach_add_([self.state[p]["step"] for p in params], 1)
        alike = defaultdict(list)  # one call takes one step and one dtype; usually all parameters have the same
        for p in params:
            state = self.state[p]
            alike[state["step"].item(), p.dtype, "master" in state].append(p)
        for (step, _, has_masters), params in alike.items():
            ops.adamw_step(
                [_local(p) for p in params],
                [_local(p.grad) for p in params],
                [_local(self.state[p]["exp_avg"]) for p in params],
                [_local(self.state[p]["exp_avg_sq"]) for p in params],
                step=step,
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                grad_scale=factor,
                masters=[self.state[p]["master"] for p in params] if has_masters else None,
            )

    def _make_state(self, p: Tensor, *names: str) -> None:
        """Zeros, where they are not there yet, for the sums that an update keeps: float32 for 16-bit parameters."""
        state = self.state[p]
        state.setdefault("step", torch.tensor(0.0))
        for name in names:
            if name not in state:
                dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
                state[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)

    def _move_steps(self, group: dict[str, Any], device: str | None) -> None:
        """To `device`, or to each one's parameter: torch's fused update wants them there, and so loads them there."""
        for p in group["params"]:
            state = self.state.get(p)
            if state and state["step"].device != (wanted := torch.device(device or p.device)):
                state["step"] = state["step"].to(wanted)

    @torch.no_grad()
    def keep_masters(self) -> None:
        """Makes the float32 parameters bfloat16 and keeps their values of now as their masters."""
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.dtype == torch.float32:
                self._make_state(p)
                self.state[p]["master"] = p.detach().clone()
                p.data = p.data.bfloat16()

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Within it, parameters that have masters are these: what is written of them then loses nothing."""
        rounded = {p: p.data for p, state in self.state.items() if "master" in state}
        for p in rounded:
            p.data = self.state[p]["master"]
        try:
            yield
        finally:
            for p, data in rounded.items():
                p.data = data

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's, but for what belongs to a master: torch would round it to the parameter's dtype."""
        super().load_state_dict(state_dict)
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for name, p in zip(names, params, strict=True):
            saved = state_dict["state"].get(name, {})
            if "master" in saved:
                self.state[p].update({k: v.to(p.device, copy=True) for k, v in saved.items() if k != "step"})
                p.copy_(self.state[p]["master"])


def _is_sharded(t: Tensor | None) -> bool:
    return hasattr(t, "to_local")  # a DTensor, whose import takes long


def _local(t: Any) -> Tensor:
    """What this rank has of a sharded tensor, as a view: an update is element by element, so it is enough."""
    return t.to_local() if _is_sharded(t) else t


def _is_plain(p: Tensor) -> bool:
    """Whether the kernels take this parameter with what torch keeps for it: its moments, of its own dtype."""
    p, grad = _local(p), _local(p.grad)
    return (
        type(p) in (Tensor, nn.Parameter)
        and type(grad) is Tensor
        and p.dtype in (torch.float32, torch.float64)
        and grad.dtype == p.dtype
        and grad.layout == p.layout == torch.strided
    )


def build_optimizer(
    model: nn.Module,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    grad_clip: float = 1.0,
    *,
    name: OptimizerName = "adamw",
    lr_scales: Mapping[str, float] | None = None,
    masters: bool = False,
    muon_dtype: torch.dtype = torch.float32,
) -> AdamW:
    """The optimizer of the model's trainable parameters; matrices and embeddings decay, vectors (biases, norms) do not.

    Args:
        lr: learning rate; a trainer sets `group["lr"]` to its rate times `group["lr_scale"]` at each step.
        weight_decay: decoupled decay of parameters with at least two dimensions.
        grad_clip: largest norm of the whole gradient, 0 for none.
        name: "adamw", or "muon": Muon for the matrices inside of blocks, AdamW for the rest (see `Muon`).
        lr_scales: factors on the learning rate by parameter name, 1 where there is none. The decay of such a parameter
            is divided by its factor, so that a step shrinks all weights alike (Wortsman et al. 2023, arXiv:2309.14322).
        muon_dtype: that Muon multiplies in; bfloat16 is enough for it, where it is the faster one.
        masters: makes the parameters bfloat16, with float32 masters (see `AdamW.keep_masters`).

    Raises:
        UserError: Muon or masters are asked for where weights are sharded: both read whole ones.
    """
    from fastgpt.train.muon import Muon

    if (masters or name == "muon") and any(type(p) is not nn.Parameter for p in model.parameters()):
        asked = "--precision bf16-weights" if masters else "--optimizer muon"
        raise UserError(f"{asked} does not go with sharded weights: take --parallel ddp, or leave it out")
    in_blocks = {p for m in model.modules() if isinstance(m, Block) for p in m.parameters() if p.dim() == 2}
    groups: dict[tuple[float, bool, int], list[nn.Parameter]] = defaultdict(list)
    for full_name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        parts = 0  # not Muon's
        if name == "muon" and p in in_blocks:
            parts = 3 if full_name.endswith("c_attn.weight") else 1
        groups[(lr_scales or {}).get(full_name, 1.0), p.dim() >= 2, parts].append(p)
    given = [
        {
            "params": params,
            "lr": lr * scale,
            "lr_scale": scale,
            "weight_decay": weight_decay / scale if decays else 0.0,
            "muon_parts": parts,
        }
        for (scale, decays, parts), params in groups.items()
    ]
    # One pass over all parameters where torch has it; on a CPU it is the faster one too.
    fused = all(p.device.type in ("cpu", "cuda") for group in groups.values() for p in group)
    options: dict[str, Any] = {"grad_clip": grad_clip, "lr": lr, "betas": betas, "fused": fused}
    optimizer = Muon(given, dtype=muon_dtype, **options) if name == "muon" else AdamW(given, **options)
    if masters:
        optimizer.keep_masters()
    return optimizer
