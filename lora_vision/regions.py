"""Regions: the same latents once for each region's adapters, one UNet call, predictions averaged by masks.

A mask on a layer's output cannot hold back text keys and values, and what attention carries from place to place; rows
can. Composite is the case where every mask is everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_vision.errors import AdapterError


@dataclass(frozen=True, eq=False)
class Region:
    """A place with its own blend.

    Attributes:
        adapters: Adapter name to weight, as in ``Blend.set``; empty is the base.
        mask: Where it holds, [H, W] of any size, at least 0; overlapping masks share in proportion; None is everywhere
            that no other region's mask covers.
        prompt: What is drawn there, if not the picture's own prompt.
    """

    adapters: Mapping[str, Any]
    mask: Tensor | None = None
    prompt: str | None = None


def composite(adapters: Mapping[str, Any]) -> list[Region]:
    """Regions that average the predictions of single adapters over the whole picture.

    LoRA Composite of Multi-LoRA Composition (Zhong et al. 2024, eq. 3): unlike a sum of weights, each adapter sees a
    model that the others have not changed.
    """
    return [Region({name: weight}, torch.ones(1, 1)) for name, weight in adapters.items()]


def check_masks(regions: Sequence[Region]) -> None:
    """Nothing, or what is wrong with the masks.

    Raises:
        AdapterError: A mask is not [H, W], has negative or infinite values, or is zero everywhere.
    """
    for number, region in enumerate(regions):
        mask = region.mask
        if mask is None:
            continue
        if mask.dim() != 2 or not bool(torch.isfinite(mask).all()) or bool((mask < 0).any()) or not bool(mask.any()):
            raise AdapterError(
                f"the mask of region {number} has shape {tuple(mask.shape)} or unusable values; "
                "expected [H, W], finite, at least 0 and not all zero"
            )


def shares(regions: Sequence[Region], height: int, width: int) -> Tensor:
    """How much each region counts at each latent pixel [regions, height, width]; they add up to 1 everywhere.

    Masks are shrunk by averaging, so a pixel on an edge is shared. What no mask covers belongs to the regions without
    a mask.

    Raises:
        AdapterError: Some place belongs to no region.
    """
    masks = torch.zeros(len(regions), height, width)
    for row, region in zip(masks, regions, strict=True):
        if region.mask is not None:
            mask = region.mask.float()[None, None]
            larger = mask.shape[-2] > height or mask.shape[-1] > width
            row.copy_(F.interpolate(mask, (height, width), mode="area" if larger else "nearest")[0, 0])
    rest = [number for number, region in enumerate(regions) if region.mask is None]
    total = masks.sum(0)
    if rest:
        masks[rest] = (1 - total).clamp(min=0) / len(rest)
        total = masks.sum(0)
    if bool((total == 0).any()):
        raise AdapterError("some places belong to no region; add a region without a mask for the background")
    return masks / total


def repeated(value: Any, batch: int, times: int) -> Any:
    """The value with every tensor of this batch size, however nested, repeated along the batch."""
    if isinstance(value, Tensor):
        return value.repeat(times, *(1,) * (value.dim() - 1)) if value.dim() and len(value) == batch else value
    if isinstance(value, Mapping):
        return {key: repeated(item, batch, times) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(repeated(item, batch, times) for item in value)
    return value


def averaged(prediction: Tensor, share: Tensor) -> Tensor:
    """The prediction [B, C, H, W] out of one for each region [regions·B, C, H, W] and their shares."""
    count, height, width = share.shape
    rows = prediction.view(count, -1, *prediction.shape[1:])
    return (rows * share.to(prediction).view(count, 1, 1, height, width)).sum(0)
