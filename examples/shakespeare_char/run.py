"""The character-level model of tiny Shakespeare, by the ordinary commands: tokenizer, shards, training, a sample.

python examples/shakespeare_char/run.py --text tiny_shakespeare.txt --out runs/shakespeare

All of it is in README.md beside this file. Options after `--` go to `fastgpt train`.
"""

import argparse
import shlex
import sys
from pathlib import Path

from fastgpt.cli import USAGE_ERROR, run
from fastgpt.errors import UserError
from fastgpt.train.metrics import read_metrics

# nanoGPT's two settings; its learning rate is 1e-3 in both.
SETTINGS = {
    "cpu": "--n-layer 4 --n-head 4 --n-embd 128 --block-size 64 --batch-size 12 --max-steps 2000 --dropout 0 "
    "--lr 3e-3 --precision fp32 --device cpu",
    "gpu": "--n-layer 6 --n-head 6 --n-embd 384 --block-size 256 --batch-size 64 --max-steps 5000 --dropout 0.2 "
    "--lr 1e-3 --device cuda",
}
COMMON = "--min-lr 1e-4 --warmup-steps 100 --beta2 0.99 --weight-decay 0.1"
WHOLE = 1_000_000  # validation batches: all that there are


def main(argv: list[str]) -> float:
    """Returns the best validation loss, over the whole validation text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="the text; ASCII, so that a byte is a character")
    parser.add_argument("--out", type=Path, required=True, help="folder for all of it")
    parser.add_argument("--setting", choices=SETTINGS, default="cpu")
    parser.add_argument("train_options", nargs="*", metavar="-- OPTIONS", help="more of `fastgpt train`")
    args = parser.parse_args(argv)

    def step(command: str, *options: str) -> None:
        print(f"$ fastgpt {command} {shlex.join(options)}", flush=True)
        run([*command.split(), *options])

    text, tokenizer, data, out = str(args.text), *(str(args.out / part) for part in ("tokenizer", "data", "run"))
    # 256 bytes and the end of text, no merges: a token is a character.
    step("tokenizer train", "--input", text, "--vocab-size", "257", "--out", tokenizer)
    # Of a single text the last tenth is held out.
    step("data prepare", "--input", text, "--tokenizer", tokenizer, "--val-fraction", "0.1", "--out", data)
    settings = [*SETTINGS[args.setting].split(), *COMMON.split(), "--eval-batches", str(WHOLE)]
    step("train", "--data", data, "--out", out, *settings, "--sample-tokens", "200", *args.train_options)
    losses = [r["val_loss"] for r in read_metrics(Path(out) / "metrics.jsonl") if "val_loss" in r]
    print(f"validation loss, over the whole validation text: {losses[-1]:.4f} at the end, {min(losses):.4f} at best")
    return min(losses)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(USAGE_ERROR) from None
