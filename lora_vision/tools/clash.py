"""How far two adapters move each other, read off a base's own predictions; no picture is drawn with both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lora_vision.adapter import Adapter
from lora_vision.base import Base
from lora_vision.blend import Blend
from lora_vision.samples import draw
from lora_vision.tools.trials import Watch


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
