"""Loss, perplexity and bits per byte of a model on token shards."""

import math
from pathlib import Path
from typing import Any

from fastgpt.data import PackedDataset, TokenDataset
from fastgpt.errors import UserError
from fastgpt.model import GPT
from fastgpt.tokenizer import Tokenizer
from fastgpt.train import validation_loss


def open_split(data: Path, split: str, model_folder: Path) -> TokenDataset:
    """A split of token shards, which must have been prepared with the tokenizer of `model_folder`.

    Raises:
        UserError: they were not, or something is missing.
    """
    shards = TokenDataset.open(data, split)
    if Tokenizer.from_pretrained(model_folder).hash != shards.meta["tokenizer_hash"]:
        raise UserError(
            f"{data} was prepared with another tokenizer than {model_folder} has: "
            f"prepare it with `--tokenizer {model_folder}`"
        )
    return shards


def perplexity(
    model: GPT,
    shards: TokenDataset,
    batch_size: int = 16,
    max_batches: int | None = None,
    document_masks: bool = False,
) -> dict[str, Any]:
    """Mean loss in nats per token over windows of n_positions tokens, and what follows from it.

    Bits per byte compares models of different tokenizers: the loss in bits, over the bytes of text that a token stands
    for on average in this split.

    Args:
        max_batches: only so many batches, spread evenly over the split; all of it if None.
        document_masks: no token sees another document, as where the model was trained so.
    """
    packed = PackedDataset(shards, model.config.n_positions, seed=0, shuffle=False, document_masks=document_masks)
    loss, tokens = validation_loss(model, packed, batch_size, max_batches)
    part = shards.meta["splits"][shards.split]
    return {
        "data": str(shards.folder),
        "split": shards.split,
        "tokens": tokens,
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / math.log(2) * part["tokens"] / part["bytes"],
    }
