"""How good a classifier is: accuracy, F1, confusion, calibration; and their picture."""

import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.files import atomic_write

BINS = 10


@dataclass
class Scores:
    """Of a classifier on labelled texts.

    Attributes:
        confusion: how many of class i were taken for class j: confusion[i][j].
        f1: of each class, the harmonic mean of precision and recall; 0 where it was neither there nor guessed.
        macro_f1: their mean, each class counting the same.
        nll: mean of -log of the right class's probability, nats.
        calibration_error: the expected calibration error (Guo et al. 2017, arXiv:1706.04599): the mean distance of
            confidence and accuracy, in BINS bins of equal width, weighted by how many fall in each.
        bins: of each bin that is not empty: how many texts, their mean confidence, their accuracy.
    """

    labels: list[str]
    count: int
    accuracy: float
    macro_f1: float
    f1: list[float]
    nll: float
    calibration_error: float
    confusion: list[list[int]]
    bins: list[tuple[int, float, float]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def score(probabilities: Tensor, targets: Tensor, labels: tuple[str, ...]) -> Scores:
    """The scores of (N, classes) probabilities against (N,) classes."""
    n, classes = probabilities.shape
    confidence, guesses = probabilities.max(1)
    confusion = torch.bincount(targets * classes + guesses, minlength=classes**2).view(classes, classes)
    right = confusion.diagonal()
    f1 = 2 * right / (confusion.sum(0) + confusion.sum(1)).clamp(min=1)
    hits = (guesses == targets).double()
    which = (confidence * BINS).long().clamp(max=BINS - 1)
    bins = []
    for b in range(BINS):
        inside = which == b
        if inside.any():
            bins.append((int(inside.sum()), confidence[inside].mean().item(), hits[inside].mean().item()))
    return Scores(
        labels=list(labels),
        count=n,
        accuracy=hits.mean().item(),
        macro_f1=f1.mean().item(),
        f1=f1.tolist(),
        nll=-probabilities[torch.arange(n), targets].clamp(min=1e-12).log().mean().item(),
        calibration_error=sum(count * abs(c - a) for count, c, a in bins) / n,
        confusion=confusion.tolist(),
        bins=bins,
    )


def draw_scores(scores: Scores, path: Path) -> None:
    """The confusion matrix, and confidence against accuracy, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = torch.tensor(scores.confusion, dtype=torch.float64)
    shares = rows / rows.sum(1, keepdim=True).clamp(min=1)
    left.imshow(shares.tolist(), cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(scores.labels))
    short = [label if len(label) <= 16 else label[:15] + "…" for label in scores.labels]
    left.set_xticks(ticks, short, rotation=45 if len(short) > 4 else 0)
    left.set_yticks(ticks, short)
    if len(ticks) <= 20:
        for i in ticks:
            for j in ticks:
                colour = "white" if shares[i, j] > 0.5 else "black"
                left.text(j, i, f"{scores.confusion[i][j]:,}", ha="center", va="center", color=colour)
    left.set_xlabel("taken for")
    left.set_ylabel("is")
    left.set_title(
        f"{scores.count:,} texts, accuracy {scores.accuracy:.2%}, macro F1 {scores.macro_f1:.4f}", fontsize=10
    )
    right.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle="--", label="as sure as it is right")
    most = max(count for count, _, _ in scores.bins)
    right.scatter(
        [c for _, c, _ in scores.bins],
        [a for _, _, a in scores.bins],
        s=[20 + 280 * count / most for count, _, _ in scores.bins],
        color="#08519c",
        alpha=0.8,
        label="texts, by how sure it was",
        zorder=3,
    )
    least = max(0.0, min(min(c, a) for _, c, a in scores.bins) - 0.05)
    right.set_xlim(least, 1.02)
    right.set_ylim(least, 1.02)
    right.set_xlabel("mean confidence")
    right.set_ylabel("accuracy")
    right.set_title(f"expected calibration error {scores.calibration_error:.4f}", fontsize=10)
    right.grid(alpha=0.3)
    right.legend(frameon=False, loc="upper left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    atomic_write(path, buffer.getvalue())
