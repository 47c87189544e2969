"""A folder of pictures of one subject that the embedded base does not know, in many poses: for a subject adapter.

    python benchmarks/subject_pictures.py --work DIR --icon robot --output pictures/robot

DIR is the folder of ``train_tiny_base.py`` (the icon packages). The subject stands turned, moved, mirrored, smaller and
larger, on white and on coloured grounds, which the captions name.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from lora_vision.tiny.dataset import packages
from lora_vision.tiny.render import icons, over, shrink
from lora_vision.tiny.subjects import COLOURS, SUBJECTS, VENDOR_STYLES, caption


def main() -> None:
    """Draws and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--icon", default="robot")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=32)
    options = parser.parse_args()
    if options.icon in SUBJECTS.values():
        parser.error(f"the base knows {options.icon}; name an icon that is none of its {len(SUBJECTS)} subjects")
    source = icons(packages(options.work), VENDOR_STYLES["noto"])
    random = np.random.default_rng(5)
    options.output.mkdir(parents=True, exist_ok=True)
    for number in range(options.count):
        shift = (random.uniform(-0.08, 0.08), random.uniform(-0.08, 0.08))
        degrees, scale = random.uniform(-20, 20), random.uniform(0.65, 0.95)
        drawing = source.draw(options.icon, scale=scale, degrees=degrees, shift=shift)
        drawing = drawing[:, ::-1] if number % 2 else drawing
        ground = list(COLOURS)[number // 3 % len(COLOURS)] if number % 3 == 0 else None
        colour = (1.0, 1.0, 1.0) if ground is None else tuple(value / 255 for value in COLOURS[ground])
        picture = shrink(over(drawing, colour), 64)  # type: ignore[arg-type]
        Image.fromarray(picture).save(options.output / f"{number:02}.png")
        words = caption(options.icon, background=ground) if ground else caption(options.icon)
        (options.output / f"{number:02}.txt").write_text(words + "\n")


if __name__ == "__main__":
    main()
