"""How strong an adapter is at each moment of denoising: a schedule multiplies the weights of its UNet layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from lora_vision.adapter import Adapter
from lora_vision.arguments import near
from lora_vision.klora import turning_points


class Moment(NamedTuple):
    """Where denoising stands.

    Attributes:
        step: Position in the scheduler's list of timesteps, from 0. Image-to-image starts later in that list, so a
            schedule means the same noise level there.
        steps: Length of that list.
    """

    step: int
    steps: int

    @property
    def progress(self) -> float:
        """0 at the first step, 1 at the last."""
        return self.step / (self.steps - 1) if self.steps > 1 else 0.0


Ramp = Callable[[Moment], float]

Schedule = Ramp | Callable[[Moment], Mapping[str, float]]
"""A factor for each moment: one for all layers, or one for each layer named (the others stay at 1).

Text encoders run before the first step, so no schedule reaches them."""


def constant(value: float = 1.0) -> Ramp:
    """The schedule that always gives this factor."""
    return lambda moment: value


def linear(start: float, end: float) -> Ramp:
    """The schedule that goes from start to end in a straight line."""
    return lambda moment: start + (end - start) * moment.progress


def cosine(start: float, end: float) -> Ramp:
    """The schedule that goes from start to end along half a cosine: slowly, quickly, slowly."""
    return lambda moment: end + (start - end) * (1 + math.cos(math.pi * moment.progress)) / 2


def window(begin: float, end: float) -> Ramp:
    """The schedule that is 1 while ``begin <= progress <= end`` and 0 outside."""
    return lambda moment: float(begin <= moment.progress <= end)


def listed(values: Sequence[float]) -> Ramp:
    """The schedule that reads its factors from a list, stretched over the steps; as long as they are, one for each.

    Raises:
        ValueError: The list is empty.
    """
    if not values:
        raise ValueError("an empty list of factors; expected at least one")
    return lambda moment: values[round(moment.progress * (len(values) - 1))]


def switch(names: Sequence[str], every: int = 1) -> dict[str, Ramp]:
    """Schedules by which the named adapters take turns, each for so many steps, others silent meanwhile.

    LoRA Switch of Multi-LoRA Composition (Zhong et al. 2024, section 3.1).

    Raises:
        ValueError: ``every`` is less than one step.
    """
    if every < 1:
        raise ValueError(f"turns of {every} steps; expected at least 1")

    def turn(position: int) -> Ramp:
        return lambda moment: float(moment.step // every % len(names) == position)

    return {name: turn(position) for position, name in enumerate(names)}


def klora(pair: Mapping[str, Adapter]) -> dict[str, Callable[[Moment], Mapping[str, float]]]:
    """Schedules by which a subject's and a style's adapter share out the attention layers, step by step.

    Layers that only one of them has, and other layers than attention, are left to both. See klora.py for the method.

    Args:
        pair: Name to adapter of the subject, then of the style.

    Raises:
        AdapterError: They have no attention layer in common, or one needs the base (DoRA).
    """
    (subject, content), (style, look) = pair.items()
    points = turning_points(content, look)

    def shares(wanted: bool) -> Callable[[Moment], Mapping[str, float]]:
        return lambda m: {name: float((m.progress >= point) == wanted) for name, point in points.items()}

    return {subject: shares(False), style: shares(True)}


RAMPS: Mapping[str, tuple[Callable[..., Ramp], int]] = {
    "constant": (constant, 1),
    "linear": (linear, 2),
    "cosine": (cosine, 2),
    "window": (window, 2),
}


def read(text: str) -> Ramp:
    """The schedule that a text describes: ``linear:0:1``, ``cosine:1:0.2``, ``window:0:0.5``, ``list:1:1:0.5:0``.

    ``linear`` and ``cosine`` alone go from 1 to 0.

    Raises:
        ValueError: The word is unknown, or its numbers are missing, too many or no numbers.
    """
    word, *numbers = text.split(":")
    if word not in RAMPS and word != "list":
        raise ValueError(f"there is no schedule {word!r}: {near(word, [*RAMPS, 'list'])}")
    if word in ("linear", "cosine") and not numbers:
        numbers = ["1", "0"]
    try:
        values = [float(number) for number in numbers]
    except ValueError:
        values = [math.nan]
    if word == "list" and values and all(map(math.isfinite, values)):
        return listed(values)
    made, count = RAMPS.get(word, (listed, 1))
    if len(values) != count or not all(map(math.isfinite, values)):
        form = ":".join([word, *("NUMBER",) * count]) + (":NUMBER..." if word == "list" else "")
        raise ValueError(f"{text!r} is no schedule; expected {form}")
    return made(*values)
