"""One evaluation: all that is asked of a model, in one call, each part written down as soon as it is there."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch

import fastgpt
from fastgpt.errors import UserError
from fastgpt.evaluate import report
from fastgpt.evaluate.judge import Judge
from fastgpt.evaluate.multiple_choice import multiple_choice, read_questions
from fastgpt.evaluate.perplexity import open_split, perplexity
from fastgpt.evaluate.responses import respond, score
from fastgpt.finetune.dialogues import read_dialogues
from fastgpt.model import GPT
from fastgpt.model.hub import resolve_model_folder
from fastgpt.template import TEMPLATES
from fastgpt.tokenizer import Tokenizer
from fastgpt.train import option, pick_device


@dataclass
class EvalConfig:
    """Perplexity of a model on shards, multiple choice by likelihood, and its responses to instructions."""

    model: Path
    """Model folder, checkpoint, or run folder (its model, or newest checkpoint)."""
    data: Path | None = None
    """Folder of token shards, prepared with the model's tokenizer: loss, perplexity, bits per byte."""
    choices: tuple[Path, ...] = ()
    """HellaSwag-, ARC- or MMLU-style JSONL files; the fields tell which."""
    responses: Path | None = None
    """Dialogues that the model has not seen (Alpaca, ShareGPT or OpenAI messages): its responses, scored."""
    judge_url: str | None = None
    """OpenAI-compatible API, such as https://api.openai.com/v1, whose model scores each response too; the key is read
    from OPENAI_API_KEY."""
    judge_model: str | None = None
    """Name of the judge there."""
    out: Path | None = None
    """Folder for eval.json, eval.md and responses.jsonl; only printed if not given."""
    limit: int | None = None
    """The first so many questions and dialogues of each file only."""
    split: Literal["val", "train"] = "val"
    """Which part of the shards."""
    batch_size: int = 16
    """Sequences in one forward pass."""
    max_batches: int | None = None
    """Only so many batches of the shards, spread evenly over the split; all of it if not given."""
    document_masks: bool = False
    """On the shards let no token see another document, as `fastgpt train --document-masks` does."""
    max_new_tokens: int = 256
    """Tokens in one response at the most; half of what the model reads, if that is less."""
    template: Literal["alpaca", "chatml"] | None = None
    """Chat template for the instructions; the tokenizer's own if not given."""
    device: str = "auto"
    """cpu, cuda, cuda:1, or auto."""

    def __post_init__(self) -> None:
        if self.data is None and not self.choices and self.responses is None:
            raise UserError("nothing to evaluate: give --data, --choices or --responses")
        if (self.judge_url is None) != (self.judge_model is None):
            raise UserError("--judge-url and --judge-model go together: give both or neither")
        if self.judge_url is not None and self.responses is None:
            raise UserError("--judge-url is for --responses: give both")
        for name in ("limit", "batch_size", "max_batches", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{option(name)} must be at least 1, got {value}")


def evaluate(
    config: EvalConfig,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """What eval.json holds: "model" and how it was run, then "perplexity", "choices", "responses" as asked for.

    All input is read before the model is, so that what is wrong with it shows at once.

    Args:
        say: called with each line for the terminal.
        progress: called with how many texts of a part are done, while it goes on.

    Raises:
        UserError: anything that a user can put right; with `config.out`, the parts that were done are kept.
    """
    c = config
    if c.out is not None and (c.out / "eval.json").exists():
        raise UserError(f"{c.out} already holds an evaluation: name another --out, or remove it")
    judge = None
    if c.judge_url is not None and c.judge_model is not None:
        judge = Judge(c.judge_url, c.judge_model, os.environ.get("OPENAI_API_KEY"))
    folder = resolve_model_folder(c.model)
    shards = open_split(c.data, c.split, folder) if c.data is not None else None
    files = [(path, *read_questions(path, c.limit)) for path in c.choices]
    dialogues = read_dialogues(c.responses)[: c.limit] if c.responses is not None else []
    tokenizer = Tokenizer.from_pretrained(folder)
    if dialogues and c.template is None and tokenizer.chat_template is None:
        raise UserError(f"{folder} has no chat template to write the instructions in: name one with --template")
    device = pick_device(c.device)
    model = GPT.from_pretrained(folder, device=device)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise tokenizer.mismatch(model.config.vocab_size, folder)

    results: dict[str, Any] = {
        "model": str(folder),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "fastgpt": fastgpt.__version__,
        "torch": torch.__version__,
        "device": str(device),
        "limit": c.limit,
    }

    def done(part: str, found: dict[str, Any]) -> None:
        for line in report.lines(str(folder), part, found):
            say(line)
        if c.out is not None:
            report.write(c.out, results)

    if shards is not None:
        results["perplexity"] = perplexity(model, shards, c.batch_size, c.max_batches, c.document_masks)
        done("perplexity", results["perplexity"])
    for path, name, questions in files:
        scores = multiple_choice(model, tokenizer, questions, c.batch_size, progress)
        found = {"file": str(path), "format": name, **scores}
        results.setdefault("choices", []).append(found)
        done("choices", found)
    if dialogues:
        template = TEMPLATES[c.template] if c.template else None
        new_tokens = min(c.max_new_tokens, model.config.n_positions // 2)
        items, cut = respond(model, tokenizer, dialogues, new_tokens, template, c.batch_size, progress)
        results["responses"] = {
            "file": str(c.responses),
            "template": c.template or "tokenizer",
            "max_new_tokens": new_tokens,
            "cut": cut,
            **score(items),
        }
        done("responses", results["responses"])
        if judge is not None:
            results["responses"] |= judge_responses(judge, items)
            done("responses", results["responses"])
    if c.out is not None:
        say(f"written: {c.out / 'eval.json'}, {c.out / 'eval.md'}")
    return results


def judge_responses(judge: Judge, items: list[dict[str, Any]]) -> dict[str, Any]:
    """The judge's mean score, how many replies were none, and each item's score, which is added to it."""
    replies = judge.scores([{k: item[k] for k in ("prompt", "expected", "answer")} for item in items])
    for item, reply in zip(items, replies, strict=True):
        item |= reply
    given = [r["judge"] for r in replies if r["judge"] is not None]
    mean = sum(given) / len(given) if given else None
    return {"judge": mean, "judge_model": judge.model, "unscored": len(items) - len(given), "items": items}
