"""Text to documents, documents to token shards, shards to batches."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgpt.data.documents import Document
    from fastgpt.data.loader import PackedDataset, WindowDataset
    from fastgpt.data.padded import DocumentDataset
    from fastgpt.data.prefetch import Prefetched
    from fastgpt.data.preparation import prepare
    from fastgpt.data.read import Corpus, find_files, read_pieces
    from fastgpt.data.shards import TokenDataset

__all__ = [
    "Corpus",
    "Document",
    "DocumentDataset",
    "PackedDataset",
    "Prefetched",
    "TokenDataset",
    "WindowDataset",
    "find_files",
    "prepare",
    "read_pieces",
]

_HOME = {
    "Corpus": "read",
    "Document": "documents",
    "DocumentDataset": "padded",
    "PackedDataset": "loader",
    "Prefetched": "prefetch",
    "TokenDataset": "shards",
    "WindowDataset": "loader",
    "find_files": "read",
    "prepare": "preparation",
    "read_pieces": "read",
}


def __getattr__(name: str) -> Any:
    # On first use: the processes that encode need no torch, which the loaders import.
    if name in _HOME:
        return getattr(import_module(f"fastgpt.data.{_HOME[name]}"), name)
    raise AttributeError(f"module 'fastgpt.data' has no attribute {name!r}")
