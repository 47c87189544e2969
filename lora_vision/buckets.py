"""At which size each picture is trained: its own shape and about the same area, so that no subject is cut away."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lora_vision.data import Picture, Size


def fitting(size: Size, resolution: int, step: int, *, upscale: bool = False) -> Size:
    """Height and width, multiples of `step`, at which a picture of this size is trained.

    Of all sizes of at most the area of a resolution x resolution square it is the one that loses least: of the picture
    at its rim, and of the area. A square picture gets exactly that square. Smaller pictures are not enlarged, save for
    those below one step.

    Args:
        size: Height and width of the picture.
        resolution: Side of the square.
        step: What sides must be a multiple of: pixels of one latent in the UNet's smallest map.
        upscale: Enlarge smaller pictures.
    """
    height, width = size
    if height == width and (upscale or height >= resolution):
        return resolution, resolution
    area = resolution**2 if upscale else min(resolution**2, height * width)
    tallest = math.inf if upscale else height // step
    widest = math.inf if upscale else width // step
    best, least = (step, step), math.inf
    for rows in range(1, int(min(tallest, area // step**2)) + 1):
        ideal = rows * width / height
        for columns in {math.floor(ideal), math.ceil(ideal)}:
            if not 1 <= columns <= widest or rows * columns * step**2 > area:
                continue
            kept = min(columns / ideal, ideal / columns)
            loss = (1 - kept) + (1 - rows * columns * step**2 / area) / 5
            if loss < least:
                best, least = (rows * step, columns * step), loss
    return best


def by_size(
    pictures: Sequence[Picture], resolution: int, step: int, *, upscale: bool = False
) -> dict[Size, list[Picture]]:
    """The pictures by the size at which they are trained, largest group first, each group in the given order."""
    groups: dict[Size, list[Picture]] = {}
    for picture in pictures:
        groups.setdefault(fitting(picture.size, resolution, step, upscale=upscale), []).append(picture)
    return dict(sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])))
