"""The last look at a run: the adapters it kept on its way, each at several weights, to pick one by eye."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from lora_vision.base import Base
from lora_vision.blend import Blend
from lora_vision.files import load_adapter
from lora_vision.samples import draw
from lora_vision.sheet import sheet
from lora_vision.words import teach

WEIGHTS = (0.5, 0.75, 1.0, 1.25)
MOST = 6


def choices(base: Base, folder: Path, prompt: str, *, seed: int, resolution: int) -> Image.Image:
    """A sheet of one prompt: adapters of the folder down (at most MOST, the last among them), WEIGHTS across.

    Args:
        base: What they were trained for, holding no adapter; afterwards it holds none either.
        folder: Of files called by their number of steps.
        prompt: What to draw.
        seed: Of the noise, the same for all.
        resolution: Side of a picture in pixels.
    """
    found = sorted(folder.glob("[0-9]*.safetensors"), key=lambda path: int(path.stem))
    spread = max(1, min(MOST, len(found)))
    kept = [found[len(found) * (number + 1) // spread - 1] for number in range(spread)]
    rows: list[list[Image.Image]] = []
    for path in kept:
        adapter = load_adapter(path)
        teach(base.parts, base.tokenizers, [adapter])
        blend = Blend(base.parts)
        try:
            blend.load(adapter, name="kept")
            rows.append([])
            for weight in WEIGHTS:
                blend.set({"kept": weight})
                rows[-1] += draw(base, [prompt], seed=seed, resolution=resolution)
        finally:
            blend.detach()
    return sheet(rows, [f"step {int(path.stem)}" for path in kept], [f"at {weight:g}" for weight in WEIGHTS])
