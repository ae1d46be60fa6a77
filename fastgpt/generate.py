"""Sampling: turns a model and a prompt into more tokens.

At each step: divide the logits by the temperature, keep the `top_k` largest, keep the fewest whose probabilities sum to
at least `top_p` (nucleus sampling: Holtzman et al. 2020, arXiv:1904.09751), and draw from what is left.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgpt.errors import UserError
from fastgpt.model.kv_cache import KVCache

if TYPE_CHECKING:
    from fastgpt.model.gpt import GPT


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises a UserError that names the option and its range, if one is out of it."""
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature must be at least 0 (0 takes the likeliest token), got {temperature}")
    if top_k is not None and top_k < 1:
        raise UserError(f"top-k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top-p must be above 0 and at most 1, got {top_p}")


def filter_logits(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Logits (B, V) with all but the kept ones at -inf: the `top_k` largest, then the nucleus of mass `top_p`."""
    if top_k is not None and top_k < logits.size(-1):
        kept, ids = logits.topk(top_k, dim=-1)  # (B, k); exactly k, also where the k-th is tied
        logits = torch.full_like(logits, -torch.inf).scatter(-1, ids, kept)
    if top_p is not None and top_p < 1:
        ordered, ids = logits.sort(dim=-1, descending=True)  # (B, V)
        probs = ordered.softmax(-1)
        before = probs.cumsum(-1) - probs  # mass of the likelier ones: the first token always has 0
        ordered = ordered.masked_fill(before >= top_p, -torch.inf)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, ids, ordered)
    return logits


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws a token a row.

    Args:
        logits: (B, V).
        temperature: 0 takes the likeliest token.
        generator: of the draw; on the logits' device.

    Returns:
        (B,) int64.

    Raises:
        UserError: an option is out of its range.
    """
    check_sampling(temperature, top_k, top_p)
    if temperature < 1e-6:  # the likeliest has all of the mass by then, and less still would divide by 0 in fp32
        return logits.argmax(-1)
    logits = logits.float()
    # The largest is subtracted first: a small temperature then gives -inf for the others and not inf - inf.
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    probs = filter_logits(logits, top_k, top_p).softmax(-1)
    return torch.multinomial(probs, 1, generator=generator).squeeze(-1)


@torch.inference_mode()
def stream(
    model: "GPT",
    ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Yields the next token of each row, (B,) int64, `max_new_tokens` times.

    When the context is full, its older half is dropped and the newer half is read again, with the cache and without it
    alike. The model's training mode is what it was afterwards, also if the caller stops early.

    Args:
        ids: (B, T) int64, at least one token and at most n_positions.
        seed: of the draws; another each time if None. The global random state is not touched.

    Raises:
        UserError: the prompt is empty or longer than n_positions, or an option is out of its range.
    """
    check_sampling(temperature, top_k, top_p)
    limit = model.config.n_positions
    if ids.size(1) == 0:
        raise UserError("the prompt is empty: give it at least one token")
    if ids.size(1) > limit:
        raise UserError(f"the prompt has {ids.size(1):,} tokens, the model reads at most {limit:,}: shorten it")
    generator = torch.Generator(ids.device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        context, cache, unread = ids, None, ids
        for _ in range(max_new_tokens):
            if context.size(1) > limit:
                context = context[:, -max(1, limit // 2) :]
                cache = None
            if use_cache:
                if cache is None:
                    weight = model.transformer.wte.weight
                    cache, unread = KVCache(model.config, ids.size(0), ids.device, weight.dtype), context
                logits = model(unread, cache, last_only=True)[:, -1]  # (B, V)
            else:
                logits = model(context, last_only=True)[:, -1]
            unread = sample(logits, temperature, top_k, top_p, generator)[:, None]  # (B, 1)
            context = torch.cat([context, unread], dim=1)
            yield unread[:, 0]
    finally:
        model.train(was_training)


def generate(
    model: "GPT",
    ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    use_cache: bool = True,
    eos_id: int | None = None,
) -> Tensor:
    """The prompt with up to `max_new_tokens` more tokens; arguments and errors as for `stream`.

    Args:
        eos_id: a row that has drawn it is filled with it; when all have, generating stops.

    Returns:
        (B, T + new) int64.
    """
    done = torch.zeros(ids.size(0), dtype=torch.bool, device=ids.device)
    new = [ids]
    for token in stream(
        model,
        ids,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        use_cache=use_cache,
    ):
        if eos_id is not None:
            token = token.masked_fill(done, eos_id)
            done |= token == eos_id
        new.append(token[:, None])
        if eos_id is not None and done.all():
            break
    return torch.cat(new, dim=1)
