"""The loss curve of a run, as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

INK, GRID, BLUE, ORANGE = "#222222", "#dddddd", "#1f77b4", "#e0701b"


def loss_curve(
    losses: Sequence[float], validation: Mapping[int, float], size: tuple[int, int] = (960, 540)
) -> Image.Image:
    """The training loss (each step and smoothed) and the held-out loss over the steps.

    Args:
        losses: Training loss of each step; what is not finite is left out.
        validation: Held-out loss by number of steps done.
        size: Width and height in pixels.
    """
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    finite = [(step + 1, loss) for step, loss in enumerate(losses) if math.isfinite(loss)]
    smoothed = _smooth(finite)
    held_out = [(step, loss) for step, loss in sorted(validation.items()) if math.isfinite(loss)]
    shown = [loss for _, loss in smoothed + held_out] or [1.0]
    low, high = 0.0, 1.25 * max(shown)
    left, top, right, bottom = 70, 30, size[0] - 20, size[1] - 50
    last = max(1, len(losses))

    def place(point: tuple[int, float]) -> tuple[float, float]:
        step, loss = point
        height = (min(loss, high) - low) / ((high - low) or 1)
        return left + step / last * (right - left), bottom - height * (bottom - top)

    font = ImageFont.load_default(14)
    for tick in range(5):
        y, x = bottom - tick / 4 * (bottom - top), left + tick / 4 * (right - left)
        draw.line([(left, y), (right, y)], GRID)
        draw.text((left - 8, y), f"{low + tick / 4 * (high - low):.3g}", INK, font, anchor="rm")
        draw.text((x, bottom + 8), str(round(tick / 4 * last)), INK, font, anchor="mt")
    draw.text(((left + right) / 2, size[1] - 8), "steps", INK, font, anchor="mb")
    for point in finite:
        x, y = place(point)
        draw.point([(x, y), (x + 1, y), (x, y + 1)], "#a9c7e0")
    for points, colour, label, row in ((smoothed, BLUE, "training loss", 0), (held_out, ORANGE, "held-out loss", 1)):
        draw.line([place(point) for point in points], colour, 3, joint="curve")
        for point in points if points is held_out else ():
            x, y = place(point)
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], colour)
        if points:
            draw.text((right - 8, top + 4 + 20 * row), label, colour, font, anchor="rt")
    return picture


def _smooth(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Means over a moving window of about a twentieth of the points."""
    reach = max(1, len(points) // 40)
    windows = [points[max(0, i - reach) : i + reach + 1] for i in range(len(points))]
    return [
        (point[0], sum(loss for _, loss in window) / len(window)) for point, window in zip(points, windows, strict=True)
    ]
