"""Multiple choice by likelihood: the model's answer is the choice that it finds likeliest after the question.

    raw         argmax over the choices c of  log p(c | context) = sum over its tokens of log p(token | all before)
    normalized  argmax of  log p(c | context) / (bytes of c),  so that a long choice does not lose by its length alone

Texts are made as EleutherAI's lm-evaluation-harness makes them, with no examples before the question:

    HellaSwag   "{activity_label}: {ctx_a} {ctx_b}", with ctx_b's first letter large; the choices are the endings.
                Both without the marks that WikiHow's pages left in them ("[header]", "[title]", "[step]").
    ARC         "Question: {question}\\nAnswer:"; the choices are the answers' texts.
    MMLU        "The following are multiple choice questions (with answers) about {subject}.\\n\\n{question}\\n
                A. {first}\\nB. {second}\\n...\\nAnswer:"; the choices are the letters, of one byte each, so that
                raw and normalized agree.

A space stands between context and choice. The harness divides by characters where this divides by bytes of UTF-8,
which are the same in plain English.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastgpt import ops
from fastgpt.errors import UserError
from fastgpt.finetune.dialogues import read_records
from fastgpt.model import GPT
from fastgpt.tokenizer import Tokenizer

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Question:
    """What is scored: each of `choices` after `context` and a space. `answer` is the right one's index."""

    where: str  # its file and line, for errors
    context: str
    choices: list[str]
    answer: int


def read_questions(path: Path, limit: int | None = None) -> tuple[str, list[Question]]:
    """The format of a JSONL file ("hellaswag", "arc" or "mmlu": its first row's fields tell) and its questions.

    Args:
        limit: the first so many only.

    Raises:
        UserError: names the file, the line and the field.
    """
    records = read_records(path)[:limit]
    name, read = _format(records[0][1], records[0][0])
    questions = []
    for where, row in records:
        question = read(row, where)
        if not question.context.strip() or not all(c.strip() for c in question.choices):
            raise UserError(f"{where}: the question or one of its choices is empty: mend or remove that line")
        if len(question.choices) < 2:
            raise UserError(f"{where} has {len(question.choices)} choices: there must be two at least")
        questions.append(question)
    return name, questions


def _format(row: dict[str, Any], where: str) -> tuple[str, Callable[[dict[str, Any], str], Question]]:
    if "endings" in row:
        return "hellaswag", _hellaswag
    if "answerKey" in row:
        return "arc", _arc
    if "answer" in row and "choices" in row:
        return "mmlu", _mmlu
    raise UserError(
        f"{where} is no multiple choice that is known, it has {', '.join(row) or 'no fields'}: HellaSwag has ctx, "
        "endings, label; ARC question, choices, answerKey; MMLU question, choices, answer"
    )


def _get(row: dict[str, Any], field: str, kind: type | tuple[type, ...], where: str) -> Any:
    """row[field], of the type that it must be."""
    if field not in row:
        raise UserError(f"{where}: the field {field} is missing")
    value = row[field]
    if not isinstance(value, kind) or isinstance(value, bool):
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise UserError(f"{where}: the field {field} must be {names}, got {value!r:.60}")
    return value


def _texts(row: dict[str, Any], field: str, where: str) -> list[str]:
    values = _get(row, field, list, where)
    if not all(isinstance(v, str) for v in values):
        raise UserError(f"{where}: the field {field} must be a list of texts")
    return values


def _index(value: str | int, labels: Sequence[str], field: str, where: str) -> int:
    """Which of the labels is meant."""
    if str(value).strip() not in labels:
        raise UserError(f"{where}: {field} is {value!r}, but the choices are {', '.join(labels)}")
    return labels.index(str(value).strip())


def _hellaswag(row: dict[str, Any], where: str) -> Question:
    if "ctx_a" in row and "ctx_b" in row:
        context = f"{_get(row, 'ctx_a', str, where)} {_get(row, 'ctx_b', str, where).capitalize()}"
    else:
        context = _get(row, "ctx", str, where)
    if row.get("activity_label"):
        context = f"{_get(row, 'activity_label', str, where)}: {context}"
    endings = [_without_marks(e) for e in _texts(row, "endings", where)]
    numbers = [str(i) for i in range(len(endings))]
    answer = _index(_get(row, "label", (str, int), where), numbers, "label", where)
    return Question(where, _without_marks(context), endings, answer)


