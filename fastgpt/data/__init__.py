"""Text to documents, documents to token shards, shards to batches."""

from fastgpt.data.loader import PackedDataset, WindowDataset
from fastgpt.data.padded import DocumentDataset
from fastgpt.data.prefetch import Prefetched
from fastgpt.data.read import Document, find_files, read_documents
from fastgpt.data.shards import TokenDataset, prepare

__all__ = [
    "Document",
    "DocumentDataset",
    "PackedDataset",
    "Prefetched",
    "TokenDataset",
    "WindowDataset",
    "find_files",
    "prepare",
    "read_documents",
]
