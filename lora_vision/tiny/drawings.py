"""Drawings of many things in several styles, with transparency: what the embedded ViT is pretrained on."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lora_vision.tiny.dataset import SIZE, packages
from lora_vision.tiny.render import Array, Icons, icons, outlines

log = logging.getLogger(__name__)

VENDORS = ("noto", "noto-v1", "fluent-emoji-flat", "fluent-emoji", "fluent-emoji-high-contrast")
"""Icon packages whose drawings the ViT sees, all Apache-2.0 or MIT."""
GROUPS = (3, 4, 5, 6, 7)
"""Emojibase groups: animals and nature, food, travel, activities, objects; faces and people are too alike."""
LEFT_OUT = re.compile(r"o-?clock|thirty")
HELD_OUT = 8
"""Every so many subjects, the flat drawing is kept out of the pretraining, to measure on."""


@dataclass(frozen=True)
class Drawings:
    """Drawings RGBA [N, 64, 64, 4] as bytes, colours multiplied by alpha; numbers of their subjects; names of these.

    ``held_out`` [N] marks the drawings that are measured on.
    """

    pixels: NDArray[np.uint8]
    subjects: NDArray[np.int64]
    held_out: NDArray[np.bool_]
    names: list[str]

    def training(self) -> tuple[Tensor, Tensor]:
        """Bytes [M, 4, 64, 64] and subjects [M] of the drawings that are learnt from."""
        pixels = torch.from_numpy(self.pixels[~self.held_out]).permute(0, 3, 1, 2)
        return pixels, torch.from_numpy(self.subjects[~self.held_out])


def subjects(folder: Path) -> list[str]:
    """Returns the icon names that three of the five packages know, in emojibase's order."""
    entries = json.loads((folder.parent / "emojibase-data" / "en" / "data.json").read_text(encoding="utf-8"))
    found: dict[str, None] = {}
    for entry in entries:
        name = re.sub(r"[^a-z0-9]+", "-", entry["label"].lower()).strip("-")
        known = sum(name in icons(folder, vendor) for vendor in VENDORS)
        if entry.get("group") in GROUPS and known >= 3 and not LEFT_OUT.search(name):
            found[name] = None
    return list(found)


def _shrunk(rgba: Array) -> NDArray[np.uint8]:
    """The drawing with its colours multiplied by alpha, 64 pixels a side."""
    straight = np.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], -1)
    planes = [Image.fromarray((p * 255).round().astype(np.uint8)) for p in np.moveaxis(straight.clip(0, 1), -1, 0)]
    return np.stack([np.asarray(p.resize((SIZE, SIZE), Image.Resampling.BOX)) for p in planes], -1)


def _lines(rgba: Array) -> Array:
    """The drawing's contours alone, dark, as RGBA."""
    lines = outlines(rgba)[..., None]
    return np.concatenate([np.full_like(rgba[..., :3], 0.15), lines], -1)


def drawings(work: Path) -> Drawings:
    """Returns every drawing of every subject, and the contours of Noto's; rendered once and cached in ``work``."""
    cache = work / "drawings.npz"
    if not cache.exists():
        folder = packages(work)
        names = subjects(folder)
        pixels, numbers, held_out = [], [], []
        for number, name in enumerate(tqdm(names, desc="drawing")):
            for vendor in VENDORS:
                source: Icons = icons(folder, vendor)
                if name not in source:
                    continue
                rgba = source.draw(name)
                views = [rgba, _lines(rgba)] if vendor == "noto" else [rgba]
                for view in views:
                    pixels.append(_shrunk(view))
                    numbers.append(number)
                    held_out.append(vendor == "fluent-emoji-flat" and number % HELD_OUT == 0)
        np.savez(cache, pixels=np.stack(pixels), subjects=numbers, held_out=held_out, names=names)
        log.info("rendered %d drawings of %d subjects", len(pixels), len(names))
    data = np.load(cache)
    return Drawings(data["pixels"], data["subjects"], data["held_out"], data["names"].tolist())


def composed(rgba: Tensor, grounds: Tensor) -> Tensor:
    """Returns drawings [B, 4, H, W] in [0, 1] on plain grounds [B, 3], as pixels [B, 3, H, W] in [-1, 1]."""
    return (rgba[:, :3] + grounds[:, :, None, None] * (1 - rgba[:, 3:])) * 2 - 1


def augmented(rgba: Tensor, generator: torch.Generator) -> Tensor:
    """Returns drawings [B, 4, 64, 64] moved and recoloured, as pixels [B, 3, 64, 64] in [-1, 1]."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(rgba), *shape, generator=generator)

    angle, zoom = uniform(-0.12, 0.12), uniform(0.9, 1.15)
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    rows = [
        torch.stack([cos * mirror, -sin, uniform(-0.08, 0.08)], 1),
        torch.stack([sin * mirror, cos, uniform(-0.08, 0.08)], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), [len(rgba), 4, SIZE, SIZE], align_corners=False)
    moved = F.grid_sample(rgba, grid, align_corners=False)
    plain = torch.where(uniform(0, 1, 1) < 0.5, 1.0, 0.0).expand(-1, 3)
    grounds = torch.where(uniform(0, 1, 1) < 0.7, plain, uniform(0, 1, 3))
    ink = moved[:, :3].sum((2, 3)) / moved[:, 3:].sum((2, 3)).clamp_min(1)
    lost = ((ink - grounds).abs().mean(1, keepdim=True) < 0.25).expand(-1, 3)  # dark lines on black
    pixels = composed(moved, torch.where(lost, (ink < 0.5).float(), grounds))
    grey = pixels.mean(1, keepdim=True)
    pixels = torch.lerp(
        grey.expand_as(pixels), pixels, torch.where(uniform(0, 1) < 0.2, 0.0, uniform(0.7, 1.2))[:, None, None, None]
    )
    hue = torch.linalg.qr(torch.eye(3) + 0.1 * torch.randn(len(rgba), 3, 3, generator=generator)).Q
    hue = hue * hue.diagonal(dim1=1, dim2=2).sign()[:, None, :]
    pixels = torch.einsum("bij,bjhw->bihw", hue, pixels)
    sign = torch.where(uniform(0, 1) < 0.04, -1.0, 1.0)
    pixels = pixels * (sign * uniform(0.8, 1.1))[:, None, None, None] + uniform(-0.1, 0.1, 1, 1, 1)
    if float(torch.rand((), generator=generator)) < 0.25:
        side = int(torch.randint(24, 48, (), generator=generator))
        pixels = F.interpolate(F.interpolate(pixels, (side, side), mode="area"), (SIZE, SIZE), mode="bilinear")
    return (pixels + 0.02 * torch.randn(pixels.shape, generator=generator)).clamp(-1, 1)
