"""The `fastgpt` command: finds the subcommand, lets tyro parse its arguments, turns a UserError into one line.

One file a subcommand. Each is a function with typed parameters; tyro makes the options and their help from them.
"""

import os
import sys
from collections.abc import Callable
from importlib import import_module
from inspect import signature
from typing import NoReturn, TypeVar

from fastgpt.errors import UserError

T = TypeVar("T")

# subcommand -> (where its function is, what it does). Imported on use only: `fastgpt --help` need not wait for torch.
COMMANDS = {
    "quickstart": (
        "quickstart:quickstart",
        "the whole way once, in minutes: text, tokenizer, shards, training, samples",
    ),
    "tokenizer train": ("tokenizer:train", "train a byte-level BPE on text files"),
    "tokenizer show": ("tokenizer:show", "show how a text splits into tokens, by one tokenizer or by several"),
    "data download": ("data:download", "get a public text, data set or model that the lessons use; alone, list them"),
    "data prepare": ("data:prepare", "turn text files into token shards"),
    "data show": ("data:show", "show what token shards hold: documents, lengths, tokens, the text of a window"),
    "train": ("train:train", "train a GPT on token shards, or resume a run"),
    "runs compare": ("runs:compare", "overlay runs in one picture, and a table of what they came to"),
    "eval": ("eval:evaluate", "perplexity on shards, multiple choice, and responses to instructions, scored"),
    "generate": ("generate:generate", "continue a prompt"),
    "chat": ("chat:chat", "talk to a model that follows instructions"),
    "finetune instruct": ("finetune:instruct", "fine-tune a model to answer, on dialogues"),
    "finetune prefer": ("finetune:prefer", "fine-tune a model on pairs of a better and a worse answer (DPO)"),
    "finetune classify": ("finetune:classify", "fine-tune a model to tell classes of text apart"),
    "classify": ("classify:classify", "each class's probability for a text"),
    "merge": ("merge:merge", "merge a LoRA adapter into its base and write a whole model folder"),
    "bench kernels": ("bench:kernels", "measure the ops against what torch ships"),
    "bench train": ("bench:train", "train a GPT beside others: tokens/s, memory, and where the time goes"),
    "bench table": ("bench:table", "write the README's table of kernels from results"),
    "info": ("info:info", "versions, devices, and which implementation each op takes and why"),
}

USAGE_ERROR = 2


def help_text() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fastgpt COMMAND [OPTIONS]",
            "",
            *lines,
            "",
            "`fastgpt COMMAND --help` lists a command's options.",
        ]
    )


def fail(message: str) -> NoReturn:
    print(f"fastgpt: error: {message}", file=sys.stderr)
    raise SystemExit(USAGE_ERROR)


def run(argv: list[str]) -> None:
    """Parses and runs one command line (without the leading `fastgpt`); errors of the user leave as UserError."""
    name = next((n for n in (" ".join(argv[:2]), argv[0]) if n in COMMANDS), None)
    if name is None:
        close = [n for n in COMMANDS if n.split()[0] == argv[0]]
        hint = f"did you mean {' or '.join(f'`fastgpt {n}`' for n in close)}?" if close else "see `fastgpt --help`"
        raise UserError(f"no command `{' '.join(argv[:2])}`: {hint}")
    module, function = COMMANDS[name][0].split(":")
    command = getattr(import_module(f"fastgpt.cli.{module}"), function)
    args = argv[len(name.split()) :]
    if list(signature(command).parameters) == ["argv"]:  # parses for itself: its defaults depend on its arguments
        command(args)
    else:
        parse(command, name, args)


def parse(target: Callable[..., T], name: str, args: list[str], default: T | None = None) -> T:
    """Calls `target` (a function or a dataclass) with the options in `args`; `default` is an instance to start from."""
    import tyro

    start = {} if default is None else {"default": default}
    return tyro.cli(target, prog=f"fastgpt {name}", args=args, config=(tyro.conf.OmitArgPrefixes,), **start)  # type: ignore[call-overload]


def main() -> None:
    argv = sys.argv[1:]
    try:
        if not argv or argv[0] in ("-h", "--help", "help"):
            print(help_text())
        elif argv[0] == "--version":
            from fastgpt import __version__

            print(f"fastgpt {__version__}")
        else:
            run(argv)
        sys.stdout.flush()  # here, where a closed pipe is caught, and not while Python shuts down
    except UserError as error:
        if "RANK" in os.environ:  # torchrun's
            from fastgpt.train.parallel import is_first_to_tell

            if not is_first_to_tell():
                raise SystemExit(USAGE_ERROR) from None
        fail(str(error))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # `fastgpt generate ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered has nowhere to go
        raise SystemExit(141) from None
