"""Talking to a model: answers as they are made, a dialogue that stays within the context, and the terminal's commands.

prompt = template(system?, turns that still fit, the user's message)      the oldest turns are dropped first
answer = tokens until one that ends a turn, or the text that begins the user's next one
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fastgpt.errors import UserError
from fastgpt.files import atomic_write
from fastgpt.generate import check_sampling, stream
from fastgpt.model import GPT
from fastgpt.template import Message, encode_prompt, render
from fastgpt.tokenizer import StreamDecoder, Tokenizer

HELP = """/reset       forget the dialogue
/save FILE   add the dialogue to FILE, as a line that `fastgpt finetune instruct` reads
/help        show this
/exit        leave; Ctrl-D does too, and Ctrl-C stops an answer"""


def turn_ends(tokenizer: Tokenizer, template: str | None = None) -> tuple[set[int], list[str]]:
    """What ends an answer: special tokens, and texts that a template puts between it and the next user message."""
    answer, question = "\ufdd0", "\ufdd1"  # which no template has of its own
    messages: list[Message] = [
        {"role": "user", "content": "a question"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": question},
    ]
    between = render(tokenizer, messages, template).partition(answer)[2].partition(question)[0]
    names = sorted(tokenizer.special_tokens, key=len, reverse=True)
    pieces = re.split("|".join(map(re.escape, names)), between) if names else [between]
    ids = {tokenizer.special_tokens[name] for name in names if name in between}
    if tokenizer.eot_id is not None:
        ids.add(tokenizer.eot_id)
    return ids, [piece.strip() for piece in pieces if piece.strip()]


def stream_answer(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: list[int],
    template: str | None = None,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = 0.95,
    seed: int | None = None,
) -> Iterator[str]:
    """The text of an assistant's next message, as it is made; it ends at the context's end at the latest.

    Args:
        prompt: what `encode_prompt` gave.
        template: Jinja source; the tokenizer's `chat_template` if not given.

    Raises:
        UserError: the prompt leaves no room in the context, or an option is out of its range.
    """
    stop_ids, stop_texts = turn_ends(tokenizer, template)
    room = model.config.n_positions - len(prompt)
    if room < 1:
        raise UserError(
            f"the prompt has {len(prompt):,} tokens, which leaves no room for an answer in the "
            f"{model.config.n_positions:,} that the model reads: shorten it"
        )
    ids = torch.tensor([prompt], device=next(model.parameters()).device)
    decoder, text = StreamDecoder(tokenizer), ""
    new = min(max_new_tokens, room)
    for token in stream(model, ids, new, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed):
        if int(token) in stop_ids:
            break
        text += decoder.push(int(token))
        if found := [text.index(stop) for stop in stop_texts if stop in text]:
            yield text[: min(found)]
            return
        # What may still become a stop's text is held back.
        held = max((n for stop in stop_texts for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        yield text[: len(text) - held]
        text = text[len(text) - held :]
    yield text + decoder.flush()


class Chat:
    """A dialogue with a model.

    Args:
        template: Jinja source; the tokenizer's `chat_template` if not given.
        system: what a system message says, which is never dropped.
        seed: of the answers' draws; others each time if None.
        options: of `stream_answer`.

    Raises:
        UserError: there is no template, it does not take a dialogue, or an option is out of its range.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        template: str | None = None,
        *,
        system: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.8,
        top_k: int | None = 50,
        top_p: float | None = 0.95,
        seed: int | None = None,
    ) -> None:
        check_sampling(temperature, top_k, top_p)
        if max_new_tokens < 1:
            raise UserError(f"max-new-tokens must be at least 1, got {max_new_tokens}")
        self.model, self.tokenizer, self.template, self.seed = model, tokenizer, template, seed
        self.max_new_tokens, self.temperature, self.top_k, self.top_p = max_new_tokens, temperature, top_k, top_p
        self.system: list[Message] = [{"role": "system", "content": system.strip()}] if system else []
        self.reset()
        turn_ends(tokenizer, template)  # a template that cannot be used is known before the first message

    def reset(self) -> None:
        self.turns: list[Message] = []
        self.dropped = 0
        """How many of the oldest messages are no longer seen."""
        self.answers = 0

    def reply(self, text: str) -> Iterator[str]:
        """The answer to a user's message, as it is made; then both are part of the dialogue.

        Closed before its end, or interrupted, it keeps what was said until then.

        Raises:
            UserError: the message does not fit into the context; the dialogue is as before.
        """
        text = text.encode("utf-8", "replace").decode().strip()  # half characters come from a terminal's bad bytes
        turns: list[Message] = [*self.turns, {"role": "user", "content": text}]
        prompt = self._fit(turns)
        self.answers += 1
        said = ""
        try:
            for piece in stream_answer(
                self.model,
                self.tokenizer,
                prompt,
                self.template,
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                seed=None if self.seed is None else self.seed + self.answers - 1,
            ):
                said += piece
                yield piece
        finally:
            if said.strip():
                self.turns = [*turns, {"role": "assistant", "content": said.strip()}]

    def _fit(self, turns: list[Message]) -> list[int]:
        """The prompt of the system message and of as many of the newest turns as leave room for an answer."""
        limit = self.model.config.n_positions
        wanted = min(self.max_new_tokens, limit // 4)  # a short context is not given to the answer alone
        dropped = self.dropped
        while True:
            prompt = encode_prompt(self.tokenizer, [*self.system, *turns[dropped:]], self.template)
            if len(prompt) + wanted <= limit or (dropped + 1 == len(turns) and len(prompt) < limit):
                self.dropped = dropped
                return prompt
            if dropped + 1 == len(turns):
                raise UserError(
                    f"that makes a prompt of {len(prompt):,} tokens, the model reads at most {limit:,}: shorten it"
                )
            dropped += 2

    def save(self, path: str | Path) -> None:
        """Adds the dialogue to a file as one line of OpenAI's `messages` JSON Lines; makes the file if need be.

        Raises:
            UserError: nothing was said yet, or the file cannot be written.
        """
        if not self.turns:
            raise UserError("there is no dialogue to save yet")
        path = Path(path)
        line = json.dumps({"messages": [*self.system, *self.turns]}, ensure_ascii=False) + "\n"
        try:
            before = path.read_bytes() if path.exists() else b""
            separator = b"" if not before or before.endswith(b"\n") else b"\n"
            atomic_write(path, before + separator + line.encode())
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None


def converse(chat: Chat, read: Callable[[], str], write: Callable[[str], object], say: Callable[[str], object]) -> None:
    """Reads messages and commands until their end.

    Args:
        read: the next line; raises EOFError at the end, as `input` does.
        write: takes an answer piece by piece.
        say: takes a line of ours.
    """
    while True:
        try:
            line = read().strip()
            if line == "/exit":
                return
            try:
                _obey(chat, line, write, say)
            except UserError as error:
                say(f"({error})")
        except EOFError:
            return
        except KeyboardInterrupt:  # while nothing is being answered
            write("\n")
            say("(/exit or Ctrl-D leaves)")


def _obey(chat: Chat, line: str, write: Callable[[str], object], say: Callable[[str], object]) -> None:
    command, _, argument = line.partition(" ")
    argument = argument.strip()
    if command == "/help":
        say(HELP)
    elif command == "/reset":
        chat.reset()
        say("(a new dialogue)")
    elif command == "/save":
        if not argument:
            raise UserError("name a file: /save FILE")
        chat.save(argument)
        say(f"(saved to {argument})")
    elif command.startswith("/"):
        raise UserError(f"there is no {command}: /help lists the commands")
    elif line:
        _answer(chat, line, write, say)


def _answer(chat: Chat, line: str, write: Callable[[str], object], say: Callable[[str], object]) -> None:
    dropped = chat.dropped
    answer = chat.reply(line)
    try:
        for piece in answer:
            write(piece)
    except KeyboardInterrupt:
        answer.close()  # type: ignore[attr-defined]
    write("\n")
    if chat.dropped and not dropped:
        say("(the dialogue is longer than the model reads: its oldest turns are no longer seen)")
