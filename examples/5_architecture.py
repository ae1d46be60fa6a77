"""Stage 5, architecture: GPT-2's parts one by one, how many numbers it holds, and what it writes before it has learnt.

python examples/5_architecture.py

A block is attention (stage 4) and an MLP, each behind a LayerNorm and beside a shortcut. The picture: what becomes of
the numbers in a deep model that lacks LayerNorms or shortcuts.
"""

import math

import torch
from common import parse, quickstart_or_small
from matplotlib.figure import Figure

from fastgpt import GPT, GPTConfig, ops
from fastgpt.data import TokenDataset

args = parse(__doc__)
tokenizer, data, folder = quickstart_or_small(args)
trained = GPT.from_pretrained(folder)
torch.manual_seed(0)
torch.set_grad_enabled(False)
model = GPT(trained.config).eval()  # of that size, with random weights
window = torch.from_numpy(TokenDataset.open(data, "train").tokens(0, model.config.n_positions).astype("int64"))[None]
ids = window[:, :16]  # (1, T)
gpt, block = model.transformer, model.transformer.h[0]

x = start = ops.embedding(ids, gpt.wte.weight, gpt.wpe.weight)  # (1, T, C)
norm = block.ln_1(x)
print(f"\nOne block by hand. In come {x.size(1)} tokens, a row of {x.size(2)} numbers each: {tuple(x.shape)}.")
print("LayerNorm: every row to mean 0 and deviation 1, so that each part is given numbers of one size. The first row's")
print(f"  deviation was {x[0, 0].std():.3f} and is {norm[0, 0].std():.3f}.")
x = x + block.attn(norm, None, None)
print("Attention: each token takes from those before it. What it finds is added to what came in: that is a shortcut.")
wide = block.mlp.c_fc.without_bias(block.ln_2(x))  # (1, T, 4 C)
x = x + block.mlp.c_proj(ops.bias_gelu(wide, block.mlp.c_fc.bias))
print(f"MLP: each token by itself, {x.size(2)} numbers to {wide.size(2)}, through GELU, and back; a shortcut again.")
bend = zip(range(-2, 3), ops.bias_gelu(torch.arange(-2.0, 3.0), torch.zeros(5)).tolist(), strict=True)
print("GELU lets through what is above 0: " + ", ".join(f"{a:+d} becomes {b:+.2f}" for a, b in bend))
difference = sum(block(start, None, None, None)) - x  # the library's block leaves the last sum to the next LayerNorm
print(f"The library's block gives the same: the difference is {difference.abs().max():.0e} at most.")

SHAPES = {
    gpt.drop: "embeddings of tokens + of positions",
    block.ln_1: "block 1: LayerNorm",
    block.attn.c_attn: "block 1: queries, keys and values, side by side",
    block.attn: "block 1: attention, to be added",
    block.mlp.c_proj: "block 1: LayerNorm, and the MLP where it is wide",
    block.mlp: "block 1: MLP, to be added",
    gpt: "the other blocks, and the last LayerNorm",
}


def tell(part: torch.nn.Module, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
    x = given[0] if part is block.mlp.c_proj else out  # of the MLP's second half, what comes in is wide
    print(f"  {SHAPES[part]:52}{tuple(x.shape)}")


print(f"\nA forward pass, told by hooks: the shape behind each part\n  {'token ids':52}{tuple(ids.shape)}")
hooks = [part.register_forward_hook(tell) for part in SHAPES]
print(f"  {'logits: a score for each token of the vocabulary':52}{tuple(model(ids).shape)}")
for hook in hooks:
    hook.remove()

print("\nGPT-2's four sizes: millions of parameters (numbers that are learnt), and GB of memory for them")
print(f"{'':13}layers heads width | embeddings  attention        MLP        all |   weights  training     cache")
for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
    c = GPTConfig.preset(name)
    with torch.device("meta"):  # shapes without memory
        h = GPT(c).transformer.h
    attention, mlp = (sum(p.numel() for b in h for p in getattr(b, part).parameters()) for part in ("attn", "mlp"))
    embeddings, every = (c.vocab_size + c.n_positions) * c.n_embd, c.num_parameters()
    counts = [f"{n / 1e6:10.1f}" for n in (embeddings, attention, mlp, every)]
    memory = [f"{n * 4 / 1e9:9.2f}" for n in (every, 4 * every, 2 * c.n_layer * c.n_positions * c.n_embd)]
    print(f"{name:12}{c.n_layer:7}{c.n_head:6}{c.n_embd:6} |", *counts, "|", *memory)
print("Weights: 4 bytes each. Training: as much again for the gradients, and twice for the optimizer's two averages.")
print("Cache: keys and values of 1,024 tokens, kept while it writes, so that no token is computed twice.")

V = model.config.vocab_size
for name, writer in (("Untrained", model), ("Trained", trained)):
    loss = writer.loss(window[:, :-1], window[:, 1:])  # how surprised it is by a text, in nats a token
    text = tokenizer.decode(writer.generate(ids[:, :1], 40, seed=0)[0].tolist())
    print(f"\n{name}, loss {loss:.2f} (guessing among {V} tokens has ln({V}) = {math.log(V):.2f}). It writes:")
    print(f"  {text!r}")

deep = GPT(GPTConfig(vocab_size=1000, n_positions=64, n_embd=128, n_layer=24, n_head=4)).double().transformer
for part in deep.modules():
    if isinstance(part, torch.nn.Linear):
        part.weight *= 10  # 24 blocks then show what many more would do
figure = Figure((11, 4.5), dpi=110, layout="constrained")
size, alike = figure.subplots(1, 2)
print("\n24 blocks, their weights ten times as large as they start, with and without LayerNorms and shortcuts:")
for label in ("as in GPT-2", "no LayerNorm", "no shortcuts", "neither"):
    norms, shortcuts = label in ("as in GPT-2", "no shortcuts"), label in ("as in GPT-2", "no LayerNorm")
    x = deep.wte(torch.arange(64)[None]) + deep.wpe.weight  # 64 tokens, all different
    sizes, likenesses = [], []
    for block in deep.h:
        x = shortcuts * x + block.attn(block.ln_1(x) if norms else x, None, None)
        x = shortcuts * x + block.mlp(block.ln_2(x) if norms else x)
        rows = torch.nn.functional.normalize(x[0], eps=0)
        sizes.append(x.std().item())
        likenesses.append((rows @ rows.T).mean().item())
    print(f"  {label:13} the numbers have deviation {sizes[-1]:8.2g}, two tokens' rows are {likenesses[-1]:4.0%} alike")
    size.semilogy(range(1, 25), sizes, label=label)
    alike.plot(range(1, 25), likenesses)
size.set(title="How large the numbers are (standard deviation)", xlabel="block")
alike.set(title="How alike the tokens' rows are (1: all the same)", xlabel="block", ylim=(0, 1.03))
figure.legend(loc="outside lower center", ncols=4, frameon=False)
picture = args.out / "5_architecture.png"
figure.savefig(picture)
print(f"{picture} shows it block by block.")
