"""Which of two adapters' looks survives when both sound: pictures are drawn with none, each and both, and told apart.

Shapes: N prompts, F numbers that tell a picture's look.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lora_vision.adapter import Adapter
from lora_vision.base import Base
from lora_vision.blend import Blend
from lora_vision.samples import draw

_RIDGE = 0.3
"""What is added to the looks' covariance, relative to its mean variance: there are few pictures."""


def lost(base: Base, pair: Mapping[str, Adapter], prompts: Mapping[str, Sequence[str]], seed: int = 0) -> list[float]:
    """For each of two adapters, the share of pictures drawn with both at 1 that do not have its look.

    Whose look a picture has, neither's, the first's or the second's, is told by a linear discriminant (Fisher 1936)
    that has seen the pictures drawn with none and with each alone.

    Args:
        base: What both were made for; it is left as it was.
        pair: Name to adapter, two of them.
        prompts: Name to what is drawn to see its look: prompts that call it, a dozen at least.
        seed: Of the pictures' noise.

    Raises:
        AdapterError: An adapter does not fit the base.
    """
    blend = Blend(base.parts)
    side = int(base.unet.config.sample_size) * base.factor

    def drawn(name: str, *sounding: str) -> Tensor:
        blend.set(dict.fromkeys(sounding, 1.0))
        return looks(base.vae, draw(base, prompts[name], seed=seed, resolution=side))

    try:
        for name, adapter in pair.items():
            blend.load(adapter, name, scale=0.0)
        shares = []
        for number, name in enumerate(pair, 1):
            called = nearest([drawn(name), *(drawn(name, each) for each in pair)], drawn(name, *pair))
            shares.append(float((called != number).float().mean()))
        return shares
    finally:
        blend.detach()


def nearest(classes: Sequence[Tensor], some: Tensor) -> Tensor:
    """The number [N] of the class [N, F] whose mean is nearest to each of some [N, F], the classes' spread the unit."""
    spread = torch.cat([each - each.mean(0) for each in classes])
    unit = spread.std(0).clamp_min(1e-6)
    covariance = (spread / unit).T.cov()
    ridge = _RIDGE * covariance.trace() / min(spread.shape)
    covariance += ridge * torch.eye(len(unit), dtype=unit.dtype)
    means = torch.stack([each.mean(0) for each in classes]) / unit
    gaps = some[:, None] / unit - means
    squares: Tensor = (gaps * torch.linalg.solve(covariance, gaps.mT).mT).sum(-1)
    return squares.argmin(1)


@torch.no_grad()
def looks(vae: Any, pictures: Sequence[Image.Image]) -> Tensor:
    """Mean and spread over the picture of each channel in the middle of the VAE's encoder: [N, 2 C], double.

    What a style changes lies in such statistics (Huang and Belongie 2017, arXiv 1703.06868), here of the deepest
    features that every base brings along.
    """
    found: list[Tensor] = []
    hook = vae.encoder.mid_block.register_forward_hook(lambda *call: found.append(call[-1]))
    with hook, torch.autocast(vae.device.type, enabled=False):
        for picture in pictures:
            pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None]
            vae.encode(pixels.to(vae.device, vae.dtype) / 127.5 - 1)
    channels = torch.cat(found).flatten(2).cpu().double()
    return torch.cat([channels.mean(2), channels.std(2)], 1)
