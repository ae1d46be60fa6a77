"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): a model is fine-tuned by a few numbers beside frozen weights.

A linear layer y = x W^T + b becomes, with A (r, in) and B (out, r) trained and W and b frozen,

    y = x W^T + b + c (x A^T) B^T        c = alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski, arXiv:2312.03732)

B starts at zero, so that an adapted model starts as its base. DoRA (Liu et al. 2024, arXiv:2402.09353) trains the
length of each row of the weight as well, m (out,), which starts as the base's:

    y = x W'^T + b                       W' = m / |W + c B A| * (W + c B A), row by row

The gradient does not go through |W + c B A| (section 4.3 there). Dropout is on the adapter's input.

A model can hold several adapters by name, one of which is active, or none: then it computes as its base. The weights
beside them may be held in 4 bits (QLoRA: Dettmers et al. 2023, arXiv:2305.14314; `ops.quantize_nf4`).
`fastgpt.model.adapter` reads and writes them as PEFT folders.
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.errors import UserError
from fastgpt.ops import NF4Weight

TARGETS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # all linear layers of a block


@dataclass(frozen=True)
class LoRAConfig:
    """What an adapter is built from; the fields of PEFT's `LoraConfig` under their plain names.

    `targets` are ends of the layers' names, or one string: a regular expression for the whole name, or "all-linear".
    The patterns give layers whose name they match at its end (regular expressions) another rank or alpha.
    """

    rank: int = 8
    alpha: float = 16
    targets: tuple[str, ...] | str = TARGETS
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for rank in (self.rank, *self.rank_pattern.values()):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise UserError(f"the rank of an adapter must be a whole number of at least 1, got {rank!r}")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
                raise UserError(f"the alpha of an adapter must be a number, got {alpha!r}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"the dropout of an adapter must be at least 0 and below 1, got {self.dropout!r}")
        patterns = [*self.rank_pattern, *self.alpha_pattern]
        for pattern in [self.targets, *patterns] if isinstance(self.targets, str) else patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{pattern!r} is no regular expression: {error}") from None

    def matches(self, layer: str) -> bool:
        """Whether the layer of that name is to be adapted."""
        if isinstance(self.targets, str):
            return self.targets.lower() == "all-linear" or re.fullmatch(self.targets, layer) is not None
        return any(_ends_with(layer, target) for target in self.targets)

    def rank_of(self, layer: str) -> int:
        return next((r for p, r in self.rank_pattern.items() if _ends_in_pattern(layer, p)), self.rank)

    def scaling_of(self, layer: str) -> float:
        """c: what the adapter's product is multiplied by."""
        alpha = next((a for p, a in self.alpha_pattern.items() if _ends_in_pattern(layer, p)), self.alpha)
        rank = self.rank_of(layer)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _ends_with(layer: str, target: str) -> bool:
    return f".{layer}".endswith(f".{target}")


def _ends_in_pattern(layer: str, pattern: str) -> bool:
    return re.fullmatch(rf"(.*\.)?({pattern})", layer) is not None


class Adapter(nn.Module):
    """The numbers of one adapter in one layer: `lora_A` (r, in), `lora_B` (out, r), for DoRA `lora_magnitude_vector`
    (out,), which are the names that PEFT's files have.

    In float32 beside a weight of 16 bits: the steps of training are too small for those.
    """

    lora_magnitude_vector: nn.Parameter | None

    def __init__(self, config: LoRAConfig, layer: str, weight: Tensor) -> None:
        super().__init__()
        self.config = config
        self.scaling = config.scaling_of(layer)
        out, width = weight.shape
        rank = config.rank_of(layer)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(torch.empty(rank, width, dtype=dtype, device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(out, rank, dtype=dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if config.use_dora:
            self.lora_magnitude_vector = nn.Parameter(weight.detach().to(dtype).norm(dim=1))
        else:
            self.lora_magnitude_vector = None

    def updated(self, weight: Tensor) -> Tensor:
        """W + c B A, in the adapter's dtype."""
        with torch.autocast(weight.device.type, enabled=False):
            return torch.addmm(weight.to(self.lora_A.dtype), self.lora_B, self.lora_A, alpha=self.scaling)

    @torch.no_grad()
    def adapted(self, weight: Tensor) -> Tensor:
        """The weight (out, in) of a plain linear layer that computes what this one does with its adapter."""
        updated = self.updated(weight)
        if self.lora_magnitude_vector is not None:
            updated *= (self.lora_magnitude_vector / updated.norm(dim=1))[:, None]
        return updated.to(weight.dtype)


class LoRALinear(nn.Module):
    """A linear layer with adapters by name; `weight` and `bias` are those of the layer that it takes the place of.

    Computes with `ops.lora_linear` while an adapter is active and not merged, and else as the plain layer does. Of a
    `weight` that `quantize` made 4 bits nothing whole is kept, nor saved for backward.
    """

    weight: Tensor | NF4Weight
    _unmerged: Tensor | NF4Weight | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.adapters = nn.ModuleDict()
        self.active: str | None = None
        self.register_buffer("_unmerged", None, persistent=False)  # the base's weight, while another is in its place

    @property
    def adapter(self) -> Adapter | None:
        """The active one, if this layer has it."""
        if self.active is None or self.active not in self.adapters:
            return None
        adapter = self.adapters[self.active]
        assert isinstance(adapter, Adapter)
        return adapter

    @property
    def merged(self) -> bool:
        return self._unmerged is not None

    def quantize(self) -> None:
        """Holds the weight in 4 bits from now on."""
        if isinstance(self.weight, Tensor):
            held = ops.quantize_nf4(self.weight)
            del self.weight  # torch puts no module in a parameter's place
            self.weight = held

    def whole_weight(self) -> Tensor:
        """The weight (out, in), detached; made anew where it is held in 4 bits."""
        return self.weight.detach() if isinstance(self.weight, Tensor) else self.weight.dequantize()

    def plain_weight(self) -> Tensor:
        """The weight (out, in) of a plain linear layer that computes what this one does, detached."""
        adapter = None if self.merged else self.adapter
        return self.whole_weight() if adapter is None else adapter.adapted(self.whole_weight())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self._linear(x, self.bias)

    def without_bias(self, x: Tensor) -> Tensor:
        """The same but for the bias, which the caller adds: (..., in) -> (..., out)."""
        return self._linear(x, None)

    def _linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        adapter = self.adapter
        if adapter is None or self.merged:
            return self._base(x, bias)
        dropout = adapter.config.dropout if self.training else 0.0
        a, b = adapter.lora_A.to(x.dtype), adapter.lora_B.to(x.dtype)
        if adapter.lora_magnitude_vector is None:
            return ops.lora_linear(x, self.weight, bias, a, b, adapter.scaling, dropout)
        with torch.no_grad():
            norm = adapter.updated(self.whole_weight()).norm(dim=1)
        scale = adapter.lora_magnitude_vector / norm  # (out,)
        # With dropout, what DoRA takes away from the base's product is of the dropped input too, as PEFT has it:
        # x W^T + (scale - 1) drop(x) W^T + scale c (drop(x) A^T) B^T. Here with one product of W less.
        low = F.dropout(x, dropout)
        rest = self._base(x - low, bias) if dropout else bias
        y = ops.lora_linear(low, self.weight, None, a, b, adapter.scaling)
        scale = scale.to(y.dtype)
        return y * scale if rest is None else torch.addcmul(rest.to(y.dtype), y, scale)

    def _base(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(self.weight, Tensor):
            return F.linear(x, self.weight, bias)
        out, width = self.weight.shape  # an adapter of zeros: F.linear would save the whole weight for backward
        return ops.lora_linear(x, self.weight, bias, x.new_zeros(1, width), x.new_zeros(out, 1), 0.0)

    def merge(self) -> None:
        if self.adapter is None:
            return
        merged = self.plain_weight()
        if isinstance(self.weight, Tensor):
            self._unmerged, self.weight.data = self.weight.data, merged
        else:
            self._unmerged, self.weight = self.weight, nn.Parameter(merged, requires_grad=False)

    def unmerge(self) -> None:
        held, self._unmerged = self._unmerged, None
        if isinstance(held, NF4Weight):
            del self.weight
            self.weight = held
        elif held is not None:
            self.weight.data = held


def apply_lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16,
    targets: tuple[str, ...] | str = TARGETS,
    dropout: float = 0.0,
    use_rslora: bool = False,
    use_dora: bool = False,
    name: str = "default",
    quantize: Literal["nf4"] | None = None,
) -> None:
    """Gives the model a new adapter, which becomes the active one and the only thing in it that trains.

    Args:
        model: a `GPT`, or any module with a Transformer as its `transformer`. Its parameters keep their names.
        rank: r, the columns of the update: 8 to 64 are usual.
        alpha: the update is scaled by alpha / rank, or by alpha / sqrt(rank) with `use_rslora`.
        targets: which linear layers of the blocks: ends of their names, a regular expression, or "all-linear".
        dropout: of the adapter's input, in training.
        use_dora: trains the length of each row of the weights apart from its direction.
        name: to switch by, where a model has several.
        quantize: "nf4" holds the weights of the layers that it adapts in 4 bits, for all adapters: 4.127 bits a weight,
            with an error of 9% of normal weights' root mean square. One layer after the other, so that memory falls.

    Raises:
        UserError: a target matches no layer, a number is out of its range, the model has an adapter of that name, or a
            weight that is to be quantized is not finite. The model is then as it was.
    """
    config = LoRAConfig(rank, alpha, targets, dropout, use_rslora, use_dora)
    if quantize not in (None, "nf4"):
        raise UserError(f"weights can be quantized to 'nf4' only, got {quantize!r}")
    layers = list(linear_layers(model))
    for target in (targets,) if isinstance(targets, str) else targets:
        one = target if isinstance(targets, str) else (target,)
        if not any(LoRAConfig(targets=one).matches(layer) for layer in layers):
            raise no_such_target(target, layers)
    add_adapter(model, config, name, quantize is not None)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a model's blocks by name, adapted or not."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | LoRALinear) and name.startswith("transformer.h.")
    }


def no_such_target(target: object, layers: Iterable[str]) -> UserError:
    ends = dict.fromkeys(re.sub(r"transformer\.h\.\d+\.", "", layer) for layer in layers)
    return UserError(f"no linear layer of the model is named {target!r}: there are {', '.join(ends)}")


def add_adapter(model: nn.Module, config: LoRAConfig, name: str, quantize: bool = False) -> dict[str, Adapter]:
    """`apply_lora` by a config; returns the new adapter's parts by the name of their layer."""
    if not re.fullmatch(r"[\w-]+", name) or hasattr(nn.ModuleDict(), name):
        raise UserError(f"an adapter cannot be named {name!r}: take letters, digits, - and _, and no word of torch's")
    if name in adapter_names(model):
        raise UserError(f"the model has an adapter named {name!r} already: give the new one another name")
    _refuse_merged(model)
    paths = [path for path in linear_layers(model) if config.matches(path)]  # the layers themselves would stay alive
    if not paths:
        raise no_such_target(config.targets, linear_layers(model))
    if quantize:
        _refuse_unbounded(model, paths)
    parts = {}
    for path in paths:
        layer = model.get_submodule(path)
        if isinstance(layer, nn.Linear):
            parent, _, child = path.rpartition(".")
            layer = LoRALinear(layer).train(layer.training)
            setattr(model.get_submodule(parent), child, layer)
        assert isinstance(layer, LoRALinear)
        if quantize:
            layer.quantize()
        part = Adapter(config, path, layer.whole_weight()).train(layer.training)
        layer.adapters[name] = parts[path] = part
    model.requires_grad_(False)
    set_adapter(model, name)
    return parts


@torch.no_grad()
def _refuse_unbounded(model: nn.Module, paths: list[str]) -> None:
    for path in paths:
        weight = model.get_submodule(path).weight
        if isinstance(weight, Tensor) and not torch.linalg.vector_norm(weight, math.inf) < 2.0**127:
            raise UserError(f"{path}.weight has numbers that are infinite, NaN or above 2^127: 4 bits cannot hold it")


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers that have an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the model's adapters, in the order of the alphabet."""
    return sorted({name for layer in adapted_layers(model).values() for name in layer.adapters})


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Makes the named adapter the one that the model computes with and trains; None for the base alone.

    Raises:
        UserError: there is no adapter of that name, or one is merged.
    """
    if name is not None:
        check_adapter(model, name)
    _refuse_merged(model)
    for layer in adapted_layers(model).values():
        layer.active = name
        for other, adapter in layer.adapters.items():
            adapter.requires_grad_(other == name)


def check_adapter(model: nn.Module, name: str) -> None:
    """Raises a UserError unless the model has an adapter of that name."""
    names = adapter_names(model)
    if name not in names:
        raise UserError(f"the model has no adapter named {name!r}: it has {', '.join(names) or 'none'}")


def merge(model: nn.Module) -> None:
    """Puts the active adapter into the weights, so that the model costs what its base costs; for inference.

    The base's weights are kept beside them, for `unmerge`. A merged adapter does not train. What was held in 4 bits is
    whole then, in the dtype that it had, with the error of the 4 bits in it.

    Raises:
        UserError: no adapter is active, or one is merged already.
    """
    _refuse_merged(model)
    layers = adapted_layers(model).values()
    if all(layer.adapter is None for layer in layers):
        raise UserError("the model has no active adapter to merge: choose one with set_adapter")
    for layer in layers:
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Puts the base's weights back as they were, bit for bit; the adapter that was merged is active.

    Raises:
        UserError: none is merged.
    """
    layers = adapted_layers(model).values()
    if not any(layer.merged for layer in layers):
        raise UserError("the model has no merged adapter to take out of its weights")
    for layer in layers:
        layer.unmerge()


def _refuse_merged(model: nn.Module) -> None:
    for layer in adapted_layers(model).values():
        if layer.merged:
            raise UserError(f"the adapter {layer.active!r} is merged into the weights: unmerge it first")


def plain_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a model without adapters that computes what this one does, by name, detached.

    The active adapter is merged into what is given, one layer at a time, and the model left as it is.
    """
    layers = adapted_layers(model)
    for path, layer in layers.items():
        yield f"{path}.weight", layer.plain_weight()
    for name, parameter in model.named_parameters():
        if not any(name == f"{path}.weight" or name.startswith(f"{path}.adapters.") for path in layers):
            yield name, parameter.detach()
