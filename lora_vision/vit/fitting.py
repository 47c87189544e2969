"""Training a classifier: its loss, its batches, and what of it learns, for the one loop of ``training``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_vision.config import LoraConfig
from lora_vision.inject import inject
from lora_vision.vit.augment import DRAWS, Variation, varied
from lora_vision.vit.classifier import Classifier
from lora_vision.vit.pictures import Labelled, open_all
from lora_vision.vit.preprocessing import Preprocessing

Method = Literal["probe", "lora", "full"]
IN_MEMORY = 2 << 30
"""Bytes of pictures that are kept in memory; larger sets are read from disk again and again."""


@dataclass(frozen=True)
class Batch:
    """Pixels [B, 3, H, W] in [0, 1] and shares of the labels [B, C]."""

    pixels: Tensor
    targets: Tensor

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.pixels)


class ClassificationLoss(nn.Module):
    """Cross-entropy of a classifier's answers.

    Attributes:
        classifier: What answers.
        smoothing: Share of certainty spread over all labels (Szegedy et al. 2016).
        weights: How much each class counts [C], or None.
    """

    weights: Tensor | None

    def __init__(self, classifier: Classifier, smoothing: float = 0.0, weights: Tensor | None = None) -> None:
        super().__init__()
        self.classifier, self.smoothing = classifier, smoothing
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, batch: Batch) -> Tensor:
        """The mean loss of a batch, weights included, as a scalar."""
        logits = self.classifier(batch.pixels).float()
        smooth = batch.targets * (1 - self.smoothing) + self.smoothing / logits.shape[1]
        losses: Tensor = -(smooth * logits.log_softmax(-1)).sum(-1)
        if self.weights is None:
            return losses.mean()
        weighted: Tensor = losses * (batch.targets @ self.weights)
        return weighted.mean()


class Stream:
    """Labelled pictures as training samples: each epoch in a new order, each varied anew.

    A sample depends on the seed and its position only, so that runs repeat, resume, and share work between processes.
    """

    def __init__(
        self,
        pictures: Sequence[Labelled],
        classes: int,
        how: Preprocessing,
        *,
        variation: Variation | None = None,
        mirror: bool = True,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        """The pictures of a split; without a variation they are shown as they are."""
        self.pictures, self.classes, self.how = tuple(pictures), classes, how
        self.variation, self.mirror, self.seed, self.device = variation or Variation(), mirror, seed, device
        height, width = how.size
        fits = len(self.pictures) * 3 * height * width <= IN_MEMORY
        self._bytes = self._read(range(len(self.pictures))) if fits and self.pictures else None
        self._labels = torch.tensor([picture.label for picture in self.pictures], dtype=torch.long)

    def _read(self, rows: Sequence[int]) -> Tensor:
        return torch.stack([self.how.cut(picture) for picture in open_all(self.pictures[row] for row in rows)])

    def rows(self, rows: Sequence[int]) -> Batch:
        """These pictures as they are."""
        pixels = self._read(rows) if self._bytes is None else self._bytes[list(rows)]
        targets = F.one_hot(self._labels[list(rows)], self.classes).float()
        return Batch((pixels.float() / 255).to(self.device), targets.to(self.device))

    def __call__(self, position: int, count: int) -> Batch:
        """The training samples from a position on."""
        size = len(self.pictures)
        rows: list[int] = []
        for place in range(position, position + count):
            epoch, at = divmod(place, size)
            rows.append(self._order(epoch)[at])
        plain = self.rows(rows)
        draws = torch.stack([self._draws(place) for place in range(position, position + count)])
        return Batch(*varied(plain.pixels, plain.targets, self.variation, draws, self.mirror))

    def _draws(self, place: int) -> Tensor:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + place) % 2**63)
        return torch.rand(DRAWS, generator=generator)

    def _order(self, epoch: int) -> list[int]:
        if getattr(self, "_epoch", None) != epoch:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            self._epoch, self._current = epoch, torch.randperm(len(self.pictures), generator=generator).tolist()
        return self._current

    def fixed(self, size: int) -> list[Batch]:
        """All pictures as they are, in batches."""
        return [self.rows(range(at, min(at + size, len(self.pictures)))) for at in range(0, len(self.pictures), size)]


def class_weights(counts: Sequence[int]) -> Tensor:
    """What each class [C] is multiplied by so that all count the same; their mean over the pictures is 1."""
    found = torch.tensor([max(1, count) for count in counts], dtype=torch.float32)
    return found.sum() / (len(found) * found)


def learners(
    classifier: Classifier, method: Method, lora: LoraConfig, rates: Mapping[str, float] | None = None
) -> tuple[list[nn.Parameter], list[float]]:
    """What learns, and what the learning rate of each is multiplied by; the rest is frozen.

    Args:
        classifier: With a fresh head.
        method: The head alone ("probe"), with adapters ("lora"), or with every weight of the body ("full").
        lora: Rank, alpha, targets and seed of the adapters.
        rates: Multipliers for "head" and "body"; 1 where none is given.
    """
    rates = {"head": 1.0, "body": 1.0, **(rates or {})}
    body: list[nn.Parameter] = []
    classifier.body.requires_grad_(False)
    if method == "lora":
        body = inject(classifier.backbone.parts, lora)
    elif method == "full":
        body = list(classifier.body.requires_grad_(True).parameters())
    head = list(classifier.head.requires_grad_(True).parameters())
    return body + head, [rates["body"]] * len(body) + [rates["head"]] * len(head)
