"""The pictures the embedded base is made of: installed, drawn, cached, and the bundled style sets cut from them."""

from __future__ import annotations

import json
import logging
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lora_vision.tiny.render import DRAWN, RENDERED, draw, draw_rgba, icons, lines_on, over, recoloured, shrink
from lora_vision.tiny.subjects import (
    COLOURS,
    HELD_OUT_STYLES,
    RENDERED_STYLES,
    STYLE_SET_SUBJECTS,
    SUBJECT_COLOURS,
    SUBJECTS,
    caption,
)

log = logging.getLogger(__name__)

SIZE = 64  # pixels a side
PACKAGES = (
    "@iconify-json/noto@1.2.9",
    "@iconify-json/noto-v1@1.2.5",
    "@iconify-json/fluent-emoji@1.2.7",
    "@iconify-json/fluent-emoji-flat@1.2.6",
    "@iconify-json/fluent-emoji-high-contrast@1.2.6",
    "emojibase-data@17.0.0",
)
POSES = {"noto": 16, "flat": 5, "clay": 3, "blob": 3}
"""Poses a noun is drawn in, by vendor style."""
SHARES = {"plain": 0.24, "background": 0.16, "colour": 0.08, "rendered": 0.18, "contour": 0.28, "vendor": 0.06}
"""How often the UNet sees each kind of picture: contours often, for thin lines are what it learns last."""


@dataclass(frozen=True)
class Pictures:
    """Rendered pictures: bytes [N, 64, 64, 3], and for each its caption, its noun's number and its kind."""

    pixels: NDArray[np.uint8]
    captions: list[str]
    nouns: NDArray[np.int64]
    kinds: list[str]

    def batch(self, rows: NDArray[np.int64] | slice) -> Tensor:
        """Returns pixels [B, 3, 64, 64] in [-1, 1]."""
        return torch.from_numpy(self.pixels[rows]).permute(0, 3, 1, 2).float() / 127.5 - 1


def packages(work: Path) -> Path:
    """Returns the folder of icon packages, installed by npm at the pinned versions when absent."""
    folder = work / "npm"
    if not (folder / "node_modules" / "emojibase-data").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text("{}")
        subprocess.run(["npm", "install", "--no-audit", "--no-fund", *PACKAGES], cwd=folder, check=True)
    return folder / "node_modules" / "@iconify-json"


def _views(folder: Path, noun: str, jitter: np.random.Generator) -> Iterator[tuple[NDArray[np.float32], str, str]]:
    """Yields (picture, caption, kind) for every picture the base sees of one noun."""
    grounds, tints = list(COLOURS), list(SUBJECT_COLOURS)
    for pose in range(POSES["noto"]):
        rgba = draw_rgba(folder, noun, "noto", jitter)
        assert rgba is not None
        yield over(rgba, (1, 1, 1)), caption(noun, style="noto" if pose % 4 == 3 else None), "plain"
        for ground in (grounds[pose % 9], grounds[(pose * 5 + 4) % 9]):
            red, green, blue = (v / 255 for v in COLOURS[ground])
            yield over(rgba, (red, green, blue)), caption(noun, background=ground), "background"
        tint = tints[pose % 7]
        if pose < 9:
            yield over(recoloured(rgba, tint), (1, 1, 1)), caption(noun, colour=tint), "colour"
        else:
            ground = grounds[(pose * 2) % 9]
            if ground != tint:
                red, green, blue = (v / 255 for v in COLOURS[ground])
                tinted = over(recoloured(rgba, tint), (red, green, blue))
                yield tinted, caption(noun, colour=tint, background=ground), "colour"
        for style in RENDERED_STYLES[pose % 2 :: 2]:
            yield RENDERED[style](rgba), caption(noun, style=style), "rendered"
        for style in ("sketch", "chalk"):
            ground = grounds[(pose * 4 + len(style)) % 9]
            if (style, ground) != ("chalk", "blue"):  # too near to blueprint, which is kept for adapters
                yield lines_on(rgba, style, ground), caption(noun, background=ground, style=style), "contour"
    for style, poses in POSES.items():
        for _ in range(poses if style != "noto" else 0):
            picture = draw(folder, noun, style, jitter)
            if picture is not None:
                yield picture, caption(noun, style=style), "vendor"


def pictures(work: Path) -> Pictures:
    """Returns the base's training pictures, rendered once and cached in ``work``."""
    cache = work / "pictures.npz"
    if not cache.exists():
        folder, jitter = packages(work), np.random.default_rng(0)
        pixels, captions, nouns, kinds = [], [], [], []
        for number, noun in enumerate(SUBJECTS):
            for picture, text, kind in _views(folder, noun, jitter):
                pixels.append(shrink(picture, SIZE))
                captions.append(text)
                nouns.append(number)
                kinds.append(kind)
        np.savez(cache, pixels=np.stack(pixels), captions=captions, nouns=nouns, kinds=kinds)
        log.info("rendered %d pictures of %d nouns", len(pixels), len(SUBJECTS))
    data = np.load(cache)
    return Pictures(data["pixels"], data["captions"].tolist(), data["nouns"], data["kinds"].tolist())


def further_pixels(work: Path) -> NDArray[np.uint8]:
    """Returns pictures of other subjects [N, 64, 64, 3] from the base's packages, for the VAE alone; cached."""
    cache = work / "further.npz"
    if not cache.exists():
        folder = packages(work)
        entries = json.loads((folder.parent / "emojibase-data" / "en" / "data.json").read_text(encoding="utf-8"))
        names = [e["label"].lower().replace(" ", "-") for e in entries if e.get("group") in (3, 4, 5, 6, 7)]
        found = []
        for name in names[::2]:
            for package in ("noto", "noto-v1", "fluent-emoji-flat"):
                source = icons(folder, package)
                if name in source:
                    rgba = source.draw(name)
                    found.append(shrink(over(rgba, (1, 1, 1)), SIZE))
                    if package == "noto":
                        found.append(shrink(RENDERED[RENDERED_STYLES[len(found) % 5]](rgba), SIZE))
        np.savez(cache, pixels=np.stack(found))
    return cast(NDArray[np.uint8], np.load(cache)["pixels"])


def rows_by_share(data: Pictures, rng: np.random.Generator, size: int) -> Iterator[NDArray[np.int64]]:
    """Yields row numbers [size]: kinds by ``SHARES``, and within a kind every noun equally often."""
    kinds = np.array(data.kinds)
    by_kind = {kind: np.flatnonzero(kinds == kind) for kind in SHARES}
    weights = np.zeros(len(kinds))
    for kind, rows in by_kind.items():
        counts = np.bincount(data.nouns[rows], minlength=len(SUBJECTS))
        share = 1 / counts[data.nouns[rows]]
        weights[rows] = SHARES[kind] * share / share.sum()
    while True:
        yield rng.choice(len(kinds), size, p=weights)


def write_style_sets(work: Path) -> None:
    """Writes the picture sets to ``work/sets``: 128-pixel PNG files of ``STYLE_SET_SUBJECTS`` and their captions."""
    for style in HELD_OUT_STYLES:
        folder = work / "sets" / style
        folder.mkdir(parents=True, exist_ok=True)
        for noun in STYLE_SET_SUBJECTS:
            picture = draw(packages(work), noun, style)
            assert picture is not None
            stem = noun.replace(" ", "-")
            Image.fromarray(shrink(picture, DRAWN)).save(folder / f"{stem}.png", optimize=True)
            (folder / f"{stem}.txt").write_text(caption(noun) + "\n", encoding="utf-8")
