"""A labelled sheet of pictures: rows down, columns across."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

LEAST_SIDE = 128
"""Smaller pictures are enlarged by a whole factor, so that the labels stay readable (pixels)."""


def sheet(pictures: Sequence[Sequence[Image.Image]], rows: Sequence[str], columns: Sequence[str]) -> Image.Image:
    """The pictures [rows][columns], all of one size, in a grid with a label for each row and column."""
    width, height = pictures[0][0].size
    factor = max(1, -(-LEAST_SIDE // min(width, height)))
    width, height = width * factor, height * factor
    gap, text = max(2, height // 64), max(12, height // 12)
    font = ImageFont.load_default(text)
    characters = max(8, int(width / (0.55 * text)))
    heads = [textwrap.wrap(label, characters) for label in columns]
    left, top = width + gap, (max(map(len, heads), default=0) + 1) * text
    page = Image.new("RGB", (left + len(columns) * (width + gap), top + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(page)
    for x, lines in enumerate(heads):
        middle = (left + x * (width + gap) + width / 2, top - text / 2)
        draw.multiline_text(middle, "\n".join(lines), "black", font, anchor="md", align="center")
    for y, (label, line) in enumerate(zip(rows, pictures, strict=True)):
        corner = top + y * (height + gap)
        parts = [part for each in label.splitlines() for part in textwrap.wrap(each, characters)]
        words = "\n".join(parts[: height // text])
        draw.multiline_text((width - gap, corner + height / 2), words, "black", font, anchor="rm", align="right")
        for x, picture in enumerate(line):
            place = (left + x * (width + gap), corner)
            page.paste(picture.resize((width, height), Image.Resampling.BICUBIC), place)
    return page
