"""Pictures of how good answers are: confusion matrix, reliability, worst mistakes, methods side by side."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from lora_vision.charts import BLUE, GRID, INK, ORANGE

WIDTH = 720  # pixels


def confusion_matrix(confusion: Sequence[Sequence[int]], labels: Sequence[str]) -> Image.Image:
    """How many pictures of each class (rows) got each answer (columns), darker for a larger share of the row."""
    classes = len(labels)
    side = max(18, min(64, WIDTH // classes))
    font, small = ImageFont.load_default(max(9, min(14, side // 2))), ImageFont.load_default(max(8, min(13, side // 3)))
    left = 12 + max(int(font.getlength(label)) for label in labels)
    page = Image.new("RGB", (left + side * classes + 12, left + side * classes + 12), "white")
    draw = ImageDraw.Draw(page)
    for row, counts in enumerate(confusion):
        top, total = left + row * side, sum(counts) or 1
        draw.text((left - 6, top + side / 2), labels[row], INK, font, anchor="rm")
        for column, count in enumerate(counts):
            corner, share = left + column * side, count / total
            colour = _blend("#ffffff", BLUE if row == column else ORANGE, share)
            draw.rectangle([corner, top, corner + side - 1, top + side - 1], colour, GRID)
            if count and side >= 20:
                ink = "white" if share > 0.5 else INK
                draw.text((corner + side / 2, top + side / 2), str(count), ink, small, anchor="mm")
    for column, label in enumerate(labels):
        tag = Image.new("RGB", (left - 12, side), "white")
        ImageDraw.Draw(tag).text((0, side / 2), label, INK, font, anchor="lm")
        page.paste(tag.rotate(90, expand=True), (left + column * side, 6))
    draw.text((6, 6), "true \\ answered", INK, small)
    return page


def reliability_plot(bins: Sequence[tuple[int, float, float]], title: str) -> Image.Image:
    """Share of right answers over their confidence, by bin; on the diagonal, confidence is what it says."""
    left, top, side = 60, 40, 420
    page = Image.new("RGB", (left + side + 24, top + side + 50), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    bottom, most = top + side, max((count for count, _, _ in bins), default=1) or 1
    for tick in range(5):
        at = tick / 4 * side
        draw.line([(left, bottom - at), (left + side, bottom - at)], GRID)
        draw.text((left - 8, bottom - at), f"{tick / 4:g}", INK, font, anchor="rm")
        draw.text((left + at, bottom + 8), f"{tick / 4:g}", INK, font, anchor="mt")
    step = side / len(bins)
    for number, (count, sure, right) in enumerate(bins):
        if count:
            x = left + number * step
            draw.rectangle([x + 1, bottom - count / most * side * 0.25, x + step - 1, bottom], "#dfe6ec")
            draw.rectangle([x + 1, bottom - right * side, x + step - 1, bottom - right * side + 2], BLUE)
            point = (left + sure * side, bottom - right * side)
            draw.ellipse([point[0] - 4, point[1] - 4, point[0] + 4, point[1] + 4], BLUE)
    draw.line([(left, bottom), (left + side, top)], ORANGE, 2)
    draw.text((left, 12), title, INK, font)
    draw.text((left + side / 2, bottom + 30), "confidence (grey: how many answers)", INK, font, anchor="mt")
    return page


def bars(
    names: Sequence[str], values: Sequence[float], errors: Sequence[float], title: str, best: int | None = None
) -> Image.Image:
    """Horizontal bars with intervals, from a little below the lowest to 1; ``best`` is drawn in another colour."""
    font = ImageFont.load_default(15)
    left = 20 + max(int(font.getlength(name)) for name in names)
    page = Image.new("RGB", (left + 480, 50 + 34 * len(names) + 30), "white")
    draw = ImageDraw.Draw(page)
    draw.text((12, 12), title, INK, font)
    low = max(0.0, min(v - e for v, e in zip(values, errors, strict=True)) - 0.1)
    bottom = 50 + 34 * len(names)

    def place(value: float) -> float:
        return left + (min(max(value, low), 1.0) - low) / (1 - low) * 400

    for tick in range(5):
        value = low + tick / 4 * (1 - low)
        draw.line([(place(value), 44), (place(value), bottom)], GRID)
        draw.text((place(value), bottom + 6), f"{value:.2f}", INK, font, anchor="mt")
    for row, (name, value, error) in enumerate(zip(names, values, errors, strict=True)):
        y = 50 + 34 * row
        draw.text((left - 10, y + 13), name, INK, font, anchor="rm")
        draw.rectangle([left, y + 4, place(value), y + 24], ORANGE if row == best else BLUE)
        draw.line([(place(value - error), y + 14), (place(value + error), y + 14)], INK, 2)
        draw.text((place(value + error) + 8, y + 14), f"{value:.3f}", INK, font, anchor="lm")
    return page


def _blend(low: str, high: str, share: float) -> tuple[int, int, int]:
    """A colour between two."""
    pairs = [(int(low[at : at + 2], 16), int(high[at : at + 2], 16)) for at in (1, 3, 5)]
    red, green, blue = (round(a + (b - a) * share) for a, b in pairs)
    return red, green, blue
