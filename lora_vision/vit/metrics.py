"""How good answers are: accuracy, F1, AUROC, calibration. Plain torch; each is a definition of a line or two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 15


@dataclass(frozen=True)
class Metrics:
    """What logits [N, C] are worth against the right labels [N].

    Attributes:
        accuracy: Share of right answers.
        balanced: Mean over the classes of the share of their pictures that is recognised.
        macro_f1: Mean F1 over the classes.
        auroc: Mean over the classes of the chance that a picture of it gets more probability than another; 0.5 is
            guessing. None where only one class is there.
        ece: Expected calibration error over 15 bins of confidence (Guo et al. 2017).
        nll: Mean negative log-likelihood.
        precision, recall, f1: By class [C]; NaN where a class is neither there nor answered.
        confusion: How many pictures of class r were called c [C, C].
        bins: For each bin of confidence: pictures, mean confidence, accuracy.
    """

    accuracy: float
    balanced: float
    macro_f1: float
    auroc: float | None
    ece: float
    nll: float
    precision: tuple[float, ...]
    recall: tuple[float, ...]
    f1: tuple[float, ...]
    confusion: tuple[tuple[int, ...], ...]
    bins: tuple[tuple[int, float, float], ...]

    def summary(self) -> dict[str, float]:
        """The single numbers, rounded, without those that are not defined."""
        names = ("accuracy", "balanced", "macro_f1", "auroc", "ece", "nll")
        return {name: round(value, 4) for name in names if (value := getattr(self, name)) is not None}


def measure(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Metrics:
    """The metrics of logits [N, C], divided by the temperature, against labels [N]; N is at least 1."""
    classes = logits.shape[1]
    probabilities = (logits.double() / temperature).softmax(-1)
    confidence, answers = probabilities.max(-1)
    right = answers == labels
    confusion = torch.zeros(classes, classes, dtype=torch.long)
    confusion.index_put_((labels, answers), torch.ones_like(labels), accumulate=True)
    hits, there, called = confusion.diagonal().double(), confusion.sum(1), confusion.sum(0)
    precision, recall = hits / called, hits / there
    f1 = 2 * hits / (there + called)
    bins = reliability(confidence, right)
    present = there > 0
    return Metrics(
        accuracy=float(right.double().mean()),
        balanced=float(recall[present].mean()),
        macro_f1=float(f1[~f1.isnan()].mean()),
        auroc=auroc(probabilities, labels),
        ece=sum(count * abs(sure - true) for count, sure, true in bins) / len(labels),
        nll=float(F.nll_loss(probabilities.log(), labels)),
        precision=tuple(precision.tolist()),
        recall=tuple(recall.tolist()),
        f1=tuple(f1.tolist()),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        bins=bins,
    )


def auroc(probabilities: Tensor, labels: Tensor) -> float | None:
    """The mean over the classes of one-against-rest AUROC: the Mann-Whitney statistic, ties counted half."""
    found = []
    for number in range(probabilities.shape[1]):
        inside = labels == number
        here, there = int(inside.sum()), int((~inside).sum())
        if here and there:
            scores = probabilities[:, number].contiguous()
            ordered = scores.sort().values
            low = torch.searchsorted(ordered, scores, right=False)
            high = torch.searchsorted(ordered, scores, right=True)
            ranks = (low + high + 1).double() / 2
            found.append((float(ranks[inside].sum()) - here * (here + 1) / 2) / (here * there))
    return sum(found) / len(found) if found else None


def reliability(confidence: Tensor, right: Tensor, bins: int = BINS) -> tuple[tuple[int, float, float], ...]:
    """For each of equally wide bins of confidence: how many answers [N] fall in, mean confidence, share right."""
    found = []
    places = (confidence * bins).ceil().clamp(1, bins) - 1
    for number in range(bins):
        inside = places == number
        count = int(inside.sum())
        mean = (float(confidence[inside].mean()), float(right[inside].double().mean())) if count else (0.0, 0.0)
        found.append((count, *mean))
    return tuple(found)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature with the least negative log-likelihood, between 0.05 and 20 (Guo et al. 2017).

    The likelihood has one minimum in the inverse temperature: a golden-section search finds it.
    """
    logits = logits.double()

    def loss(position: float) -> float:
        return float(F.cross_entropy(logits / 20.0**position, labels))

    low, high, golden = -1.0, 1.0, (5**0.5 - 1) / 2
    for _ in range(40):
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    return float(20.0 ** ((low + high) / 2))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean of a few runs and half the width of its 95 % interval (Student's t); 0 for a single run."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, 0.0
    deviation = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
    t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
    return mean, t.get(len(values), 2.1) * deviation / len(values) ** 0.5
