"""Text to documents, documents to token shards, shards to batches."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgpt.data.documents import Document
    from fastgpt.data.loader import PackedDataset
    from fastgpt.data.preparation import prepare
    from fastgpt.data.read import Corpus, find_files, read_documents
    from fastgpt.data.shards import TokenDataset

__all__ = ["Corpus", "Document", "PackedDataset", "TokenDataset", "find_files", "prepare", "read_documents"]

_HOME = {
    "Corpus": "read",
    "Document": "documents",
    "PackedDataset": "loader",
    "TokenDataset": "shards",
    "find_files": "read",
    "prepare": "preparation",
    "read_documents": "read",
}


def __getattr__(name: str) -> Any:
    # On first use: the processes that encode need no torch, which the loaders import.
    if name in _HOME:
        return getattr(import_module(f"fastgpt.data.{_HOME[name]}"), name)
    raise AttributeError(f"module 'fastgpt.data' has no attribute {name!r}")
