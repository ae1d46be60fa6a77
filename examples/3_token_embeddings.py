"""Stage 3, token embeddings: the row of numbers that a model has for each token, and what training makes of it.

python examples/3_token_embeddings.py

An id is only a name: id 12 is no more than id 11. So a model has a row of numbers for each id, and learns them: tokens
that are used alike get rows that are alike. The picture: the rows of frequent tokens as points, before and after.
"""

import numpy as np
import torch
import torch.nn.functional as F
from common import parse, quickstart_or_small
from matplotlib.figure import Figure
from torch import Tensor

from fastgpt import GPT, ops
from fastgpt.data import TokenDataset
from fastgpt.token_view import visible

LINE = "if name is not None:\n    return name"
FREQUENT = 1500  # tokens are compared that are one in so many of the text: of others too little has been learnt

args = parse(__doc__)
tokenizer, data, folder = quickstart_or_small(args)
torch.set_grad_enabled(False)
torch.manual_seed(0)
trained = GPT.from_pretrained(folder)
untrained = GPT(trained.config)  # with the random numbers that a model begins with
wte, wpe = trained.transformer.wte.weight, trained.transformer.wpe.weight  # (V, C), (P, C)


def show(token: int) -> str:
    return "".join(piece.shown for piece in visible(tokenizer.token_bytes(token)))


def numbers(row: Tensor) -> str:
    return "".join(f"{number:+.3f} " for number in row[:5].tolist()) + "..."


def kind(token: int) -> str:
    text = tokenizer.decode([token])
    if not any(character.isalnum() for character in text):
        return "signs" if text.strip() else "white space"
    if text.strip().isdigit():
        return "numbers"
    return "words and their beginnings" if text[0].isspace() else "capitals" if text[0].isupper() else "letters"


text = args.text.open(encoding="utf-8", errors="replace").read(100) if args.text else LINE
ids = torch.tensor([tokenizer.encode(text)[:9]])  # (1, T)
tokens, places = wte[ids], wpe[: ids.size(1)]  # (1, T, C), (T, C)
print(
    f"\n1. Two tables: {tuple(wte.shape)}, a row for each token; {tuple(wpe.shape)}, a row for each place in a window."
)
print(f"  Ids {tuple(ids.shape)} pick rows {tuple(tokens.shape)} of the one, their places rows {tuple(places.shape)}")
print("  of the other. Of each row's numbers the first five:")
for t, token in enumerate(ids[0].tolist()):
    print(f"  place {t} {numbers(places[t])}   id {token:4} {numbers(tokens[0, t])}  {show(token)}")

x = ops.embedding(ids, wte, wpe)  # (1, T, C)
print(f"\n2. The model goes on with their sums {tuple(x.shape)}: what a token is and where it stands, in one row.")
print(f"  ops.embedding makes them in one go; the difference is {(x - tokens - places).abs().max():.0e} at most.")
one_hot = F.one_hot(ids, len(wte)).to(wte.dtype)  # (1, T, V)
print(
    f"  To pick row i is to multiply the table by 0s with a 1 at place i, and is learnt as such: {tuple(one_hot.shape)}"
)
print(f"  numbers for {tuple(ids.shape)} ids, and the difference is {(one_hot @ wte - tokens).abs().max():.0e}.")

train = TokenDataset.open(data, "train")
counts = np.bincount(train.tokens(0, min(len(train), 1_000_000)), minlength=tokenizer.vocab_size)
frequent = [i for i in (-counts).argsort().tolist() if counts[i] * FREQUENT >= counts.sum()]
kinds = [kind(i) for i in frequent]


def directions(model: GPT) -> Tensor:
    """The frequent tokens' rows (FREQUENT, C), each made as long as 1: what they say is in their direction."""
    return F.normalize(model.transformer.wte.weight[frequent])


rows = {"before training": directions(untrained), "after training": directions(trained)}
alike = [(r @ r.T).fill_diagonal_(-1) for r in rows.values()]  # the cosines of their angles
print(f"\n3. The nearest among the {len(frequent)} most frequent tokens: 1 is the same direction, 0 nothing in common.")
print(f"  {'':12}{'before training':40}after training")
told: set[int] = set()
for name in sorted(set(kinds) - {"white space"}):
    nearest = alike[1].amax(1) * torch.tensor([k == name for k in kinds])
    for i in nearest.argsort(descending=True).tolist()[:4]:
        if i not in told and nearest[i] > 0:
            before, after = (
                ", ".join(f"{show(frequent[j])} {s[i, j]:.2f}" for j in s[i].topk(3).indices) for s in alike
            )
            print(f"  {show(frequent[i]):12}{before:40}{after}")
            told.update(alike[1][i].topk(3).indices.tolist())

figure = Figure((13, 7), dpi=110, layout="constrained")
for axes, (title, r) in zip(figure.subplots(1, 2), rows.items(), strict=True):
    x, y = ((r - r.mean(0)) @ torch.pca_lowrank(r, 2, niter=10)[2]).T  # along the two directions that differ the most
    for n, name in enumerate(sorted(set(kinds))):
        of_kind = [i for i, k in enumerate(kinds) if k == name]
        axes.scatter(x[of_kind], y[of_kind], s=14, color=f"C{n}", label=name)
        for i in of_kind[:25]:
            axes.text(x[i], y[i], " " + show(frequent[i])[:12], color=f"C{n}", size=8, va="bottom", parse_math=False)
    axes.set(title=title, xticks=[], yticks=[])
figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
picture = args.out / "3_token_embeddings.png"
figure.savefig(picture)
print(f"\n{picture} shows all {len(frequent)} rows before and after, flattened to two dimensions.")
