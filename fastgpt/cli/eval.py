"""fastgpt eval"""

import math
from pathlib import Path
from typing import Literal

from fastgpt.data import PackedDataset, TokenDataset
from fastgpt.errors import UserError
from fastgpt.model import GPT
from fastgpt.model.hub import resolve_model_folder
from fastgpt.tokenizer import Tokenizer
from fastgpt.train import pick_device, validation_loss


def evaluate(
    *,
    model: Path,
    data: Path,
    split: Literal["val", "train"] = "val",
    batch_size: int = 16,
    max_batches: int | None = None,
    device: str = "auto",
) -> None:
    """Loss, perplexity and bits per byte of a model on token shards.

    Args:
        model: Model folder, checkpoint, or run folder (its newest checkpoint).
        data: Folder of token shards, prepared with the model's tokenizer.
        split: Which part of the shards.
        batch_size: Sequences in one forward pass.
        max_batches: Only so many batches, spread evenly over the split; all of it if not given.
        device: cpu, cuda, cuda:1, or auto.
    """
    folder = resolve_model_folder(model)
    shards = TokenDataset.open(data, split)
    if Tokenizer.from_pretrained(folder).hash != shards.meta["tokenizer_hash"]:
        raise UserError(
            f"{data} was prepared with another tokenizer than {folder} has: prepare it with `--tokenizer {folder}`"
        )
    gpt = GPT.from_pretrained(folder, device=str(pick_device(device)))
    packed = PackedDataset(shards, gpt.config.n_positions, seed=0, shuffle=False)
    loss, tokens = validation_loss(gpt, packed, batch_size, max_batches)
    part = shards.meta["splits"][split]
    bits_per_byte = loss / math.log(2) * part["tokens"] / part["bytes"]
    print(f"{folder} on {split} of {data}: {tokens:,} tokens")
    print(f"loss {loss:.4f} nats per token, perplexity {math.exp(loss):.2f}, {bits_per_byte:.3f} bits per byte")
