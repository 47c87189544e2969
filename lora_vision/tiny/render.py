"""Pictures for the embedded base, drawn from the vector bodies of open emoji packages, and styles computed from them.

The packages are the npm ones named in ``subjects.VENDOR_STYLES``; drawing needs ``resvg-py`` (extra ``dev``).
Arrays are [H, W, 3 or 4], values in [0, 1].
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from lora_vision.tiny.subjects import COLOURS, SUBJECTS, VENDOR_STYLES

Array = NDArray[np.floating[Any]]
DRAWN = 128  # pixels a side at which outlines are computed before shrinking
LINE_ART = "fluent-emoji-high-contrast"


class Icons:
    """Draws the icons of one package folder (``node_modules/@iconify-json/<name>``)."""

    def __init__(self, packages: Path, name: str) -> None:
        data = json.loads((packages / name / "icons.json").read_text(encoding="utf-8"))
        self._icons: dict[str, Any] = data["icons"]
        self._aliases: dict[str, Any] = data.get("aliases", {})
        self._size = (data.get("width", 16), data.get("height", 16))

    def __contains__(self, icon: str) -> bool:
        return icon in self._icons or icon in self._aliases

    def draw(
        self, icon: str, *, scale: float = 1.0, degrees: float = 0.0, shift: tuple[float, float] = (0, 0)
    ) -> Array:
        """Returns the icon as RGBA [128, 128, 4], moved about its centre; ``shift`` in fractions of the width."""
        import resvg_py

        while icon not in self._icons:
            icon = self._aliases[icon]["parent"]
        body = self._icons[icon]
        width, height = body.get("width", self._size[0]), body.get("height", self._size[1])
        cx, cy = width / 2, height / 2
        to = f"translate({cx + shift[0] * width} {cy + shift[1] * height})"
        move = f"{to} rotate({degrees}) scale({scale}) translate({-cx} {-cy})"
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}" color="#1b1b1f"><g transform="{move}">{body["body"]}</g></svg>'
        )
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=DRAWN, height=DRAWN))
        return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"), np.float32) / 255


@lru_cache(maxsize=8)
def icons(packages: Path, name: str) -> Icons:
    """Returns the package's icons, read once."""
    return Icons(packages, name)


def over(rgba: Array, colour: tuple[float, float, float]) -> Array:
    """Returns the picture on a plain ground, RGB."""
    alpha = rgba[..., 3:]
    return rgba[..., :3] * alpha + np.asarray(colour, np.float32) * (1 - alpha)


def _blur(plane: Array, radius: float) -> Array:
    image = Image.fromarray((plane.clip(0, 1) * 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), np.float32) / 255


def _thicken(plane: Array, size: int) -> Array:
    image = Image.fromarray((plane.clip(0, 1) * 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.MaxFilter(size)), np.float32) / 255


def outlines(rgba: Array) -> Array:
    """Returns the drawing's lines [H, W], 1 on a line: colour and alpha edges, about two pixels wide at 64 px."""
    planes = [_blur(p, 1.0) for p in np.moveaxis(over(rgba, (0.55, 0.55, 0.55)), -1, 0)] + [_blur(rgba[..., 3], 1.0)]
    strength = np.zeros(rgba.shape[:2], np.float32)
    for plane in planes:
        gy, gx = np.gradient(plane)
        strength = np.maximum(strength, np.hypot(gx, gy))
    return _blur(_thicken(((strength - 0.055) * 14).clip(0, 1), 3), 0.7)


def _luminance(rgb: Array) -> Array:
    return (rgb @ np.asarray([0.299, 0.587, 0.114], np.float32))[..., None]


def _on(ground: tuple[int, int, int]) -> Array:
    return np.asarray(ground, np.float32) / 255


def _drawn(rgba: Array, ground: tuple[int, int, int], line: tuple[int, int, int], fill: float) -> Array:
    """Returns lines on a ground, the subject's light areas lifted towards the line colour by ``fill``."""
    lifted = fill * rgba[..., 3:] * (0.25 + 0.75 * _luminance(rgba[..., :3]))
    base = _on(ground) * (1 - lifted) + _on(line) * lifted
    lines = outlines(rgba)[..., None]
    drawn: Array = base * (1 - lines) + _on(line) * lines
    return drawn


def _two_tone(rgba: Array, dark: tuple[int, int, int], light: tuple[int, int, int]) -> Array:
    tone = _luminance(over(rgba, (1, 1, 1)))
    toned: Array = _on(dark) * (1 - tone) + _on(light) * tone
    return toned


