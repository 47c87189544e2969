"""What is left of two adapters' looks when both sound, and how far they move each other's predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from lora_vision.adapter import Adapter
from lora_vision.base import Base
from lora_vision.blend import Blend
from lora_vision.samples import draw
from lora_vision.tools.trials import Watch, look


@dataclass(frozen=True)
class Clash:
    """What becomes of two adapters' looks when both sound at full weight.

    Attributes:
        shares: Of the look of what is drawn with both: the first's, the second's and the base's. They add up to 1; two
            adapters of the same look share it by halves.
        effects: How far each alone takes the look from the base's (``trials.look``).
    """

    shares: tuple[float, float, float]
    effects: tuple[float, float]

    @property
    def lost(self) -> float:
        """The one number: of all that the two do to the look alone, the share that is lost when both sound.

        Each counts by its effect, so that one that hardly changes the look (of a subject) has little to lose.
        """
        whole = sum(self.effects)
        return sum(e * (1 - s) for e, s in zip(self.effects, self.shares, strict=False)) / whole if whole else 0.0


def clash(base: Base, a: Adapter, b: Adapter, prompts: Sequence[str], seed: int = 0) -> Clash:
    """What is left of the looks of two adapters in pictures drawn with both.

    The prompts are drawn four times from the same noise: with neither, with each alone, with both. A picture drawn
    with both is shared out among its three siblings by the inverse squares of the distances of its look from theirs
    (the memberships of fuzzy c-means, Bezdek 1981): a soft answer to which of them a viewer would take it for.

    Args:
        base: What both were made for; it is left as it was.
        a: One adapter.
        b: The other.
        prompts: What is drawn; best of what both were made for.
        seed: Of the pictures' noise.

    Raises:
        AdapterError: An adapter does not fit the base.
    """
    blend = Blend(base.parts)
    side = int(base.unet.config.sample_size) * base.factor
    drawn = []
    try:
        blend.load(a, "a", scale=0.0)
        blend.load(b, "b", scale=0.0)
        for scales in ({"a": 1.0}, {"b": 1.0}, {}, {"a": 1.0, "b": 1.0}):
            blend.set(scales)
            drawn.append(draw(base, prompts, seed=seed, resolution=side))
    finally:
        blend.detach()
    *siblings, both = drawn
    apart = np.array([[look([one], [other]) for one, other in zip(each, both, strict=True)] for each in siblings])
    near = 1 / np.maximum(apart, 1e-6) ** 2
    first, second, neither = (near / near.sum(0)).mean(1).tolist()
    return Clash((first, second, neither), (look(siblings[0], siblings[2]), look(siblings[1], siblings[2])))


def moved(base: Base, pair: Mapping[str, Adapter], prompts: Mapping[str, Sequence[str]], seed: int = 0) -> list[float]:
    """For each of two adapters how far the other, joining it at full weight, moves what it does to the predictions.

    While pictures are drawn with one alone, the UNet is asked at every step what it would predict without it, and what
    with both: ``|both - alone| / |alone - base|``, root mean squares over steps and pictures. 0: the other is not
    felt; 1: it moves the predictions by as much as the adapter itself does.

    Args:
        base: What both were made for; it is left as it was.
        pair: Name to adapter, two of them.
        prompts: Name to what is drawn with each: prompts that call it.
        seed: Of the pictures' noise.

    Raises:
        AdapterError: An adapter does not fit the base.
    """
    blend = Blend(base.parts)
    side = int(base.unet.config.sample_size) * base.factor
    found = []
    try:
        for name, adapter in pair.items():
            blend.load(adapter, name, scale=0.0)
        for name in pair:
            blend.set({name: 1.0})
            with _Question(base.unet, blend, dict.fromkeys(pair, 1.0)) as question:
                draw(base, prompts[name], seed=seed, resolution=side)
            found.append((question.between / max(question.own, 1e-12)) ** 0.5)
    finally:
        blend.detach()
    return found


class _Question(Watch):
    """While it is on, every UNet call is repeated without adapters and with all of them.

    Attributes:
        own: Sum of the squares of what the sounding adapter changes.
        between: Of what the others change then.
    """

    def __init__(self, unet: nn.Module, blend: Blend, every: Mapping[str, float]) -> None:
        super().__init__(unet, blend)
        self.every, self.own, self.between = every, 0.0, 0.0

    def asked(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Asks, and adds up the differences."""
        with self.blend.using({}):
            plain = self.unet(*args, **kwargs)
        with self.blend.using(self.every):
            both = self.unet(*args, **kwargs)
        self.own += _distance(output[0], plain[0])
        self.between += _distance(both[0], output[0])


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).float().square().sum())
