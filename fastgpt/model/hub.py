"""Hugging Face GPT-2 folders, read and written: config.json and model.safetensors, in their names and layouts.

HF keeps the four projections of a block as (in, out) ("Conv1D"); ours are nn.Linear's (out, in), so those are
transposed on the way in and out, and the vocabulary's padding rows are added and removed.
"""

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastgpt.errors import UserError
from fastgpt.files import atomic_write, explained
from fastgpt.model.config import GPTConfig
from fastgpt.model.lora import plain_parameters

if TYPE_CHECKING:
    from fastgpt.model.classifier import GPTClassifier
    from fastgpt.model.gpt import GPT

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# Constants that old files carry: the causal mask and what it fills with.
BUFFERS = (".attn.bias", ".attn.masked_bias")
ADAPTER_CONFIG = "adapter_config.json"  # what tells a PEFT folder (see adapter.py)
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def resolve_model_folder(path: str | Path) -> Path:
    """The model folder that a user means by `path`: itself, or of a run folder what the run made: its model/ where it
    has finished one, else its newest checkpoint. An adapter's folder (see `fastgpt.model.adapter`) counts as a model's.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"no model at {path}: name a model folder, a checkpoint or a run folder")
    if (path / "checkpoints").is_dir():
        if _is_model(path / "model"):
            return path / "model"
        found = {
            int(match[1]): p
            for p in (path / "checkpoints").iterdir()
            if (match := re.fullmatch(r"step_(\d+)", p.name)) and _is_model(p)
        }
        if not found:
            raise UserError(f"the run {path} has no checkpoint yet: let it train on, with --resume")
        return found[max(found)]
    if not _is_model(path):
        raise UserError(f"{path} is no model folder: it has no config.json (nor an adapter's {ADAPTER_CONFIG})")
    return path


def _is_model(path: Path) -> bool:
    return (path / "config.json").is_file() or is_adapter(path)


def is_adapter(folder: Path) -> bool:
    """Whether it is a PEFT folder, which holds an adapter and names its base."""
    return (folder / ADAPTER_CONFIG).is_file()


def load_pretrained(cls: "type[GPT]", path: str | Path) -> "GPT":
    """The model of a folder or of a hub id, on the CPU in float32; of an adapter, its base with the adapter active."""
    folder = local_folder(path)
    if is_adapter(folder):
        from fastgpt.model.adapter import load_with_base

        return load_with_base(cls, folder)
    config = read_config(folder)
    tensors = read_weights(folder)
    if "score.weight" in tensors:
        raise UserError(f"{folder} is a classifier, which continues no text: ask it with `fastgpt classify`")
    model = cls(config)
    fill(model, tensors, folder)
    return model


def local_folder(path: str | Path) -> Path:
    """The model folder that `path` stands for; a hub id's is downloaded."""
    folder = Path(path)
    if not folder.exists() and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path)):
        folder = _download(str(path))
    return resolve_model_folder(folder)


def read_config(folder: Path) -> GPTConfig:
    """The GPTConfig of a model folder's config.json."""
    path = folder / "config.json"
    return GPTConfig.from_hf(read_json(path), str(path))


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file of a model folder holds."""
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError("not an object")
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): get the folder again") from None
    return values


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f"no folder {name}; to load it from the Hugging Face hub, `pip install huggingface_hub` first"
        ) from None
    try:
        files = [
            "config.json",
            ADAPTER_CONFIG,
            "*.safetensors",
            "*.safetensors.index.json",
            "tokenizer*.json",
            "chat_template.jinja",
        ]
        return Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:  # many kinds: no network, no such id, no access
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"no folder {name}, and the Hugging Face hub did not give a model of that id: {first}"
        ) from None


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder by name, from whichever of the four layouts it has."""
    name = next((n for n in WEIGHTS if (folder / n).is_file()), None)
    if name is None:
        raise UserError(f"{folder} has no weights: none of {', '.join(WEIGHTS)} is there")
    if not name.endswith(".index.json"):
        return read_tensors(folder / name)
    try:
        shards = sorted(set(json.loads((folder / name).read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{folder / name} is damaged: it is no index of shards; get the folder again") from None
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise UserError(f"{folder / shard} is missing, though {name} names it: get the folder again")
        tensors |= read_tensors(folder / shard)
    return tensors


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors by name of a .safetensors file or of one that torch wrote; no code in it is run."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        tensors = torch.load(path, map_location="cpu", weights_only=True)  # runs no code from the file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or cut short ({error}): get it again") from None
    except Exception as error:  # pickle, zip and torch each have their own
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read as plain weights ({first}): get it again, or as .safetensors") from None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UserError(f"{path} holds something else than a model's weights by name")
    return tensors


@torch.no_grad()
def fill(model: "GPT | GPTClassifier", tensors: dict[str, Tensor], folder: Path) -> None:
    """Copies the tensors of a file into the model; every one must be there, fit, and have a place."""
    # GPT2Model's own files, the hub's `gpt2` among them, have no prefix.
    given = {
        n if n.startswith(("transformer.", "lm_head.", "score.")) else f"transformer.{n}": t
        for n, t in tensors.items()
        if not n.endswith(BUFFERS)
    }
    if model.config.tie_word_embeddings:
        given.pop("lm_head.weight", None)  # the same numbers as wte
    wanted = dict(model.named_parameters())
    for name, parameter in wanted.items():
        if name not in given:
            raise UserError(f"{folder}: the tensor {name} is missing; its config.json asks for it")
        tensor = given.pop(name)
        if name.endswith(TRANSPOSED):
            tensor = tensor.T if tensor.dim() == 2 else tensor
        rows = model.config.vocab_size if _is_padded(name) else parameter.size(0)
        shape = (rows, *parameter.shape[1:])
        if tuple(tensor.shape) != shape:
            order = -1 if name.endswith(TRANSPOSED) else 1
            raise UserError(
                f"{folder}: the tensor {name} has shape {tuple(tensor.shape)[::order]}, "
                f"but its config.json asks for {shape[::order]}"
            )
        if not tensor.is_floating_point():
            raise UserError(f"{folder}: the tensor {name} has dtype {tensor.dtype}, which is not a float")
        parameter[:rows] = tensor
    if given:
        more = f" and {len(given) - 1} more" if len(given) > 1 else ""
        raise UserError(f"{folder}: the tensor {min(given)}{more} has no place in a GPT-2 of its config.json")


def _is_padded(name: str) -> bool:
    return name in ("transformer.wte.weight", "lm_head.weight")


def save_pretrained(
    model: "GPT | GPTClassifier", folder: Path, eos_token_id: int | None, more: dict[str, Any] | None = None
) -> None:
    """Writes config.json, with the fields `more`, and model.safetensors; each appears whole or not at all."""
    tensors = {}
    for name, tensor in plain_parameters(model):
        if _is_padded(name):
            tensor = tensor[: model.config.vocab_size]
        if name.endswith(TRANSPOSED):
            tensor = tensor.T
        tensors[name] = tensor.contiguous().cpu()
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / "model.safetensors", tensors)
    # Without these two, transformers takes 50256 for the end of text, which a small vocabulary does not have.
    ends = {"bos_token_id": eos_token_id, "eos_token_id": eos_token_id}
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    config = {**model.config.to_hf(), **ends, "torch_dtype": dtype, **(more or {})}
    atomic_write(folder / "config.json", json.dumps(config, indent=1) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a .safetensors file in one step: it appears whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
