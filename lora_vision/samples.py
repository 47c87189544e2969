"""Sample pictures drawn while a model trains, without touching what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lora_vision.sheet import sheet
from lora_vision.whole import write_whole

if TYPE_CHECKING:
    from lora_vision.base import Base

PIXELS_AT_ONCE = 4 * 512 * 512


@torch.no_grad()
def draw(base: Base, prompts: Sequence[str], *, seed: int, resolution: int) -> list[Image.Image]:
    """A square picture of each prompt, all from the noise of the same seed.

    Weights, dtypes and the global random state stay as they are. The UNet computes under whatever autocast is on, the
    VAE in its own dtype: SDXL's overflows in fp16.
    """
    pipe = base.pipeline()
    recipe = base.recipe
    pictures: list[Image.Image] = []
    size = max(1, PIXELS_AT_ONCE // resolution**2)
    for start in range(0, len(prompts), size):
        chunk = list(prompts[start : start + size])
        latents = pipe(
            chunk,
            height=resolution,
            width=resolution,
            num_inference_steps=recipe.sample_steps,
            guidance_scale=recipe.guidance,
            generator=[torch.Generator().manual_seed(seed) for _ in chunk],
            output_type="latent",
        ).images
        with torch.autocast(base.device.type, enabled=False):
            pictures += to_pictures(base.decode(latents))
    return pictures


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """Pixels [B, 3, H, W] in [-1, 1] as pictures."""
    bytes_ = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(each)) for each in bytes_]


def png(picture: Image.Image) -> bytes:
    """The picture as the content of a PNG file."""
    content = BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


class SampleSheet:
    """Sample pictures of a run: one column for each look, kept in FOLDER/samples, together in FOLDER/samples.png."""

    def __init__(
        self, base: Base, prompts: Sequence[str], folder: Path, *, seed: int, resolution: int, fresh: bool = True
    ) -> None:
        """The sheet of these prompts; a fresh one forgets what an earlier run drew."""
        self.base, self.prompts, self.folder, self.fresh = base, tuple(prompts), folder, fresh
        self.seed, self.resolution = seed, resolution

    def __call__(self, step: int) -> None:
        """Draw the prompts as they look after this many steps, and renew the sheet."""
        pictures = draw(self.base, self.prompts, seed=self.seed, resolution=self.resolution)
        columns = self.folder / "samples"
        columns.mkdir(parents=True, exist_ok=True)
        for old in columns.glob("[0-9]*.*"):
            if self.fresh or int(old.stem.split("-")[0]) > step:  # of an earlier run, or of steps now taken again
                old.unlink()
        self.fresh = False
        for row, picture in enumerate(pictures):
            write_whole(columns / f"{step:06}-{row}.png", png(picture))
        steps = sorted({int(path.name.split("-")[0]) for path in columns.glob("*-0.png")})
        grid = [[Image.open(columns / f"{each:06}-{row}.png") for each in steps] for row in range(len(pictures))]
        labels = ["base" if each == 0 else f"step {each}" for each in steps]
        write_whole(self.folder / "samples.png", png(sheet(grid, self.prompts, labels)))
