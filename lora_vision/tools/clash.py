"""Which of two adapters' looks survives when both sound: pictures are drawn with none, each and both, and told apart.

Shapes: N prompts, F numbers that tell a picture's look.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lora_vision.adapter import Adapter
from lora_vision.base import Base
from lora_vision.blend import Blend
from lora_vision.errors import LoraVisionError
from lora_vision.samples import draw

_RIDGE = 0.3
"""What is added to the looks' covariance, relative to its mean variance where they vary: there are few pictures."""

LEAST = 12
"""How many pictures are drawn at least to see a look."""


def lost(
    base: Base, pair: Mapping[str, Adapter], prompts: Mapping[str, Sequence[str]], seed: int = 0
) -> list[float | None]:
    """For each of two adapters, the share of pictures drawn with both at 1 that do not have its look.

    A picture has one look: neither's, the first's or the second's. A linear discriminant (Fisher 1936) that has seen
    the pictures drawn with none and with each alone tells which. So of two styles on the same prompts at least one
    loses; and a subject drawn in a style has that style's look, which says nothing of its likeness. None is given for
    an adapter that half of its own pictures, each left out in turn, are not told by.

    Args:
        base: What both were made for; it is left as it was.
        pair: Name to adapter, two of them.
        prompts: Name to what is drawn to see its look: prompts that call it. Few are drawn several times.
        seed: Of the pictures' noise.

    Raises:
        AdapterError: An adapter does not fit the base.
        LoraVisionError: The VAE's features are no numbers.
    """
    blend = Blend(base.parts)
    side = int(base.unet.config.sample_size) * base.factor
    known: dict[tuple[str, ...], Tensor] = {}
    bar = tqdm(desc="looks", total=4 * len({tuple(prompts[name]) for name in pair}), disable=None)

    def drawn(name: str, *sounding: str) -> Tensor:
        key = (*prompts[name], "", *sounding)
        if key not in known:
            blend.set(dict.fromkeys(sounding, 1.0))
            rounds = range(seed, seed + math.ceil(LEAST / len(prompts[name])))
            pictures = [each for at in rounds for each in draw(base, prompts[name], seed=at, resolution=side)]
            known[key] = looks(base.vae, pictures)
            bar.update()
        return known[key]

    try:
        for name, adapter in pair.items():
            blend.load(adapter, name, scale=0.0)
        shares: list[float | None] = []
        for number, name in enumerate(pair, 1):
            classes = [drawn(name), *(drawn(name, each) for each in pair)]
            called = nearest(classes, drawn(name, *pair))
            shares.append(float((called != number).float().mean()) if _is_told(classes, number) else None)
        return shares
    finally:
        blend.detach()
        bar.close()


def nearest(classes: Sequence[Tensor], some: Tensor) -> Tensor:
    """The number [N] of the class [N, F] whose mean is nearest to each of some [N, F], the classes' spread the unit."""
    spread = torch.cat([each - each.mean(0) for each in classes])
    unit = spread.std(0).clamp_min(1e-6)
    covariance = (spread / unit).T.cov()
    ridge = (_RIDGE * covariance.trace() / min(spread.shape)).clamp_min(1e-6)
    covariance += ridge * torch.eye(len(unit), dtype=unit.dtype)
    means = torch.stack([each.mean(0) for each in classes]) / unit
    gaps = some[:, None] / unit - means
    squares: Tensor = (gaps * torch.linalg.solve(covariance, gaps.mT).mT).sum(-1)
    return squares.argmin(1)


def _is_told(classes: Sequence[Tensor], number: int) -> bool:
    """Whether half of a class's members at least are called by its number, each prompt left out of all in turn."""
    ordered = [*classes[:number], *classes[number + 1 :], classes[number]]  # of equal ones the first is nearest
    right = 0
    for row, out in enumerate(classes[number].split(1)):
        rest = [torch.cat([each[:row], each[row + 1 :]]) for each in ordered]
        right += int(nearest(rest, out)) == len(rest) - 1
    return 2 * right >= len(classes[number])


@torch.no_grad()
def looks(vae: Any, pictures: Sequence[Image.Image]) -> Tensor:
    """Mean and spread over the picture of each channel in the middle of the VAE's encoder: [N, 2 C], double.

    What a style changes lies in such statistics (Huang and Belongie 2017, arXiv 1703.06868), here of the deepest
    features that every base brings along.

    Raises:
        LoraVisionError: They are no numbers: a VAE overflows in half precision.
    """
    found: list[Tensor] = []

    def keep(*call: Any) -> None:
        channels = call[-1].flatten(2).double()
        found.append(torch.cat([channels.mean(2), channels.std(2)], 1).cpu())

    with vae.encoder.mid_block.register_forward_hook(keep), torch.autocast(vae.device.type, enabled=False):
        for picture in pictures:
            pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None] / 127.5 - 1
            vae.encode(pixels.to(vae.device, vae.dtype))
    features = torch.cat(found)
    if not features.isfinite().all():
        raise LoraVisionError(f"found features that are no numbers, in a VAE in {vae.dtype}; use it in float32")
    return features
