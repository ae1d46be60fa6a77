"""Stage 2, data sampling: how one long text becomes the many small exercises that a model learns from.

python examples/2_data_sampling.py

A language model learns to guess the next token. Its exercises are windows cut out of the text, and the answers are the
same windows one token later. The picture: which tokens each window covers, and how documents fill a batch.
"""

import tempfile

import numpy as np
import torch
from common import parse, quickstart_or_small
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader

from fastgpt.data import Document, DocumentDataset, PackedDataset, TokenDataset, WindowDataset, prepare
from fastgpt.token_view import visible

T = 8  # tokens in a window; models take more, the quickstart's 256
SHOWN = 3 * T + 1
B, LONG = 6, 32  # rows and tokens of the batches of documents

args = parse(__doc__)
tokenizer, data, _ = quickstart_or_small(args)
train = TokenDataset.open(data, "train")


def show(ids: Tensor, bar: str = "|") -> str:
    return bar.join("".join(piece.shown for piece in visible(tokenizer.token_bytes(i))) for i in ids.tolist())


ids = torch.from_numpy(train.tokens(0, SHOWN).astype(np.int64))
print(f"\n1. The training text is {len(train):,} token ids end to end. The first {SHOWN}, and what they stand for:")
print(f"  {ids.tolist()}\n  {show(ids)}")

inputs, targets = WindowDataset(ids, max_length=T, stride=T)[0]
print(f"\n2. A window of {T} tokens, and as its targets the same one token later: {tuple(inputs.shape)} ids each")
print(f"  inputs   {show(inputs)}\n  targets  {show(targets)}")
print(f"That is {T} exercises in one, as a token may look only at itself and those before it. The first four:")
for n in range(1, 5):
    print(f"  {show(inputs[:n]):24} what is next?  {show(targets[n - 1 : n])}")

print(f"\n3. The stride is how far on the next window begins. Windows of {T} in the first {SHOWN} tokens:")
strides = {stride: WindowDataset(ids, max_length=T, stride=stride) for stride in (T, T // 2, T // 4)}
for stride, windows in strides.items():
    print(f"  stride {stride}: {len(windows)} windows, {len(windows) * T} exercises; the second: {show(windows[1][0])}")
print("With a stride of a window's length each token is used once; with a shorter one again, behind another beginning.")

print("\n4. Several windows are learnt from at once, in a random order: a batch. Of 4 windows of all of the text:")
loader = DataLoader(WindowDataset(train, T, T), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(0))
inputs, targets = next(iter(loader))
print(
    f"  inputs {tuple(inputs.shape)}, targets {tuple(targets.shape)}; "
    f"all of it once, an epoch, is {len(loader):,} batches"
)
for row, target in zip(inputs, targets, strict=True):
    print(f"  {show(row):45} and then {show(target[-1:])}")

some = tokenizer.decode(i for i in train.tokens(0, min(5000, len(train))).tolist() if i != tokenizer.eot_id)
lines = [Document(f"line {n}", line) for n, line in enumerate(some.splitlines()) if line.strip()]
print(
    f"\n5. Documents have all lengths. Say that each of {len(lines)} lines is one; a batch's rows take {LONG} tokens."
)
with tempfile.TemporaryDirectory() as folder:
    prepare(lines, tokenizer, f"{folder}/data", val_fraction=0.1)
    split = TokenDataset.open(f"{folder}/data", "train")
    inputs, _, starts = PackedDataset(split, LONG, seed=0, shuffle=False, document_masks=True).next_batch(B)
    documents = DocumentDataset(split, batch_size=B, max_length=LONG, seed=0)
    alone = documents.batch(range(min(B, len(documents.lengths))))
    packed_cells = np.searchsorted(split.document_starts, np.arange(1, B * LONG + 1), "right").reshape(B, LONG)
alone_cells = alone.mask.numpy() * np.arange(1, len(alone.mask) + 1)[:, None]  # 0 where there is no document
print(f"  Packed: end to end, an end of text between them: {tuple(inputs.shape)}, without gaps. The first row:")
print(f"    {show(inputs[0])}")
print("    Of all the rows' tokens, counted from 0, these begin what is kept apart, if a token is to look back only to")
print(f"    the beginning of its own document: {starts[:-1].tolist()}")
print(
    f"  Per document: a row each, filled up: {tuple(alone.ids.shape)}. The first row's targets, -100 for no exercise:"
)
print(f"    {alone.targets[0].tolist()}")
gaps = 1 - alone.mask.double().mean()
print(f"    {gaps:.0%} of it is filling; where rows of like length are put together, {documents.padding():.0%}.")

figure = Figure((13, 6.5), dpi=110, layout="constrained")
panels = figure.subplot_mosaic("AD\nBD\nCE", height_ratios=[len(windows) + 1 for windows in strides.values()])


def draw(axes: Axes, cells: np.ndarray, colours: list, title: str) -> None:
    axes.pcolormesh(cells, cmap=ListedColormap(colours), vmin=0, vmax=len(colours), edgecolors="white", linewidth=1)
    axes.invert_yaxis()
    axes.set(title=title, yticks=[], xticks=[])


for panel, (stride, windows) in zip("ABC", strides.items(), strict=True):
    cells = np.zeros((len(windows), SHOWN))
    for n in range(len(windows)):
        cells[n, n * stride : n * stride + T] = 1
        cells[n, n * stride + T] = 2
    title = f"stride {stride}: a window a row, its last target in orange"
    draw(panels[panel], cells, ["#eeeeee", "#5b8ec9", "#f5a34c"], title)
names = [show(i) for i in ids[:, None]]
panels["C"].set_xticks(np.arange(SHOWN) + 0.5, names, rotation=90, family="monospace", parse_math=False)
colours = ["#eeeeee", *(colormaps["Set2"](n % 7) for n in range(packed_cells.max()))]
draw(panels["D"], packed_cells, colours, "packed: a colour for each document")
draw(panels["E"], alone_cells, colours, "per document: grey is filling")
picture = args.out / "2_data_sampling.png"
figure.savefig(picture)
print(f"\n{picture} shows which tokens each window covers, and both kinds of batches of documents.")
