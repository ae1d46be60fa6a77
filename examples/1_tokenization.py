"""Stage 1, tokenization: how text becomes the numbers that a model works with, and what is learnt for that.

python examples/1_tokenization.py

A model reads no letters. Text is cut into tokens, pieces that occur often, and each token has a number, its id. The
picture: the same text as two tokenizers cut it, a colour for each token.
"""

from pydoc_data.topics import topics  # Python's own help: English, where the quickstart's text is code

from common import parse, quickstart_or_small
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fastgpt import Tokenizer
from fastgpt.data import TokenDataset
from fastgpt.token_view import MARKS, split_text, visible

SENTENCE = "the cat that sat on the mat ate the hat"
CODE = "def find(self, name):\n    for path in self.paths:\n        if path.name == name:\n            return path\n"
ENGLISH = "If an exception occurs in the following example, the value of the expression is not assigned.\n"
COLOURS = ("#8dd3c7", "#ffed6f", "#cbc9e8", "#fdb97d")
LETTER = {"ha": "center", "family": "monospace", "parse_math": False}
COLUMNS = 100  # characters in a line of the picture


def show(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The tokens with bars between them; white space and what would not show have marks."""
    return "|".join("".join(piece.shown for piece in visible(tokenizer.token_bytes(i))) for i in ids)


args = parse(__doc__)
own, data, _ = quickstart_or_small(args)

print(f"\n1. Learning to cut, on one sentence: {SENTENCE!r}")
print("At first each byte is a token: here, each letter and each space, shown as a dot. The two that are side by side")
print("most often become a new token, and so again and again. No token goes from one word into the next.")
learnt = Tokenizer.train([SENTENCE], 257)  # 256 bytes, and a token that ends texts
print(f"  at first:             {show(learnt, learnt.encode(SENTENCE))}")
for new in range(256, 262):
    learnt = Tokenizer.train([SENTENCE], new + 2)
    left, right = (show(learnt, [learnt.vocab[part]]) for part in learnt.merges[-1])
    print(f"  {left:>3} + {right:2} becomes {new}: {show(learnt, learnt.encode(SENTENCE))}")
print(
    f"{len(SENTENCE)} tokens are {len(learnt.encode(SENTENCE))} now. Any text is cut by the same merges, in this order."
)

texts = {"code": CODE, "English": ENGLISH}
if args.text:
    texts = {"your text": args.text.open(encoding="utf-8", errors="replace").read(200)}
text = next(iter(texts.values()))
ids = own.encode(text)
print(f"\n2. The run's tokenizer has {own.vocab_size:,} ids: 256 bytes, {len(own.merges):,} merges, an end of texts.")
print(f"  {show(own, ids)}\n  {ids}")
print(f"From the ids back to the text: {own.decode(ids) == text}. What it has hardly seen it spells in bytes:")
for word in ("naïve", "数学", "😀"):
    print(f"  {word} = {show(own, own.encode(word))} = {own.encode(word)}")

english = Tokenizer.train(topics.values(), own.vocab_size)
print(f"\n3. Another of {own.vocab_size:,} ids, learnt from Python's help texts. Mostly each is better at its own:")
for kind, sample in texts.items():
    a, b = split_text(own, sample), split_text(english, sample)
    print(f"  {kind}, {a.bytes} bytes: {len(a.ids)} tokens by the run's ({a.bytes_per_token:.2f} bytes each), ", end="")
    print(f"{len(b.ids)} by the other ({b.bytes_per_token:.2f} bytes each)")

train = TokenDataset.open(data, "train")
longer = own.decode(train.tokens(0, min(20_000, len(train))).tolist())
print("\n4. What more ids bring: bytes per token of the run's text, with only the first merges of its tokenizer")
for merges in (0, *(len(own.merges) // part for part in (16, 8, 4, 2, 1))):
    first = Tokenizer({token: i for token, i in own.vocab.items() if i < 256 + merges}, own.merges[:merges], {})
    print(f"  {256 + merges:5} ids: {split_text(first, longer).bytes_per_token:.2f}")
print("Fewer tokens are less work for a model. But each id is a row of numbers in it, which it must learn: stage 3.")

figure = Figure(dpi=110)
axes = figure.add_axes((0, 0, 1, 1))
axes.axis("off")
line = 0
for kind, sample in texts.items():
    for tokenizer, name in ((own, "the run's tokenizer"), (english, "the one learnt from help texts")):
        cut = tokenizer.encode(sample)
        axes.text(0, line + 0.75, f"{kind} by {name}: {len(cut)} tokens", weight="bold")
        line, column = line + 1, 0
        for n, token in enumerate(cut):
            for piece in visible(tokenizer.token_bytes(token)):
                for character in piece.shown:
                    axes.add_patch(Rectangle((column, line), 1, 1, color=COLOURS[n % 4], linewidth=0))
                    axes.text(column + 0.5, line + 0.7, character, alpha=0.4 if piece.stands_for else 1, **LETTER)
                    column += 1
                    if character == MARKS["\n"] or column == COLUMNS:
                        line, column = line + 1, 0
        line += 1 + bool(column)
axes.set(xlim=(-1, COLUMNS), ylim=(line, 0))
figure.set_size_inches(COLUMNS * 0.095, line * 0.24)
picture = args.out / "1_tokenization.png"
figure.savefig(picture)
print(f"\n{picture} shows both tokenizers' cuts in colours.")
