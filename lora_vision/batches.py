"""The batches cut from encoded pictures.

Every random number of a batch comes from the run's seed and the place of the sample in the run (a position counted
over all steps, micro-batches and processes). So a resumed run draws what the unbroken one would have drawn, and one
process with a batch of 8 sees what two with 4 each see.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from lora_vision.base import TextStates
from lora_vision.captions import Wording
from lora_vision.encoding import EncodedPictures, chunks

GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class StyleBatch:
    """What one step of a style learns from.

    Attributes:
        latents: Clean latents [B, C, h, w], scaled for the UNet.
        noise: Standard normal noise of the same shape.
        timesteps: How noisy each row is made, [B], integers from 0 to the schedule's last.
        text: Text states of the B captions, or the captions themselves where the text encoder is trained.
        time_ids: SDXL's sizes and crops [B, 6]; None for SD 1.x and 2.x.
        mask: How much each latent counts [B, 1, h, w], 0 to 1; None where all do.
        weight: How much each row counts [B]; None where all count alike.
        prior: What the captions are without the trigger, for which the base's own answers shall stay; None: nothing.
        perturbed: The noise that is mixed in, where it is not the noise asked for.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    text: TextStates | tuple[str, ...]
    time_ids: Tensor | None = None
    mask: Tensor | None = None
    weight: Tensor | None = None
    prior: TextStates | tuple[str, ...] | None = None
    perturbed: Tensor | None = None

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.timesteps)


def generator(seed: int, *key: object) -> torch.Generator:
    """A generator that depends on the seed and the key only."""
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest))


class StyleBatches:
    """The endless stream of training samples, cut anywhere.

    Each pass over the pictures has its own order. Timesteps follow the golden ratio's sequence: uniform, and spread
    evenly over the noise levels within any few steps, which a plain draw is not. Where pictures have several sizes,
    the stream is cut into batches of `count` samples of one size each; which size comes next follows the sequence of
    the square root of two, so that every picture is shown as often as any other.
    """

    def __init__(
        self,
        pictures: EncodedPictures | Sequence[EncodedPictures],
        timesteps: int,
        seed: int,
        device: torch.device | str = "cpu",
        wording: Wording | None = None,
        noise_offset: float = 0.0,
        input_perturbation: float = 0.0,
    ) -> None:
        """The stream over these groups of pictures.

        Args:
            pictures: Groups of one size each.
            timesteps: Of the noise schedule.
            seed: Of everything random.
            device: Of the batches.
            wording: How captions vary in training.
            noise_offset: Times a number for each channel is added to the noise in training (Guttenberg 2023).
            input_perturbation: Times more noise is mixed in and not asked for (Ning et al. 2023, arXiv 2301.11706).
        """
        self.groups = [pictures] if isinstance(pictures, EncodedPictures) else list(pictures)
        self.timesteps = timesteps
        self.seed = seed
        self.device = device
        self.wording = wording
        self.noise_offset, self.input_perturbation = noise_offset, input_perturbation
        self._start = torch.rand((), generator=generator(seed, "timesteps"), dtype=torch.float64).item()
        self._order = lru_cache(maxsize=4 * len(self.groups))(self._shuffled)
        self._turns: list[tuple[int, int]] = []
        self._counts = [0] * len(self.groups)

    def __call__(self, position: int, count: int) -> StyleBatch:
        """The samples from `position` on; where pictures have several sizes, position is a multiple of count."""
        places = range(position, position + count)
        group, first = (0, position) if len(self.groups) == 1 else self._turn(position // count, count)
        size = len(self.groups[group])
        index = [self._order(group, place // size)[place % size] for place in range(first, first + count)]
        levels = [int((self._start + place * GOLDEN) % 1.0 * self.timesteps) for place in places]
        return self._batch(group, index, levels, [("sample", place) for place in places], training=True)

    def fixed(self, batch_size: int, levels: int = 4, most: int = 32) -> list[StyleBatch]:
        """Batches for validation: each picture (of the first `most`) at so many noise levels, always the same."""
        members = [(group, index) for group, pictures in enumerate(self.groups) for index in range(len(pictures))]
        members = members[:most]
        rows = range(len(members) * levels)
        steps = [int((row + 0.5) / len(rows) * self.timesteps) for row in rows]
        batches = []
        for group in range(len(self.groups)):
            mine = [row for row in rows if members[row % len(members)][0] == group]
            for chunk in chunks(mine, batch_size):
                index = [members[row % len(members)][1] for row in chunk]
                keys = [("validation", row) for row in chunk]
                batches.append(self._batch(group, index, [steps[row] for row in chunk], keys))
        return batches

    def _turn(self, number: int, count: int) -> tuple[int, int]:
        """Whose turn the batch of that number is, and where it begins in the group's own stream."""
        shares = list(accumulate(len(pictures) for pictures in self.groups))
        while len(self._turns) <= number:
            point = (self._start + len(self._turns) * math.sqrt(2)) % 1.0 * shares[-1]
            group = min(bisect_right(shares, point), len(shares) - 1)
            self._turns.append((group, self._counts[group]))
            self._counts[group] += 1
        group, earlier = self._turns[number]
        return group, earlier * count

    def _batch(
        self,
        group: int,
        index: list[int],
        levels: list[int],
        keys: Sequence[tuple[str, int]],
        *,
        training: bool = False,
    ) -> StyleBatch:
        """The batch of these pictures of a group at these timesteps; a row's draws come from the seed and its key."""
        pictures = self.groups[group]
        shape = (2, *pictures.mean.shape[1:])
        generators = [generator(self.seed, *key) for key in keys]

        def drawn(*shape: int) -> Tensor:
            return torch.stack([torch.randn(shape, generator=each) for each in generators])

        latent_draws, noise = drawn(*shape).unbind(1)
        perturbed: Tensor | None = None
        if training and self.noise_offset:
            noise = noise + self.noise_offset * drawn(shape[1], 1, 1)
        if training and self.input_perturbation:
            perturbed = (noise + self.input_perturbation * drawn(*shape[1:])).to(self.device)
        rows = torch.tensor(index)
        latents = torch.addcmul(pictures.mean[rows], pictures.std[rows], latent_draws)
        captions = [pictures.captions[i] for i in index]
        if training and self.wording is not None:
            told = zip(captions, keys, strict=True)
            captions = [self.wording(caption, generator(self.seed, "words", *key)) for caption, key in told]
        plain: TextStates | tuple[str, ...] | None = None
        if pictures.plain is not None:
            words, states = pictures.plain
            plain = tuple(words[i] for i in index) if states is None else states.rows(rows).to(self.device)

        def there(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows].to(self.device)

        return StyleBatch(
            latents=latents.to(self.device),
            noise=noise.to(self.device),
            timesteps=torch.tensor(levels, device=self.device),
            text=tuple(captions) if pictures.text is None else pictures.text.rows(rows).to(self.device),
            time_ids=there(pictures.time_ids),
            mask=there(pictures.mask),
            weight=there(pictures.weight),
            prior=plain,
            perturbed=perturbed,
        )

    def _shuffled(self, group: int, epoch: int) -> list[int]:
        """The order of a group's pictures in one pass."""
        key = ("order", epoch) if len(self.groups) == 1 else ("order", epoch, group)
        order: list[int] = torch.randperm(len(self.groups[group]), generator=generator(self.seed, *key)).tolist()
        return order
