"""Text to documents, documents to token shards, shards to batches."""

from fastgpt.data.loader import PackedDataset
from fastgpt.data.read import Document, find_files, read_documents
from fastgpt.data.shards import TokenDataset, prepare

__all__ = ["Document", "PackedDataset", "TokenDataset", "find_files", "prepare", "read_documents"]
