"""Heat maps, lines and bars as pictures, drawn like the loss curve in charts.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lora_vision.charts import BLUE, GRID, INK, ORANGE

COLOURS = (BLUE, ORANGE, "#2a8c4a", "#8a4fbf", "#c23b3b", "#7a6a2f", "#2f9aa8", "#b04f8f", "#555555")
_WARM = ((255, 252, 245), (252, 205, 140), (232, 120, 60), (165, 30, 40), (60, 5, 30))
_COOL = ((20, 60, 140), (130, 175, 225), (250, 250, 250), (240, 160, 120), (165, 30, 40))


def _colour(share: float, scale: Sequence[tuple[int, int, int]]) -> tuple[int, int, int]:
    """The colour at a place from 0 to 1 on a scale."""
    at = min(max(share, 0.0), 1.0) * (len(scale) - 1)
    low = min(int(at), len(scale) - 2)
    mixed = [round(a + (b - a) * (at - low)) for a, b in zip(scale[low], scale[low + 1], strict=True)]
    return mixed[0], mixed[1], mixed[2]


def heat_map(
    values: Mapping[tuple[str, str], float],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    *,
    signed: bool = False,
    most: float | None = None,
) -> Image.Image:
    """Cells coloured and labelled by their values; cells without one stay blank.

    Args:
        values: (row, column) to value.
        rows: Labels of the rows.
        columns: Labels of the columns.
        title: What is shown, and in which unit.
        signed: Values from -most to most on a scale of two colours, else from 0 to most.
        most: The value with the strongest colour (default: the largest there is).
    """
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    wide, high, left, top = 66, 30, 130, 86
    page = Image.new("RGB", (left + wide * len(columns) + 20, top + high * len(rows) + 20), "white")
    draw = ImageDraw.Draw(page)
    draw.text((12, 10), title, INK, font)
    peak = most or max((abs(value) for value in values.values()), default=1.0) or 1.0
    for x, column in enumerate(columns):
        draw.multiline_text(
            (left + (x + 0.5) * wide, top - 6), column.replace(" ", "\n"), INK, small, "md", 1, "center"
        )
    for y, row in enumerate(rows):
        draw.text((left - 10, top + (y + 0.5) * high), row, INK, small, anchor="rm")
        for x, column in enumerate(columns):
            box = [left + x * wide, top + y * high, left + (x + 1) * wide - 2, top + (y + 1) * high - 2]
            value = values.get((row, column))
            if value is None:
                draw.rectangle(box, "#f6f6f6")
                continue
            share = (value / peak + 1) / 2 if signed else value / peak
            draw.rectangle(box, _colour(share, _COOL if signed else _WARM))
            dark = abs(value) / peak > (0.7 if signed else 0.5)
            text = f"{value:.2f}" if peak < 10 else f"{value:.0f}"
            draw.text((box[0] + wide / 2, box[1] + high / 2), text, "white" if dark else INK, small, anchor="mm")
    return page


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    title: str,
    across: str,
    size: tuple[int, int] = (680, 400),
    *,
    most: float | None = None,
    log: bool = False,
) -> Image.Image:
    """Curves over a common axis from zero up, each with its name.

    Args:
        series: Name to points (x, y), x rising.
        title: What is shown, and in which unit.
        across: What x is.
        size: Width and height in pixels.
        most: The largest y shown (default: a little above the largest there is).
        log: Show powers of ten of y at equal distances, four of them at most, instead of starting from zero.
    """
    font = ImageFont.load_default(14)
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    left, top, right, bottom = 66, 44, size[0] - 130, size[1] - 50
    points = [point for curve in series.values() for point in curve] or [(0.0, 0.0)]
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    peak = most or 1.08 * max(y for _, y in points) or 1.0
    least = min((y for _, y in points if y > 0), default=peak) / peak
    powers = min(4, max(1, math.ceil(-math.log10(least))))

    def across_at(x: float) -> float:
        return left + (x - first) / ((last - first) or 1) * (right - left)

    def down_at(y: float) -> float:
        share = min(max(y / peak, 0), 1)
        height = max(0, 1 + math.log10(max(share, 1e-9)) / powers) if log else share
        return bottom - height * (bottom - top)

    draw.text((12, 10), title, INK, font)
    draw.text(((left + right) / 2, size[1] - 8), across, INK, font, anchor="mb")
    for tick in [peak * 10.0**-power for power in range(powers + 1)] if log else ticks(0, peak):
        draw.line([(left, down_at(tick)), (right, down_at(tick))], GRID)
        draw.text((left - 8, down_at(tick)), f"{tick:.3g}", INK, font, anchor="rm")
    places = sorted({x for x, _ in points})
    for tick in places if len(places) < 7 else sorted({first, *ticks(first, last)}):
        draw.text((across_at(tick), bottom + 8), f"{tick:.3g}", INK, font, anchor="mt")
    for number, (name, curve) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        placed = [(across_at(x), down_at(y)) for x, y in curve]
        draw.line(placed, colour, 3, joint="curve")
        for x, y in placed if len(placed) < 40 else ():
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], colour)
        draw.text((right + 10, top + 20 * number), name, colour, font)
    return page


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high at equal distances: at most seven."""
    size = 10.0 ** math.floor(math.log10(max(high - low, 1e-9) / 6))
    step = next(size * times for times in (1, 2, 5, 10) if (high - low) / (size * times) <= 6)
    return [step * number for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def bars(values: Mapping[str, Sequence[float]], names: Sequence[str], title: str) -> Image.Image:
    """Horizontal bars: a group for each key, in it one bar for each name."""
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    thick, gap, left, length = 16, 10, 130, 440
    group = thick * len(names) + gap
    page = Image.new("RGB", (left + length + 90, 70 + group * len(values)), "white")
    draw = ImageDraw.Draw(page)
    draw.text((12, 10), title, INK, font)
    for number, name in enumerate(names):
        draw.text((left + 170 * number, 36), name, COLOURS[number], small)
    peak = max((value for group_ in values.values() for value in group_), default=1.0) or 1.0
    for row, (label, shares) in enumerate(values.items()):
        y = 62 + row * group
        draw.text((left - 10, y + (group - gap) / 2), label, INK, small, anchor="rm")
        for number, value in enumerate(shares):
            end = left + max(value, 0) / peak * length
            draw.rectangle([left, y + thick * number, end, y + thick * (number + 1) - 3], COLOURS[number])
            draw.text((end + 6, y + thick * number + 6), f"{value:z.2f}", INK, small, anchor="lm")
    return page


def over(picture: Image.Image, values: np.ndarray) -> Image.Image:
    """A map of values [H, W], lowest pale and highest dark red, with the picture shining through."""
    low, high = float(values.min()), float(values.max())
    levels = ((values - low) / ((high - low) or 1) * 255).astype(np.uint8)
    fine = Image.fromarray(levels).resize(picture.size, Image.Resampling.BICUBIC)
    table = np.array([_colour(level / 255, _WARM) for level in range(256)], dtype=np.float32)
    grey = np.asarray(picture.convert("L"), dtype=np.float32)[..., None]
    return Image.fromarray((0.7 * table[np.asarray(fine)] + 0.3 * grey).astype(np.uint8))


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """The pictures, one below the other."""
    page = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    y = 0
    for picture in pictures:
        page.paste(picture, (0, y))
        y += picture.height
    return page
