"""A model's responses to instructions that it has not seen, and how near they are to the expected ones.

    exact match   the same words: what `words` gives is equal (with no words at all, the stripped texts are)
    ROUGE-L       Lin 2004: L = length of the longest common subsequence of the two word lists,
                  P = L / words of the answer,  R = L / words of the expected,  F1 = 2 P R / (P + R)

Words are the runs of letters and digits of the casefolded text: case, punctuation and spaces do not count.
"""

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from fastgpt.chat import turn_ends
from fastgpt.errors import UserError
from fastgpt.model import GPT
from fastgpt.model.kv_cache import KVCache
from fastgpt.template import Message, encode_prompt
from fastgpt.tokenizer import Tokenizer


def words(text: str) -> list[str]:
    """The runs of letters and digits in the casefolded text."""
    return re.findall(r"[^\W_]+", text.casefold())


def exact_match(answer: str, expected: str) -> bool:
    a, b = words(answer), words(expected)
    return a == b if a or b else answer.strip() == expected.strip()


def longest_common_subsequence(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Its length, in len(a) * len(b) steps."""
    row = [0] * (len(b) + 1)  # row[j]: of the part of a that was read and b[:j]
    for x in a:
        diagonal = 0
        for j, y in enumerate(b):
            above = row[j + 1]
            row[j + 1] = diagonal + 1 if x == y else max(above, row[j])
            diagonal = above
    return row[-1]


def rouge_l(answer: str, expected: str) -> float:
    """ROUGE-L F1 in [0, 1]; 0 where either has no words."""
    a, b = words(answer), words(expected)
    return 2 * longest_common_subsequence(a, b) / (len(a) + len(b)) if a and b else 0.0


@torch.inference_mode()
def greedy(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_ids: Collection[int] = (),
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """The likeliest next token again and again, for each prompt: its new ids, up to the first of `end_ids`.

    Prompts of like lengths go together. A batch is read up to the end of its shortest prompt at once; from there a step
    gives each row its own prompt's next token, or where that has ended, the model's.

    Args:
        prompts: at least one id each, at most n_positions - max_new_tokens.
        progress: called after each batch with how many prompts are done.
    """
    results: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    device, dtype = model.classifier.device, model.transformer.wte.weight.dtype
    ends = torch.tensor(sorted(end_ids), device=device)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        lengths = torch.tensor([len(prompts[i]) for i in batch], device=device)
        width = len(prompts[batch[0]]) + max_new_tokens
        ids = torch.tensor([[*prompts[i], *[0] * (width - len(prompts[i]))] for i in batch], device=device)  # (B, T)
        cache = KVCache(model.config, len(batch), device, dtype)
        done = torch.zeros(len(batch), dtype=torch.bool, device=device)
        read = 0
        for t in range(len(prompts[batch[-1]]), width):
            token = model(ids[:, read:t], cache, last_only=True)[:, -1].argmax(-1)  # (B,)
            read = t
            answering = t >= lengths
            ids[:, t] = torch.where(answering, token, ids[:, t])
            done |= t + 1 >= lengths + max_new_tokens
            done |= answering & torch.isin(token, ends)
            if done.all():
                break
        for i, row in zip(batch, ids.tolist(), strict=True):
            new = row[len(prompts[i]) : len(prompts[i]) + max_new_tokens]
            end = next((n for n, token in enumerate(new) if token in end_ids), max_new_tokens)
            results[i] = new[:end]
        if progress:
            progress(start + len(batch))
    return results


def respond(
    model: GPT,
    tokenizer: Tokenizer,
    dialogues: Sequence[Sequence[Message]],
    max_new_tokens: int,
    template: str | None = None,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[dict[str, Any]], int]:
    """The model's answer in place of each dialogue's last message, which is the expected one.

    Args:
        max_new_tokens: of an answer; below n_positions. A prompt that leaves less room loses its beginning.
        template: Jinja source; the tokenizer's `chat_template` if not given.

    Returns:
        {"prompt", "expected", "answer"} of each dialogue, all texts; and how many prompts were cut.

    Raises:
        UserError: there is no template, or it does not take a dialogue.
    """
    room = model.config.n_positions - max_new_tokens
    prompts = []
    for i, dialogue in enumerate(dialogues, 1):
        try:
            prompts.append(encode_prompt(tokenizer, list(dialogue[:-1]), template))
        except UserError as error:
            raise UserError(f"dialogue {i}: {error}") from None
    end_ids, end_texts = turn_ends(tokenizer, template)
    answers = greedy(model, [p[-room:] for p in prompts], max_new_tokens, end_ids, batch_size, progress)
    items = []
    for dialogue, ids in zip(dialogues, answers, strict=True):
        answer = tokenizer.decode(ids)
        for text in end_texts:
            answer = answer.partition(text)[0]
        *before, last = dialogue
        prompt = (
            before[0]["content"] if len(before) == 1 else "\n\n".join(f"{m['role']}: {m['content']}" for m in before)
        )
        items.append({"prompt": prompt, "expected": last["content"], "answer": answer.strip()})
    return items, sum(len(p) > room for p in prompts)


def score(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of exact match and ROUGE-L, as shares; and the items, each with its own, which are added to it."""
    for item in items:
        item["exact_match"] = exact_match(item["answer"], item["expected"])
        item["rouge_l"] = rouge_l(item["answer"], item["expected"])
    n = len(items)
    means = {name: sum(item[name] for item in items) / n for name in ("exact_match", "rouge_l")}
    return {"count": n, **means, "items": items}
