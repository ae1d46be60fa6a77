"""What the stages share: their options, and a tokenizer, shards and a model to look at."""

import argparse
import sys
import sysconfig
from pathlib import Path
from types import TracebackType

from fastgpt import Tokenizer, UserError
from fastgpt.cli import USAGE_ERROR, run
from fastgpt.model.hub import resolve_model_folder


def parse(about: str) -> argparse.Namespace:
    """The options that every stage has: text, run, out (a folder, made if it is not there) and quick."""
    sys.excepthook = _in_one_line
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a text file to look at and learn from, in place of the quickstart's")
    parser.add_argument("--run", type=Path, help="folder of a run to look at; runs/quickstart if it is there")
    parser.add_argument("--out", type=Path, default=Path("runs/examples"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="learn in seconds and badly, to try the script")
    args = parser.parse_args()
    if args.text and not args.text.is_file():
        raise UserError(f"no such file: {args.text}; name a text file with --text")
    if args.run and not (args.run / "config.json").is_file():
        raise UserError(f"no run at {args.run}: name one with --run, or make one with `fastgpt quickstart`")
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def quickstart_or_small(args: argparse.Namespace) -> tuple[Tokenizer, Path, Path]:
    """The tokenizer, the folder of shards and the model folder of --run, of the quickstart, or of a small run that is
    made from --text or from some of Python's own source."""
    found = args.run or Path("runs/quickstart")
    if args.text or not (found / "config.json").is_file():
        found = _small(args)
    print(f"The model and its data are those of {found}.")
    return Tokenizer.from_pretrained(found / "tokenizer"), found / "data", resolve_model_folder(found)


def _small(args: argparse.Namespace) -> Path:
    text = args.text or Path(sysconfig.get_path("stdlib")) / "email"
    out = args.out / f"small-{text.stem}{'-quick' if args.quick else ''}"
    if not (out / "checkpoints").is_dir():
        print(f"Training a small model on {text} first. `fastgpt quickstart` makes a better one in three minutes.")
        source = ["--input", str(text), "--include", "*.py", "--skip-bad"]
        tokenizer, data = str(out / "tokenizer"), str(out / "data")
        # What was done before it was stopped stays.
        if not (out / "tokenizer").is_dir():
            run(["tokenizer", "train", *source, "--vocab-size", "400", "--out", tokenizer])
        if not (out / "data").is_dir():
            run(["data", "prepare", *source, "--tokenizer", tokenizer, "--out", data])
        steps = ["--max-steps", "20"] if args.quick else ["--minutes", "0.3", "--lr", "2e-3"]
        resume = ["--resume"] if (out / "config.json").is_file() else []
        run(["train", "--data", data, "--preset", "micro", *steps, "--out", str(out), *resume])
    return out


def _in_one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A mistake of the user costs one line, any other error its traceback."""
    if not isinstance(error, UserError):
        sys.__excepthook__(kind, error, trace)
        return
    print(f"error: {error}", file=sys.stderr)
    sys.stderr.flush()
    raise SystemExit(USAGE_ERROR)
