"""Stage 4, attention: how a token takes what it needs from the tokens before it, from dot products to GPT-2's heads.

python examples/4_attention.py

Every step is written out in plain torch and compared with `ops.attention`, which is what the library's models run.
The picture: where one head of a trained model looks.
"""

import math

import torch
from common import parse, quickstart_or_small
from matplotlib.figure import Figure
from torch import Tensor

from fastgpt import GPT, ops
from fastgpt.ops.philox import inverse_keep, keep_mask

LINE = "def read(self, path):\n    with open(path) as file:\n        return file."

args = parse(__doc__)
tokenizer, _, folder = quickstart_or_small(args)
model = GPT.from_pretrained(folder)
torch.set_grad_enabled(False)
ids = tokenizer.encode(args.text.open(encoding="utf-8", errors="replace").read(200) if args.text else LINE)[:20]
names = [repr(tokenizer.decode([i]))[1:-1] for i in ids]
T, H, D = len(ids), model.config.n_head, model.config.n_embd // model.config.n_head
one = T // 2  # the token that is followed through the steps


def step(title: str, weights: Tensor, ours: Tensor, library: Tensor) -> None:
    print(f"\n{title}\n  weights {tuple(weights.shape)}, result {tuple(ours.shape)}, at most ", end="")
    print(f"{(ours - library).abs().max():.0e} from ops.attention's, with numbers up to {ours.abs().max():.1f}")
    best = [(p, names[j]) for j, p in enumerate(weights[one].tolist()) if p >= 0.01]
    print(f"  '{names[one]}' looks " + ", ".join(f"{p:.0%} at '{name}'" for p, name in sorted(best, reverse=True)[:4]))


inputs: list[Tensor] = []  # what goes into each block's attention: (1, T, C)
for block in model.transformer.h:
    block.attn.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
model(torch.tensor([ids]))
later = torch.ones(T, T, dtype=torch.bool).triu(1)  # row i, column j: whether j comes after i
heads = [ops.split_heads(b.attn.c_attn(x), H) for b, x in zip(model.transformer.h, inputs, strict=True)]
every = torch.cat([(q @ k.mT / math.sqrt(D)).masked_fill(later, -math.inf).softmax(-1) for q, k, _ in heads])
# Of all heads, (layers, H, T, T), the one that chooses clearly, but not always the same token.
layer, head = divmod(int((every.amax(-1).mean(-1) - every.mean(-2).amax(-1)).argmax()), H)
attn, x, (q, k, v) = model.transformer.h[layer].attn, inputs[layer], heads[layer]  # q, k, v: (1, H, T, D)

print(f"\n{T} tokens: {' | '.join(names)}")
print(f"Before block {layer + 1}'s attention each is a row of {x.size(2)} numbers: x has shape {tuple(x[0].shape)}.")
print(f"'{names[one]}' is followed. Numbers have seven digits here: differences of about 1e-06 and less are rounding.")

title = "1. Dot products: x @ x.T says how alike rows are, to itself most of all; softmax turns a row into shares of 1."
weights = (x[0] @ x[0].T).softmax(-1)
step(title, weights, weights @ x[0], ops.attention(x[None], x[None], x[None], causal=False, scale=1.0)[0, 0])

title = "2. Queries, keys, values, learnt maps of x: what a token looks for, what it is found by, what it hands over."
one_head = [t[:, head : head + 1] for t in (q, k, v)]  # (1, 1, T, D)
query, key, value = (t[0, 0] for t in one_head)  # (T, D)
weights = (query @ key.T).softmax(-1)
step(title, weights, weights @ value, ops.attention(*one_head, causal=False, scale=1.0)[0, 0])

title = f"3. Scaled: scores are sums over {D} numbers; divided by {D} ** 0.5, no token takes all only because of that."
scores = query @ key.T / math.sqrt(D)
weights = scores.softmax(-1)
step(title, weights, weights @ value, ops.attention(*one_head, causal=False)[0, 0])

title = "4. Causal: the tokens that come later are what is to be guessed; their scores become -inf, their weights 0."
weights = scores.masked_fill(later, -math.inf).softmax(-1)
step(title, weights, weights @ value, ops.attention(*one_head)[0, 0])

kept = keep_mask(torch.tensor(0), 1, T, T, 0.2)[0]  # the op's own mask for seed 0
title = f"5. Dropout, in training only: {(~kept).sum()} of {T * T} weights become 0, the others grow by 1 / (1 - 0.2)."
weights = weights * kept * inverse_keep(0.2)
step(title, weights, weights @ value, ops.attention(*one_head, dropout_p=0.2, seed=0)[0, 0])

title = f"6. Multi-head: {H} heads look by {D} numbers each (below: their mean) and put what they find side by side."
joined = torch.cat([every[layer, h] @ v[0, h] for h in range(H)], -1)  # (T, C)
step(title, every[layer].mean(0), joined, ops.attention(q, k, v)[0].transpose(0, 1).flatten(1))

out = attn.c_proj(joined)
print(f"\n7. A last learnt map mixes the heads: {tuple(out.shape)}, ", end="")
print(f"at most {(out - attn(x, None, None)[0]).abs().max():.0e} from what the model's attention gives.")

figure = Figure((8, 7), dpi=110, layout="constrained")
axes = figure.subplots()
image = axes.imshow(every[layer, head], cmap="Blues", vmin=0, vmax=1)
axes.set_xticks(range(T), names, rotation=90, parse_math=False)
axes.set_yticks(range(T), names, parse_math=False)
axes.set(xlabel="token that is looked at", ylabel="token that looks")
axes.set_title(f"Where head {head + 1} of block {layer + 1} looks (each row's shares sum to 1)")
figure.colorbar(image, label="share", shrink=0.8)
picture = args.out / "4_attention.png"
figure.savefig(picture)
print(f"\n{picture} shows where head {head + 1} of block {layer + 1} looks.")
