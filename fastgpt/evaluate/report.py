"""What an evaluation found, as JSON and as a page of Markdown that a person reads."""

import json
from pathlib import Path
from typing import Any

from fastgpt.files import atomic_write, explained

SCORES = ("raw", "normalized", "chance", "exact match", "ROUGE-L", "judge")  # of the tables' columns


def write(folder: Path, results: dict[str, Any]) -> None:
    """eval.json and eval.md, and with responses responses.jsonl, one line each."""
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "eval.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    atomic_write(folder / "eval.md", markdown(results))
    if "responses" in results:
        lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in results["responses"]["items"]]
        atomic_write(folder / "responses.jsonl", "".join(lines))


def markdown(results: dict[str, Any]) -> str:
    """The page, from what eval.json holds."""
    parts = [f"# Evaluation of {_inline(results['model'])}"]
    parts.append(f"{results['date']}, fastgpt {results['fastgpt']}, torch {results['torch']}, on {results['device']}.")
    if results["limit"] is not None:
        parts.append(f"Of each file of questions or instructions, the first {results['limit']:,} at the most.")
    if p := results.get("perplexity"):
        parts += ["## Perplexity", _table(*_perplexity(p))]
    if choices := results.get("choices"):
        parts += ["## Multiple choice", _table(*_choices(choices))]
        parts.append(
            "Shares of right answers in percent, ± one standard error. The answer is the choice of the largest "
            "log-likelihood (raw), or of the largest per byte (normalized)."
        )
        parts += [cut for c in choices if (cut := _cut(c["cut"], c["questions"], f"questions of {c['file']}"))]
    if responses := results.get("responses"):
        items = responses["items"]
        parts += ["## Responses", _table(*_responses(responses))]
        parts.append(
            "Exact match takes the same words for the same answer, whatever their case and punctuation. ROUGE-L is the "
            "F1 of the longest common subsequence of words. Both are means, in percent."
        )
        if "judge" in responses:
            parts.append(
                f"The judge is {_inline(responses['judge_model'])}, from 0 to 100. Replies that are no such number "
                f"count for nothing: {responses['unscored']:,} of {len(items):,}."
            )
        if cut := _cut(responses["cut"], len(items), "prompts"):
            parts.append(cut)
        for i, item in enumerate(items, 1):
            scores = [f"exact match {'yes' if item['exact_match'] else 'no'}", f"ROUGE-L {100 * item['rouge_l']:.1f}"]
            if "judge" in item:
                scores.append(f"judge {'none' if item['judge'] is None else item['judge']}")
            parts += [f"### {i}. {', '.join(scores)}"]
            parts += ["Prompt:", _quote(item["prompt"]), "Expected:", _quote(item["expected"])]
            parts += ["Answer:", _quote(item["answer"])]
    return "\n\n".join(parts) + "\n"


def lines(model: str, part: str, found: dict[str, Any]) -> list[str]:
    """What the terminal says of one part of the results."""
    if part == "perplexity":
        return [
            f"{model} on {found['split']} of {found['data']}: {found['tokens']:,} tokens",
            f"loss {found['loss']:.4f} nats per token, perplexity {found['perplexity']:.2f}, "
            f"{found['bits_per_byte']:.3f} bits per byte",
        ]
    if part == "choices":
        count, what, (head, rows) = found["questions"], f"{found['format']} questions", _choices([found])
    else:
        count, what, (head, rows) = found["count"], "prompts", _responses(found)
    scores = [f"{name} {value}" for name, value in zip(head, rows[0], strict=True) if name in SCORES]
    cut = _cut(found["cut"], count, what)
    return [f"{model} on {found['file']}: {count:,} {what}", ", ".join(scores), *([cut] if cut else [])]


def _perplexity(p: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    head = ["data", "split", "tokens", "loss (nats per token)", "perplexity", "bits per byte"]
    values = [f"{p['tokens']:,}", f"{p['loss']:.4f}", f"{p['perplexity']:.2f}", f"{p['bits_per_byte']:.3f}"]
    return head, [[p["data"], p["split"], *values]]


def _choices(found: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    def share(c: dict[str, Any], name: str) -> str:
        return f"{100 * c[name]:.1f} ± {100 * c[name + '_stderr']:.1f}"

    rows = [
        [
            c["file"],
            c["format"],
            f"{c['questions']:,}",
            share(c, "accuracy"),
            share(c, "accuracy_normalized"),
            f"{100 * c['chance']:.1f}",
        ]
        for c in found
    ]
    return ["file", "format", "questions", "raw", "normalized", "chance"], rows


def _responses(r: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    head, row = ["file", "prompts", "exact match", "ROUGE-L"], [r["file"], f"{r['count']:,}"]
    row += [f"{100 * r['exact_match']:.1f}", f"{100 * r['rouge_l']:.1f}"]
    if "judge" in r:
        head, row = [*head, "judge"], [*row, "none" if r["judge"] is None else f"{r['judge']:.1f}"]
    return head, [row]


def _cut(count: int, of: int, what: str) -> str:
    return f"{count:,} of {of:,} {what} were too long and lost their beginning." if count else ""


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_inline(cell) for cell in line) + " |" for line in lines)


def _inline(text: str) -> str:
    """Text that stays on its line and in its cell."""
    return " ".join(text.split()).replace("|", "\\|")


def _quote(text: str) -> str:
    """A code block, longer fenced than any fence within: what a model says is shown, and not rendered."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"
