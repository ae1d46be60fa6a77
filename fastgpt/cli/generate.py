"""fastgpt generate"""

import random
import sys
from pathlib import Path

import torch
from rich.console import Console

from fastgpt.errors import UserError
from fastgpt.generate import stream
from fastgpt.model import GPT
from fastgpt.model.hub import resolve_model_folder
from fastgpt.tokenizer import StreamDecoder, Tokenizer
from fastgpt.train import pick_device


def generate(
    *,
    model: Path,
    prompt: str = "",
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = 0.95,
    seed: int | None = None,
    num_samples: int = 1,
    cache: bool = True,
    device: str = "auto",
) -> None:
    """Continue a prompt; the text appears as it is made.

    Args:
        model: Model folder, checkpoint, or run folder (its model, or newest checkpoint).
        prompt: Text to continue; without one it starts a new document.
        max_new_tokens: Stop after so many tokens, or at the end of the text.
        temperature: Below 1 likelier, above 1 wilder; 0 takes the likeliest token each time.
        top_k: Draw from the likeliest k tokens only.
        top_p: Draw from the fewest tokens that have this much of the probability.
        seed: Of the draws; another each time if not given.
        num_samples: How many continuations.
        cache: Keep keys and values, so that a token costs one position and not all.
        device: cpu, cuda, cuda:1, or auto.
    """
    if num_samples < 1 or max_new_tokens < 1:
        raise UserError(
            f"--num-samples and --max-new-tokens must be at least 1, got {num_samples} and {max_new_tokens}"
        )
    folder = resolve_model_folder(model)
    where = pick_device(device)
    tokenizer = Tokenizer.from_pretrained(folder)
    gpt = GPT.from_pretrained(folder, device=where)
    if tokenizer.vocab_size != gpt.config.vocab_size:
        raise tokenizer.mismatch(gpt.config.vocab_size, folder)
    ids = tokenizer.encode(prompt)
    if not ids:
        if tokenizer.eot_id is None:
            raise UserError("this tokenizer has no end-of-text token to start from: give a --prompt")
        ids = [tokenizer.eot_id]
    console = Console(highlight=False, soft_wrap=True)
    first = random.randrange(2**31) if seed is None else seed
    for i in range(num_samples):
        if num_samples > 1:
            console.rule(f"sample {i + 1}", style="dim")
        decoder = StreamDecoder(tokenizer)
        sys.stdout.write(prompt)
        sys.stdout.flush()
        context = torch.tensor([ids], device=where)
        for token in stream(
            gpt,
            context,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=first + i,
            use_cache=cache,
        ):
            token_id = int(token)
            if token_id == tokenizer.eot_id:
                break
            sys.stdout.write(decoder.push(token_id))
            sys.stdout.flush()
        print(decoder.flush())
