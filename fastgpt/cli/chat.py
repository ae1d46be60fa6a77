"""fastgpt chat"""

import io
import sys
from contextlib import suppress
from pathlib import Path
from typing import Literal

from fastgpt.chat import HELP, Chat, converse
from fastgpt.errors import UserError
from fastgpt.model import GPT
from fastgpt.model.hub import resolve_model_folder
from fastgpt.template import TEMPLATES
from fastgpt.tokenizer import Tokenizer
from fastgpt.train import pick_device


def chat(
    *,
    model: Path,
    template: Literal["alpaca", "chatml"] | None = None,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = 0.95,
    seed: int | None = None,
    device: str = "auto",
) -> None:
    """Talk to a model in the terminal; or pipe messages in, one a line.

    Args:
        model: Model folder, adapter folder, checkpoint, or run folder.
        template: How messages are written for the model, instead of its own chat template.
        system: What a system message tells the model.
        max_new_tokens: Longest answer.
        temperature: Below 1 likelier, above 1 wilder; 0 takes the likeliest token each time.
        top_k: Draw from the likeliest k tokens only.
        top_p: Draw from the fewest tokens that have this much of the probability.
        seed: Of the draws; another each time if not given.
        device: cpu, cuda, cuda:1, or auto.
    """
    folder = resolve_model_folder(model)
    tokenizer = Tokenizer.from_pretrained(folder)
    if template is None and tokenizer.chat_template is None:
        raise UserError(
            f"{folder} has no chat template, so it was not taught to chat: fine-tune it with `fastgpt finetune "
            "instruct`, or name a --template"
        )
    gpt = GPT.from_pretrained(folder, device=pick_device(device))
    dialogue = Chat(
        gpt,
        tokenizer,
        TEMPLATES[template] if template else None,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if on_terminal:
        with suppress(ImportError):  # Windows has none
            import readline  # noqa: F401 - input() then has a history and can be edited
        print(HELP + "\n")

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def say(line: str) -> None:  # not among the answers, where those go into a file
        print(line, file=sys.stderr, flush=True)

    converse(dialogue, lambda: input("> " if on_terminal else ""), write, say)
    if on_terminal:
        print()
