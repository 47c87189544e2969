"""Varied pictures for training: moved, mirrored, recoloured, mixed; how much depends on how few there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Variation:
    """How far pictures are varied; every number is the end of a range around what they are.

    Attributes:
        zoom: Least share of the picture's sides that is seen.
        degrees: Turned by, either way.
        shear: Slanted by, in shares of a side.
        colour: Brightness, contrast and saturation are multiplied by 1 plus or minus this.
        odd: Share of the pictures that are also inverted above a threshold, cut to few tones, or blurred (RandAugment's
            photometric operations, Cubuk et al. 2020).
        erase: Share of the pictures of which a square is hidden (Zhong et al. 2020).
        mix: Share of the pictures that are blended with another, and their labels with its (mixup, Zhang et al. 2018).
    """

    zoom: float = 1.0
    degrees: float = 0.0
    shear: float = 0.0
    colour: float = 0.0
    odd: float = 0.0
    erase: float = 0.0
    mix: float = 0.0


LEVELS = {
    "none": Variation(),
    "light": Variation(zoom=0.9, degrees=3, colour=0.1),
    "medium": Variation(zoom=0.75, degrees=10, shear=0.05, colour=0.25, erase=0.1),
    "strong": Variation(zoom=0.65, degrees=15, shear=0.1, colour=0.4, odd=0.2, erase=0.25, mix=0.3),
}


def level(chosen: str, pictures: float) -> Variation:
    """The variation called so; "auto" is strong below 30 pictures a class, medium below 300, else light."""
    if chosen == "auto":
        chosen = "strong" if pictures < 30 else "medium" if pictures < 300 else "light"
    return LEVELS[chosen]


DRAWS = 24
"""Random numbers that one picture's variation takes."""


def varied(
    pixels: Tensor, targets: Tensor, how: Variation, draws: Tensor, mirror: bool = True
) -> tuple[Tensor, Tensor]:
    """Pictures [B, 3, H, W] in [0, 1] and their targets [B, C] (shares of the labels), varied.

    Args:
        pixels: The pictures.
        targets: What they show.
        how: How far.
        draws: Random numbers [B, DRAWS] in [0, 1): a picture's variation depends on its own row only, and in mixup on
            its neighbour, first with second, third with fourth.
        mirror: Whether half of them are mirrored left to right.
    """
    if how == LEVELS["none"]:
        return pixels, targets
    columns = iter(draws.to(pixels).unbind(1))

    def drawn(low: float, high: float) -> Tensor:
        return low + (high - low) * next(columns)

    pixels = _moved(pixels, how, drawn, mirror)
    if how.colour:
        pixels = _recoloured(pixels, *(drawn(1 - how.colour, 1 + how.colour)[:, None, None, None] for _ in range(3)))
    if how.odd:
        pixels = _made_odd(pixels, drawn(0, 1) < how.odd, drawn(0, 3), drawn(0.3, 0.9)[:, None, None, None])
    if how.erase:
        pixels = _erased(pixels, drawn(0, 1) < how.erase, drawn(0.1, 0.4), drawn(0, 1), drawn(0, 1))
    if how.mix:
        other = torch.tensor([row ^ 1 if row ^ 1 < len(pixels) else row for row in range(len(pixels))])
        share = torch.where(drawn(0, 1) < how.mix, drawn(0.5, 1.0), torch.ones(()).to(pixels))
        pixels = torch.lerp(pixels[other], pixels, share[:, None, None, None])
        targets = torch.lerp(targets[other], targets, share[:, None].to(targets))
    return pixels, targets


def _moved(pixels: Tensor, how: Variation, drawn: Callable[[float, float], Tensor], mirror: bool) -> Tensor:
    """The pictures turned, slanted, enlarged and mirrored, edges repeated outside."""
    angle, slant = drawn(-how.degrees, how.degrees).deg2rad(), drawn(-how.shear, how.shear)
    zoom = drawn(how.zoom, 1.0)
    room = 1 - how.zoom
    side = torch.where(drawn(0, 1) < (0.5 if mirror else 0.0), -1.0, 1.0).to(pixels)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    first = torch.stack([cos * side, slant - sin, drawn(-room, room)], 1)
    second = torch.stack([sin * side, cos, drawn(-room, room)], 1)
    grid = F.affine_grid(torch.stack([first, second], 1), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def _recoloured(pixels: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """The pictures with brightness, contrast and saturation multiplied, each [B, 1, 1, 1]."""
    mean = pixels.mean((1, 2, 3), keepdim=True)
    pixels = torch.lerp(mean.expand_as(pixels), pixels, contrast) * brightness
    grey = pixels.mean(1, keepdim=True)
    return torch.lerp(grey.expand_as(pixels), pixels, saturation).clamp(0, 1)


def _made_odd(pixels: Tensor, which: Tensor, kind: Tensor, threshold: Tensor) -> Tensor:
    """The pictures of ``which`` [B] solarised, posterised or blurred, by ``kind`` [B] in [0, 3)."""
    solarised = torch.where(pixels < threshold, pixels, 1 - pixels)
    posterised = (pixels * 5).round() / 5
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    at = kind[:, None, None, None]
    odd = torch.where(at < 1, solarised, torch.where(at < 2, posterised, blurred))
    return torch.where(which[:, None, None, None], odd, pixels)


def _erased(pixels: Tensor, which: Tensor, share: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """The pictures of ``which`` [B] with a square of ``share`` of the side hidden under their mean colour."""
    height, width = pixels.shape[-2:]
    rows, columns = (torch.arange(n, device=pixels.device)[None] / n for n in (height, width))
    inside_y = (rows >= (down * (1 - share))[:, None]) & (rows < (down * (1 - share) + share)[:, None])
    inside_x = (columns >= (across * (1 - share))[:, None]) & (columns < (across * (1 - share) + share)[:, None])
    hidden = (inside_y[:, :, None] & inside_x[:, None, :] & which[:, None, None])[:, None]
    return torch.where(hidden, pixels.mean((2, 3), keepdim=True), pixels)