def _pastel(rgba: Array) -> Array:
    rgb = over(rgba, (1, 0.97, 0.94))
    return 0.45 * (0.6 * rgb + 0.4 * _luminance(rgb)) + 0.55 * _on((255, 246, 240))


def _silhouette(rgba: Array) -> Array:
    return _on((236, 238, 242)) * (1 - rgba[..., 3:]) + _on((44, 84, 116)) * rgba[..., 3:]


def _night(rgba: Array) -> Array:
    rgb = over(rgba, (0.05, 0.05, 0.11))
    glow = np.stack([_thicken(p, 5) for p in np.moveaxis(over(rgba, (0, 0, 0)), -1, 0)], -1)
    glow = 0.74 * glow / np.maximum(glow.max(-1, keepdims=True), 0.25)
    lines = outlines(rgba)[..., None]
    base = _on((22, 22, 46)) * 0.58 + rgb * 0.42
    lit: Array = base * (1 - lines) + glow * lines
    return lit


RENDERED: dict[str, Callable[[Array], Array]] = {
    "sketch": lambda rgba: _drawn(rgba, (247, 240, 226), (66, 54, 48), 0.12),
    "chalk": lambda rgba: _drawn(rgba, (40, 64, 54), (240, 232, 190), 0.0),
    "silhouette": _silhouette,
    "pastel": _pastel,
    "sepia": lambda rgba: _two_tone(rgba, (64, 38, 18), (242, 228, 200)),
    "blueprint": lambda rgba: _drawn(rgba, (38, 74, 150), (214, 228, 255), 0.28),
    "duotone": lambda rgba: _two_tone(rgba, (84, 28, 98), (255, 205, 118)),
    "night": _night,
}
"""Style word -> RGBA Noto drawing to RGB picture, for the styles that are computed."""


def lines_on(rgba: Array, style: str, colour: str) -> Array:
    """Returns the drawing's lines on a coloured ground, RGB: light on a deep one ("chalk"), dark on a pale one."""
    red, green, blue = COLOURS[colour]
    if style == "chalk":
        return _drawn(rgba, (red * 6 // 10, green * 6 // 10, blue * 6 // 10), (240, 232, 190), 0.0)
    return _drawn(rgba, ((red + 255) // 2, (green + 255) // 2, (blue + 255) // 2), (66, 54, 48), 0.12)


def recoloured(rgba: Array, colour: str) -> Array:
    """Returns the drawing in one hue, its light and dark kept: "a blue fox". RGBA."""
    target = _on(COLOURS[colour])
    value = _luminance(rgba[..., :3])
    tint = np.where(value < 0.5, target * (0.25 + 1.5 * value), target + (1 - target) * (value - 0.5) * 1.5)
    return np.concatenate([tint.clip(0, 1), rgba[..., 3:]], -1).astype(np.float32)


def shrink(rgb: Array, size: int) -> NDArray[np.uint8]:
    """Returns the picture [size, size, 3] as bytes, box-filtered."""
    image = Image.fromarray((rgb.clip(0, 1) * 255).round().astype(np.uint8))
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))


def draw(packages: Path, noun: str, style: str, jitter: np.random.Generator | None = None) -> Array | None:
    """Returns the noun drawn in the style on its own ground, RGB [128, 128, 3]; None where the package lacks it.

    ``jitter`` moves the drawing a little: scale 0.94 to 1, up to 2.5 degrees, up to 3 % of the width.
    """
    rgba = draw_rgba(packages, noun, style, jitter)
    if rgba is None:
        return None
    return RENDERED[style](rgba) if style in RENDERED else over(rgba, (1, 1, 1))


def draw_rgba(packages: Path, noun: str, style: str, jitter: np.random.Generator | None = None) -> Array | None:
    """Returns the drawing itself, RGBA [128, 128, 4], before any computed style; see ``draw``."""
    package = LINE_ART if style == "lineart" else VENDOR_STYLES.get(style, VENDOR_STYLES["noto"])
    source = icons(packages, package)
    if SUBJECTS[noun] not in source:
        return None
    if jitter is None:
        return source.draw(SUBJECTS[noun])
    scale, degrees = jitter.uniform(0.94, 1.0), jitter.uniform(-2.5, 2.5)
    room = 0.01 + (1 - scale) / 3
    angle, length = jitter.uniform(0, 2 * math.pi), jitter.uniform(0, room)
    return source.draw(
        SUBJECTS[noun], scale=scale, degrees=degrees, shift=(length * math.cos(angle), length * math.sin(angle))
    )
