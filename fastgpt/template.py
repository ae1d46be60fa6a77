"""Chat templates: dialogues as text and as tokens, in the Jinja that a tokenizer_config.json carries.

A template is Jinja source, rendered with what transformers gives it, so that `apply_chat_template` there makes the same
text and the same ids from a folder that was saved here. `TEMPLATES` holds two of our own; a tokenizer's `chat_template`
is any other. Templates come with downloaded models: they run in Jinja's sandbox.

What a response is, which training counts alone, comes from the template's `{% generation %}` tags; without them, from
what each assistant message adds to the rendering of the messages before it.
"""

import json
from collections.abc import Iterator
from datetime import datetime
from functools import lru_cache
from itertools import accumulate
from typing import Any, TypedDict

from jinja2 import Template, TemplateSyntaxError, nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fastgpt.errors import UserError
from fastgpt.tokenizer import Tokenizer


class Message(TypedDict):
    """One turn; `role` is system, user or assistant."""

    role: str
    content: str


# Stands between an instruction and its input in a user message.
INPUT = "\n\n### Input:\n"

# The prompt of Stanford Alpaca (Taori et al. 2023); a system message takes the place of its first sentences.
ALPACA = r"""
{%- if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}
{%- else %}{{ 'Below is an instruction that describes a task' }}
{%- if '\n\n### Input:\n' in messages[0]['content'] %}{{ ', paired with an input that provides further context' }}
{%- endif %}{{ '. Write a response that appropriately completes the request.' }}
{%- endif %}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{{ '\n\n### Instruction:\n' + message['content'] }}
{%- elif message['role'] == 'assistant' %}{{ '\n\n### Response:\n' }}
{%- generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '\n\n### Response:\n' }}{% endif %}"""

# OpenAI's ChatML. The vocabulary is not grown for its marks: where they are no special tokens they are plain text, so
# each response ends with the tokenizer's own end token behind its mark.
CHATML = r"""
{%- for message in messages %}
{%- if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}
{%- generation %}{{ message['content'] + '<|im_end|>' }}{{ eos_token }}{% endgeneration %}{{ '\n' }}
{%- else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

TEMPLATES = {"alpaca": ALPACA, "chatml": CHATML}


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: its body between two variables, which are undefined (and so print
    nothing) unless the spans of the responses are wanted."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)

        def mark(name: str) -> nodes.Node:
            return nodes.Output([nodes.Name(name, "load")], lineno=line)

        return [mark("generation_start"), *body, mark("generation_end")]


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # Jinja's own escapes HTML


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


@lru_cache(maxsize=16)
def _compile(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise UserError(f"the chat template cannot be read: line {error.lineno}: {error.message}") from None


def render(
    tokenizer: Tokenizer,
    messages: list[Message],
    template: str | None = None,
    add_generation_prompt: bool = False,
    **variables: str,
) -> str:
    """The text of a dialogue.

    Args:
        template: Jinja source; the tokenizer's `chat_template` if not given.
        add_generation_prompt: end with what begins an assistant's message.
        variables: more of what the template sees.

    Raises:
        UserError: there is no template, it cannot be read, or it raises; with what it said.
    """
    source = template or tokenizer.chat_template
    if source is None:
        raise UserError("this tokenizer has no chat template: name one of " + ", ".join(TEMPLATES))
    if tokenizer.eot_id is not None:
        end = tokenizer.token_bytes(tokenizer.eot_id).decode()
        variables = {"bos_token": end, "eos_token": end, **variables}
    compiled = _compile(source)
    try:
        return compiled.render(
            messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **variables
        )
    except Exception as error:  # a template can do anything in the sandbox
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"the chat template does not take this dialogue: {first}") from None


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a rendered text, in which the names of special tokens are those tokens."""
    return tokenizer.encode(text, allowed_special=tokenizer.special_tokens)


def encode_prompt(tokenizer: Tokenizer, messages: list[Message], template: str | None = None) -> list[int]:
    """The ids that an assistant's next message continues; arguments and errors as for `render`."""
    return encode_text(tokenizer, render(tokenizer, messages, template, add_generation_prompt=True))


def encode_dialogue(
    tokenizer: Tokenizer, messages: list[Message], template: str | None = None
) -> tuple[list[int], list[bool]]:
    """The ids of a whole dialogue, and for each whether it belongs to a response (its end token included).

    Args:
        template: Jinja source; the tokenizer's `chat_template` if not given.

    Raises:
        UserError: as for `render`; or the template does not show where the responses are.
    """
    text, spans = _response_spans(tokenizer, messages, template)
    ids = encode_text(tokenizer, text)
    # Ids are bytes end to end, so byte positions tell which tokens a span touches.
    in_response = bytearray(len(text.encode()))
    for start, end in spans:
        first, last = len(text[:start].encode()), len(text[:end].encode())
        in_response[first:last] = b"\1" * (last - first)
    ends = list(accumulate(len(tokenizer.token_bytes(i)) for i in ids))
    starts = [0, *ends[:-1]]
    return ids, [any(in_response[a:b]) for a, b in zip(starts, ends, strict=True)]


def _response_spans(
    tokenizer: Tokenizer, messages: list[Message], template: str | None
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a dialogue, and where in it the responses are, as (start, end) in characters."""
    # Two characters that Unicode gives no meaning to, and that are not in the messages.
    written = "".join(message["content"] for message in messages)
    left, right = [c for c in map(chr, range(0xFDD0, 0xFDF0)) if c not in written][:2]
    marked = render(tokenizer, messages, template, generation_start=left, generation_end=right)
    if left in marked:
        text = marked.replace(left, "").replace(right, "")
        spans = list(_marked_spans(marked, left, right))
    else:
        text = marked
        spans = list(_added_spans(tokenizer, messages, template, text))
    if not any(start < end for start, end in spans):
        raise UserError("the chat template prints no assistant message, so there is nothing to train on")
    return text, spans


def _marked_spans(marked: str, left: str, right: str) -> Iterator[tuple[int, int]]:
    position = start = 0
    for character in marked:
        if character == left:
            start = position
        elif character == right:
            yield start, position
        else:
            position += 1


def _added_spans(
    tokenizer: Tokenizer, messages: list[Message], template: str | None, text: str
) -> Iterator[tuple[int, int]]:
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = render(tokenizer, messages[:i], template, add_generation_prompt=True)
            through = render(tokenizer, messages[: i + 1], template)
            if not (through.startswith(before) and text.startswith(through)):
                raise UserError(
                    f"the chat template does not print message {i + 1} behind those before it, so its response cannot "
                    "be told from the prompt: put it between {% generation %} and {% endgeneration %} in the template"
                )
            yield len(before), len(through)
