"""Adapters on the disk: PEFT folders, which `peft.PeftModel.from_pretrained` opens, and which it writes.

adapter_config.json says how the adapter is built and for which base; adapter_model.safetensors holds, for each adapted
layer, `base_model.model.<layer>.lora_A.weight` (r, in), `.lora_B.weight` (out, r) and, for DoRA,
`.lora_magnitude_vector` (out,). HF keeps a GPT-2's own weights as (in, out), which its `fan_in_fan_out` says; the
adapter's tensors are not transposed.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastgpt.errors import UserError
from fastgpt.files import atomic_dir, atomic_write, explained
from fastgpt.model.hub import (
    ADAPTER_CONFIG,
    is_adapter,
    load_pretrained,
    local_folder,
    read_json,
    read_tensors,
    resolve_model_folder,
    write_tensors,
)
from fastgpt.model.lora import (
    LoRAConfig,
    adapted_layers,
    add_adapter,
    check_adapter,
    linear_layers,
    no_such_target,
)
from fastgpt.ops import NF4Weight

if TYPE_CHECKING:
    from fastgpt.model.gpt import GPT

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # the second is what old versions of PEFT wrote
PREFIX = "base_model.model."
# Fields of adapter_config.json that are read, or that change nothing in what a saved adapter computes. Any other one
# must be off: it stands for something that is not computed here.
READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "base_model_name_or_path",
}
WITHOUT_EFFECT = {
    "auto_mapping",
    "ensure_weight_tying",
    "eva_config",  # how A starts
    "fan_in_fan_out",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
# What must be so: the other ways to start an adapter (PiSSA, OLoRA, ...) change the base's weights too.
ONLY = {"bias": ("none", None), "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal")}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def save_adapter(model: nn.Module, folder: str | Path, base: str | Path, name: str = "default") -> None:
    """Writes one adapter of a model as a PEFT folder; each of its two files appears whole or not at all.

    Args:
        base: the model that was adapted: its folder (or run), which is written as an absolute path, so that the adapter
            may be moved but the base may not; or its id on the hub.
        name: which of the model's adapters; it is not written.

    Raises:
        UserError: there is no adapter of that name, `base` is an adapter itself, or the folder holds a model.
    """
    folder = Path(folder)
    check_adapter(model, name)
    if Path(base).exists():
        base = resolve_model_folder(base).resolve()
        if is_adapter(base):
            raise UserError(f"{base} is an adapter, which cannot be another's base: `fastgpt merge` it first")
    if (folder / "config.json").exists():
        raise UserError(f"{folder} holds a model: an adapter needs a folder of its own")
    parts = {n: layer.adapters[name] for n, layer in adapted_layers(model).items() if name in layer.adapters}
    tensors = {
        f"{PREFIX}{layer}.{_file_name(end)}": parameter.detach().contiguous().cpu()
        for layer, part in parts.items()
        for end, parameter in part.named_parameters()
    }
    config = next(iter(parts.values())).config
    assert isinstance(config, LoRAConfig)
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": config.targets,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "bias": "none",
        "fan_in_fan_out": True,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / WEIGHTS[0], tensors)
    atomic_write(folder / ADAPTER_CONFIG, json.dumps(values, indent=1) + "\n")


def _file_name(parameter: str) -> str:
    return parameter if parameter == "lora_magnitude_vector" else f"{parameter}.weight"


@torch.no_grad()
def load_adapter(model: nn.Module, folder: str | Path, name: str = "default") -> None:
    """Reads a PEFT folder of LoRA adapters into the model, where it becomes the active one, as after `apply_lora`.

    Raises:
        UserError: something is missing, damaged, not computed here, or made for another base (names the tensor and
            both shapes), or the model has an adapter of that name. The model is then as it was.
    """
    folder = Path(folder)
    config = read_config(folder)
    path = next((folder / n for n in WEIGHTS if (folder / n).is_file()), None)
    if path is None:
        raise UserError(f"{folder} has no adapter's weights: {WEIGHTS[0]} is missing")
    tensors = {_full_name(n): t for n, t in read_tensors(path).items()}
    layers = {n: layer for n, layer in linear_layers(model).items() if config.matches(n)}
    if not layers:
        raise no_such_target(config.targets, linear_layers(model))
    wanted: dict[str, tuple[int, ...]] = {}
    for layer, module in layers.items():
        weight = module.weight
        assert isinstance(weight, Tensor | NF4Weight)
        out, width = weight.shape
        rank = config.rank_of(layer)
        wanted[f"{PREFIX}{layer}.lora_A.weight"] = (rank, width)
        wanted[f"{PREFIX}{layer}.lora_B.weight"] = (out, rank)
        if config.use_dora:
            wanted[f"{PREFIX}{layer}.lora_magnitude_vector"] = (out,)
    for tensor, shape in wanted.items():
        if tensor not in tensors:
            raise UserError(f"{path}: the tensor {tensor} is missing, which {ADAPTER_CONFIG} and this base ask for")
        if tuple(tensors[tensor].shape) != shape:
            raise UserError(
                f"{path}: the tensor {tensor} has shape {tuple(tensors[tensor].shape)}, but this base and "
                f"{ADAPTER_CONFIG} ask for {shape}: the adapter was made for another base"
            )
        if not tensors[tensor].is_floating_point():
            raise UserError(f"{path}: the tensor {tensor} has dtype {tensors[tensor].dtype}, which is not a float")
    if strange := sorted(tensors.keys() - wanted.keys()):
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        blocks = len({layer.split(".")[2] for layer in linear_layers(model)})
        raise UserError(
            f"{path}: the tensor {strange[0]} of shape {tuple(tensors[strange[0]].shape)}{more} has no place: this "
            f"base of {blocks} blocks and {ADAPTER_CONFIG} ask for none of that name"
        )
    for layer, part in add_adapter(model, config, name).items():
        for end, parameter in part.named_parameters():
            parameter.copy_(tensors[f"{PREFIX}{layer}.{_file_name(end)}"])


def _full_name(tensor: str) -> str:
    """With the prefix of a GPT2LMHeadModel, which adapters of a bare GPT2Model do not have."""
    layer = tensor.removeprefix(PREFIX)
    return PREFIX + (f"transformer.{layer}" if layer.startswith("h.") else layer)


def read_config(folder: Path) -> LoRAConfig:
    """The LoRAConfig of a PEFT folder's adapter_config.json.

    Raises:
        UserError: it is damaged, or says something that is not computed here; names the field.
    """
    path = folder / ADAPTER_CONFIG
    values = read_json(path)
    for field in ("peft_type", "r", "lora_alpha", "target_modules"):
        if values.get(field) is None:
            raise UserError(f"{path}: the field {field} is missing: get the folder again")
    if values["peft_type"] != "LORA":
        raise UserError(f"{path}: peft_type is {values['peft_type']!r}, only 'LORA' can be loaded")
    for field, value in values.items():
        if field in ONLY and value not in ONLY[field]:
            allowed = " or ".join(map(repr, ONLY[field][:1]))
            raise UserError(f"{path}: {field} is {value!r}, only {allowed} can be loaded")
        if field not in READ | WITHOUT_EFFECT | ONLY.keys() and value:
            raise UserError(f"{path}: {field} is {json.dumps(value)}, only adapters without it can be loaded")
    targets = values["target_modules"]
    if not isinstance(targets, str) and not (isinstance(targets, list) and all(isinstance(t, str) for t in targets)):
        raise UserError(f"{path}: target_modules is {targets!r}, which is neither a list of names nor a string")
    try:
        return LoRAConfig(
            rank=values["r"],
            alpha=values["lora_alpha"],
            targets=targets if isinstance(targets, str) else tuple(targets),
            dropout=values.get("lora_dropout") or 0.0,
            use_rslora=bool(values.get("use_rslora")),
            use_dora=bool(values.get("use_dora")),
            rank_pattern=dict(values.get("rank_pattern") or {}),
            alpha_pattern=dict(values.get("alpha_pattern") or {}),
        )
    except (TypeError, ValueError, OverflowError, UserError) as error:
        raise UserError(f"{path}: {error}") from None


def base_of(folder: Path) -> str:
    """The base that an adapter's folder names: a folder's path, or an id on the hub.

    A relative path is looked for from here, as PEFT does, and then from the adapter's folder.

    Raises:
        UserError: it names none, one that is gone, or another adapter.
    """
    path = folder / ADAPTER_CONFIG
    base = read_json(path).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{path} names no base: write its folder or hub id into the field base_model_name_or_path")
    found = next((p for p in (Path(base), folder / base) if p.exists()), None)
    if found is None:
        if Path(base).is_absolute() or base.startswith(".") or base.count("/") > 1:
            raise UserError(
                f"the base of the adapter {folder} is not at {base} any more: put it back, or write where it is now "
                f"into base_model_name_or_path of {path}"
            )
        return base
    if is_adapter(found):
        raise UserError(f"{path} names {found} as the base, which is an adapter itself: `fastgpt merge` that one first")
    return str(found)


def load_with_base(cls: "type[GPT]", folder: Path, base: str | Path | None = None) -> "GPT":
    """The base of an adapter's folder (or `base`, where one is given) with the adapter active in it."""
    read_config(folder)  # before the base, which may take long
    base = base_of(folder) if base is None else base
    model = load_pretrained(cls, base)
    if adapted_layers(model):
        raise UserError(f"the base {base} is an adapter itself: `fastgpt merge` that one first")
    load_adapter(model, folder)
    return model


def merge_adapter(adapter: str | Path, out: str | Path, base: str | Path | None = None) -> Path:
    """Writes a whole model folder to `out`: an adapter merged into its base, with the tokenizer of either.

    Args:
        base: to use instead of the one that the adapter names.

    Returns:
        The base's folder.

    Raises:
        UserError: `adapter` is no adapter's folder, `out` is there already, or anything that `load_adapter` raises.
    """
    from fastgpt.model.gpt import GPT

    folder = resolve_model_folder(adapter)
    if not is_adapter(folder):
        raise UserError(f"{folder} is no adapter: it has no {ADAPTER_CONFIG}")
    base_folder = local_folder(base_of(folder) if base is None else base)
    with atomic_dir(Path(out)) as partial:
        model = load_with_base(GPT, folder, base_folder)
        model.save_pretrained(partial, eos_token_id=read_json(base_folder / "config.json").get("eos_token_id"))
        source = folder if (folder / "tokenizer.json").is_file() else base_folder
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, partial / name)
    return base_folder
