"""From raw text to a GPT that you trained yourself, on fused kernels that you can read."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["GPT", "GPTConfig", "Tokenizer", "UserError", "ops", "train"]

if TYPE_CHECKING:
    from fastgpt import ops, train
    from fastgpt.errors import UserError
    from fastgpt.model import GPT, GPTConfig
    from fastgpt.tokenizer import Tokenizer

_HOME = {
    "GPT": "fastgpt.model",
    "GPTConfig": "fastgpt.model",
    "Tokenizer": "fastgpt.tokenizer",
    "UserError": "fastgpt.errors",
}


def __getattr__(name: str) -> Any:
    # On first use: `fastgpt --help` need not wait for torch, nor someone who wants only `fastgpt.ops` for the rest.
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in ("ops", "train"):
        return import_module(f"fastgpt.{name}")
    raise AttributeError(f"module 'fastgpt' has no attribute {name!r}")
