"""Ranks chosen by the spectrum: trained generously, cut to what each layer needs, confirmed on validation pictures."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora_vision.adapter import Adapter
from lora_vision.factors import Factors
from lora_vision.inject import attach, detach
from lora_vision.spectrum import spectrum
from lora_vision.vit.classifier import Classifier
from lora_vision.vit.pictures import Labelled, open_all

logger = logging.getLogger(__name__)

GENEROUS = 32
TOLERANCE = 0.005
"""How much accuracy on the validation pictures a cut may cost."""


def by_energy(adapter: Adapter, energy: float) -> tuple[Adapter, dict[str, int]]:
    """The adapter with each layer cut to the fewest directions that hold this share of its squared norm; the ranks."""
    layers: dict[str, Factors] = {}
    ranks: dict[str, int] = {}
    for name, factors in adapter.layers.items():
        found = spectrum(factors)
        top = factors.rank or len(found.values)
        ranks[name] = next((rank for rank in range(1, top) if found.energy(rank) >= energy), top)
        layers[name] = found.pair(ranks[name]) if ranks[name] < top else factors
    return replace(adapter, layers=layers), ranks


def cut(
    adapter: Adapter, classifier: Classifier, held_out: Sequence[Labelled], energy: float
) -> tuple[Adapter, dict[str, int]]:
    """The smallest adapter that is as accurate on the held-out pictures, and its ranks; it stays attached.

    The share that is kept rises from ``energy`` until accuracy falls by at most half a point. Without held-out
    pictures ``energy`` is taken as it is.

    Args:
        adapter: As it was trained.
        classifier: The model it was trained on, adapters still injected.
        held_out: Pictures to confirm on.
        energy: Share of each layer's squared norm to keep, at first.
    """
    labels = torch.tensor([picture.label for picture in held_out])
    before = _accuracy(classifier, held_out, labels)
    chosen, ranks = adapter, {name: factors.rank or 0 for name, factors in adapter.layers.items()}
    for share in (energy, 1 - (1 - energy) / 4, 1 - (1 - energy) / 16, 1.0):
        chosen, ranks = by_energy(adapter, share)
        detach(classifier.backbone.parts)
        attach(classifier.backbone.parts, chosen)
        after = _accuracy(classifier, held_out, labels)
        logger.info("%.4g of the spectrum: ranks %d to %d, accuracy %.3f (%.3f before)", share,
                    min(ranks.values()), max(ranks.values()), after, before)  # fmt: skip
        if after >= before - TOLERANCE:
            break
    return chosen, ranks


def _accuracy(classifier: Classifier, pictures: Sequence[Labelled], labels: Tensor) -> float:
    if not pictures:
        return 1.0
    return float((classifier.answers(open_all(pictures)).argmax(-1) == labels).double().mean())
