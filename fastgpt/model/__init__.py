"""GPT-2: its config, the model, its key-value cache, and reading and writing Hugging Face folders."""

from fastgpt.model.config import PRESETS, GPTConfig
from fastgpt.model.gpt import GPT
from fastgpt.model.kv_cache import KVCache

__all__ = ["GPT", "PRESETS", "GPTConfig", "KVCache"]
