"""Pictures and captions encoded once, and the batches cut from them.

Every random number of a batch comes from the run's seed and the place of the sample in the run (a position counted
over all steps, micro-batches and processes). So a resumed run draws what the unbroken one would have drawn, and one
process with a batch of 8 sees what two with 4 each see.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from lora_vision.base import Base, TextStates
from lora_vision.data import Picture, crop_offset, load_pixels
from lora_vision.errors import DataError

T = TypeVar("T")
GOLDEN = 0.6180339887498949
PIXELS_AT_ONCE = 8 * 512 * 512


def _chunks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """The items in runs of at most `size`."""
    return [items[start : start + size] for start in range(0, len(items), size)]


@dataclass(frozen=True)
class StyleBatch:
    """What one step of a style learns from.

    Attributes:
        latents: Clean latents [B, C, h, w], scaled for the UNet.
        noise: Standard normal noise of the same shape.
        timesteps: How noisy each row is made, [B], integers from 0 to the schedule's last.
        text: Text states of the B captions, or the captions themselves where the text encoder is trained.
        time_ids: SDXL's sizes and crops [B, 6]; None for SD 1.x and 2.x.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    text: TextStates | tuple[str, ...]
    time_ids: Tensor | None = None

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.timesteps)


@dataclass(frozen=True)
class EncodedPictures:
    """N pictures as the UNet sees them, on the CPU.

    Attributes:
        mean: Of each picture's latents [N, C, h, w].
        std: Standard deviation of the same.
        captions: N captions.
        text: Text states of the captions; None where the text encoder is trained.
        time_ids: SDXL's sizes and crops [N, 6]; None for SD 1.x and 2.x.
    """

    mean: Tensor
    std: Tensor
    captions: tuple[str, ...]
    text: TextStates | None
    time_ids: Tensor | None

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self.mean)


def encode(
    base: Base, pictures: Sequence[Picture], resolution: int, *, keep_captions: bool = False, quiet: bool = False
) -> EncodedPictures:
    """The pictures' latents and, unless the captions are kept as they are, their text states.

    Args:
        base: Whose VAE and text encoders are used.
        pictures: What to encode.
        resolution: Side of the square pictures in pixels.
        keep_captions: Leave the captions as words, for a text encoder that is trained.
        quiet: Show no progress bar.

    Raises:
        DataError: Where a picture cannot be read or its latents are not finite, named.
    """
    means, stds = [], []
    chunks = _chunks(pictures, min(32, max(1, PIXELS_AT_ONCE // resolution**2)))
    for chunk in tqdm(chunks, desc="encoding pictures", delay=2, leave=False, disable=quiet):
        pixels = torch.stack([load_pixels(picture.path, resolution) for picture in chunk])
        mean, std = base.encode_pictures(pixels)
        for picture, latents in zip(chunk, mean, strict=True):
            if not latents.isfinite().all():
                raise DataError(
                    f"the VAE makes no finite latents of {picture.path}; remove it, or load the VAE in fp32"
                )
        means.append(mean.float().cpu())
        stds.append(std.float().cpu())
    captions = tuple(picture.caption for picture in pictures)
    time_ids = None
    if base.family == "sdxl":
        crops = [crop_offset(picture.size, resolution) for picture in pictures]
        rows = [[*p.size, *crop, resolution, resolution] for p, crop in zip(pictures, crops, strict=True)]
        time_ids = torch.tensor(rows, dtype=torch.float32)
    text = None if keep_captions else encode_captions(base, captions)
    return EncodedPictures(torch.cat(means), torch.cat(stds), captions, text, time_ids)


@torch.no_grad()
def encode_captions(base: Base, captions: Sequence[str], batch_size: int = 32) -> TextStates:
    """Text states of the captions on the CPU, each different caption computed once."""
    distinct = sorted(set(captions))
    chunks = [base.encode_text(chunk) for chunk in _chunks(distinct, batch_size)]
    states = torch.cat([chunk.states.cpu() for chunk in chunks])
    pooled = [chunk.pooled.cpu() for chunk in chunks if chunk.pooled is not None]
    place = {caption: index for index, caption in enumerate(distinct)}
    index = torch.tensor([place[caption] for caption in captions])
    return TextStates(states, torch.cat(pooled) if pooled else None).rows(index)


def generator(seed: int, *key: object) -> torch.Generator:
    """A generator that depends on the seed and the key only."""
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest))


class StyleBatches:
    """The endless stream of training samples, cut anywhere.

    Each pass over the pictures has its own order. Timesteps follow the golden ratio's sequence: uniform, and spread
    evenly over the noise levels within any few steps, which a plain draw is not.
    """

    def __init__(
        self, pictures: EncodedPictures, timesteps: int, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        """The stream over these pictures for a schedule of so many timesteps."""
        self.pictures = pictures
        self.timesteps = timesteps
        self.seed = seed
        self.device = device
        self._start = torch.rand((), generator=generator(seed, "timesteps"), dtype=torch.float64).item()
        self._order = lru_cache(maxsize=4)(self._shuffled)

    def __call__(self, position: int, count: int) -> StyleBatch:
        """The samples from `position` on."""
        places = range(position, position + count)
        index = [self._order(place // len(self.pictures))[place % len(self.pictures)] for place in places]
        levels = [int((self._start + place * GOLDEN) % 1.0 * self.timesteps) for place in places]
        return self._batch(index, levels, [generator(self.seed, "sample", place) for place in places])

    def fixed(self, batch_size: int, levels: int = 4, most: int = 32) -> list[StyleBatch]:
        """Batches for validation: each picture (of the first `most`) at so many noise levels, always the same."""
        count = min(len(self.pictures), most)
        rows = range(count * levels)
        steps = [int((row + 0.5) / len(rows) * self.timesteps) for row in rows]
        return [
            self._batch(
                [row % count for row in chunk],
                [steps[row] for row in chunk],
                [generator(self.seed, "validation", row) for row in chunk],
            )
            for chunk in _chunks(rows, batch_size)
        ]

    def _batch(self, index: list[int], levels: list[int], generators: list[torch.Generator]) -> StyleBatch:
        """The batch of these pictures at these timesteps; latents and noise are drawn by the generators."""
        shape = (2, *self.pictures.mean.shape[1:])
        draws = torch.stack([torch.randn(shape, generator=each) for each in generators])
        rows = torch.tensor(index)
        latents = torch.addcmul(self.pictures.mean[rows], self.pictures.std[rows], draws[:, 0])
        text = self.pictures.text
        ids = self.pictures.time_ids
        return StyleBatch(
            latents=latents.to(self.device),
            noise=draws[:, 1].to(self.device),
            timesteps=torch.tensor(levels, device=self.device),
            text=tuple(self.pictures.captions[i] for i in index) if text is None else text.rows(rows).to(self.device),
            time_ids=None if ids is None else ids[rows].to(self.device),
        )

    def _shuffled(self, epoch: int) -> list[int]:
        """The order of the pictures in one pass."""
        order: list[int] = torch.randperm(len(self.pictures), generator=generator(self.seed, "order", epoch)).tolist()
        return order
