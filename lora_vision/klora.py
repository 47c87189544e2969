"""K-LoRA: a subject's and a style's adapter share out the attention layers, more of them to the style step by step.

Ouyang, Li and Hou 2025, "K-LoRA: Unlocking Training-Free Fusion of Any Subject and Style LoRAs" (arXiv 2502.18461).
Nothing is trained and nothing added: at each denoising step every attention layer takes the change of one adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from lora_vision.adapter import Adapter
from lora_vision.errors import AdapterError

ALPHA, BETA = 1.5, 0.5
"""How the style's say grows over denoising: ``ALPHA · progress + BETA``, the values of the paper."""

LAYERS = "unet.*attn[12].to_*"


@torch.no_grad()
def turning_points(subject: Adapter, style: Adapter, base: Mapping[str, Tensor] | None = None) -> dict[str, float]:
    """The progress 0…1 from which on each shared attention layer of the UNet is the style's; beyond 1 it never is.

    The K largest elements of a change count, K being the product of both ranks. The layer is the style's where their
    sum times ``ALPHA · progress + BETA`` reaches the subject's sum divided by γ, the mean over the layers of how many
    times larger the subject's change is than the style's, all elements counted (as in the authors' code). Scaling an
    adapter therefore changes nothing here.

    Args:
        subject: The adapter that says what is drawn.
        style: The adapter that says how.
        base: True layer name to untouched weight; needed where a change depends on it (DoRA, IA3).

    Raises:
        AdapterError: They share no attention layer, or a change needs the base.
    """
    shared = [name for name in subject.layers if name in style.layers and fnmatchcase(name, LAYERS)]
    if not shared:
        raise AdapterError("K-LoRA shares out attention layers of the UNet, and these two have none in common")
    tops, ratios = {}, []
    for name in shared:
        pair = (subject.layers[name], style.layers[name])
        sizes = [factors.delta(None if base is None else base.get(name)).abs().flatten() for factors in pair]
        count = min(len(sizes[0]), (pair[0].rank or 1) * (pair[1].rank or 1))
        tops[name] = [float(size.topk(count).values.sum()) for size in sizes]
        total = [float(size.sum()) for size in sizes]
        if all(total):
            ratios.append(total[0] / total[1])
    gamma = sum(ratios) / len(ratios) if ratios else 1.0
    found = {}
    for name, (subjects, styles) in tops.items():
        needed = subjects / (gamma * styles) if styles else float("inf")
        found[name] = (needed - BETA) / ALPHA
    return found