def _without_marks(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _arc(row: dict[str, Any], where: str) -> Question:
    question = _get(row, "question", (str, dict), where)
    if isinstance(question, dict):  # as AI2 published it: {"stem": ..., "choices": [{"text": ..., "label": ...}, ...]}
        choices, question = _get(question, "choices", list, where), _get(question, "stem", str, where)
        if not all(isinstance(c, dict) for c in choices):
            raise UserError(f"{where}: the field choices must be a list of objects with text and label")
        texts = [_get(c, "text", str, where) for c in choices]
        labels = [_get(c, "label", str, where) for c in choices]
    else:  # as the hub has it: {"text": [...], "label": [...]}
        columns = _get(row, "choices", dict, where)
        texts, labels = _texts(columns, "text", where), _texts(columns, "label", where)
        if len(texts) != len(labels):
            raise UserError(f"{where}: choices has {len(texts)} in text but {len(labels)} in label")
    answer = _index(_get(row, "answerKey", (str, int), where), labels, "answerKey", where)
    return Question(where, f"Question: {question}\nAnswer:", texts, answer)


def _mmlu(row: dict[str, Any], where: str) -> Question:
    texts = _texts(row, "choices", where)
    if len(texts) > len(LETTERS) or not all(t.strip() for t in texts):
        raise UserError(f"{where}: the field choices must have at most {len(LETTERS)} texts, and none that is empty")
    letters = list(LETTERS[: len(texts)])
    answer = _get(row, "answer", (str, int), where)
    numbered = isinstance(answer, int) or answer.strip().isdecimal()
    right = _index(answer, [str(i) for i in range(len(texts))] if numbered else letters, "answer", where)
    about = f" about {_get(row, 'subject', str, where).replace('_', ' ')}" if row.get("subject") else ""
    lines = [
        f"The following are multiple choice questions (with answers){about}.",
        "",
        _get(row, "question", str, where).strip(),
        *(f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True)),
        "Answer:",
    ]
    return Question(where, "\n".join(lines), letters, right)


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The ids of `context + continuation`, cut in two at the number of tokens that the context has by itself.

    Spaces at the context's end belong to the continuation: a word's token begins with its space.
    """
    whole = tokenizer.encode(context + continuation)
    cut = min(len(tokenizer.encode(context.rstrip())), len(whole) - 1)  # something is left where a token spans both
    return whole[:cut], whole[cut:]


@torch.inference_mode()
def log_likelihoods(
    model: GPT,
    requests: Sequence[tuple[list[int], list[int]]],
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[float]:
    """log p(continuation | context) of each pair, in nats: the sum over the continuation's tokens.

    Rows go through the model with the longest first, padded on the right, which a causal model does not see; those that
    differ in their last token alone, such as MMLU's four letters, are one row. Logits are made for the continuations
    only. A row of more than n_positions tokens loses its beginning.

    Args:
        requests: (context ids, continuation ids), neither empty, the continuation of at most n_positions tokens.
        batch_size: rows in one forward pass.
        progress: called after each pass with how many rows are done.
    """
    limit = model.config.n_positions
    device = model.classifier.device
    inputs: dict[tuple[int, ...], list[int]] = {}  # what the model reads -> the requests that it answers
    for i, (context, continuation) in enumerate(requests):
        inputs.setdefault(tuple((context + continuation[:-1])[-limit:]), []).append(i)
    rows = sorted(inputs, key=len, reverse=True)
    totals = torch.zeros(len(requests), dtype=torch.float64)
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        T = len(batch[0])
        ids = torch.tensor([row + (0,) * (T - len(row)) for row in batch], device=device)  # (B, T)
        asked: list[int] = []  # for each token of a continuation: its request, the position before it, the token
        places: list[int] = []
        targets: list[int] = []
        for b, row in enumerate(batch):
            for i in inputs[row]:
                continuation = requests[i][1]
                end = b * T + len(row)
                asked += [i] * len(continuation)
                places += range(end - len(continuation), end)
                targets += continuation
        hidden = model.hidden(ids).flatten(0, 1)[torch.tensor(places, device=device)]  # (N, C)
        weight = model.classifier[: model.config.vocab_size]
        losses = ops.linear_cross_entropy(hidden, weight, torch.tensor(targets, device=device), reduction="none")
        totals.index_add_(0, torch.tensor(asked), -losses.double().cpu())
        if progress:
            progress(start + len(batch))
    return totals.tolist()


def multiple_choice(
    model: GPT,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Accuracy, raw and normalized, with the standard error of each mean.

    Returns:
        questions: how many. accuracy, accuracy_normalized: shares in [0, 1]; each with its _stderr,
        sqrt(p (1 - p) / (n - 1)). chance: what guessing gives. cut: how many questions lost their beginning because one
        of their choices did not fit into the context with it.

    Raises:
        UserError: a choice alone has more tokens than the model reads; names the file and the line.
    """
    limit = model.config.n_positions
    requests, cut = [], 0
    for q in questions:
        pairs = [encode_pair(tokenizer, q.context, f" {choice}") for choice in q.choices]
        longest = max(len(continuation) for _, continuation in pairs)
        if longest > limit:
            raise UserError(f"{q.where}: a choice has {longest:,} tokens, the model reads at most {limit:,}: remove it")
        cut += any(len(context) + len(continuation) - 1 > limit for context, continuation in pairs)
        requests += pairs
    scores = iter(log_likelihoods(model, requests, batch_size, progress))
    raw = normalized = 0
    for q in questions:
        log_p = [next(scores) for _ in q.choices]
        per_byte = [s / len(choice.encode("utf-8", "replace")) for s, choice in zip(log_p, q.choices, strict=True)]
        raw += log_p.index(max(log_p)) == q.answer
        normalized += per_byte.index(max(per_byte)) == q.answer
    n = len(questions)
    return {
        "questions": n,
        "accuracy": raw / n,
        "accuracy_stderr": _stderr(raw / n, n),
        "accuracy_normalized": normalized / n,
        "accuracy_normalized_stderr": _stderr(normalized / n, n),
        "chance": sum(1 / len(q.choices) for q in questions) / n,
        "cut": cut,
    }


def _stderr(share: float, n: int) -> float:
    return math.sqrt(share * (1 - share) / max(1, n - 1))
