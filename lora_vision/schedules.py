"""How strong an adapter is at each moment of denoising: a schedule multiplies the weights of its UNet layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple


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


Schedule = Callable[[Moment], float]
"""A factor for each moment. Text encoders run before the first step, so no schedule reaches them."""


def constant(value: float = 1.0) -> Schedule:
    """The schedule that always gives this factor."""
    return lambda moment: value


def linear(start: float, end: float) -> Schedule:
    """The schedule that goes from start to end in a straight line."""
    return lambda moment: start + (end - start) * moment.progress


def cosine(start: float, end: float) -> Schedule:
    """The schedule that goes from start to end along half a cosine: slowly, quickly, slowly."""
    return lambda moment: end + (start - end) * (1 + math.cos(math.pi * moment.progress)) / 2


def window(begin: float, end: float) -> Schedule:
    """The schedule that is 1 while ``begin <= progress <= end`` and 0 outside."""
    return lambda moment: float(begin <= moment.progress <= end)


def listed(values: Sequence[float]) -> Schedule:
    """The schedule that reads its factors from a list, stretched over the steps; as long as they are, one for each.

    Raises:
        ValueError: The list is empty.
    """
    if not values:
        raise ValueError("an empty list of factors; expected at least one")
    return lambda moment: values[round(moment.progress * (len(values) - 1))]


def switch(names: Sequence[str], every: int = 1) -> dict[str, Schedule]:
    """Schedules by which the named adapters take turns, each for so many steps, others silent meanwhile.

    LoRA Switch of Multi-LoRA Composition (Zhong et al. 2024, section 3.1).

    Raises:
        ValueError: ``every`` is less than one step.
    """
    if every < 1:
        raise ValueError(f"turns of {every} steps; expected at least 1")

    def turn(position: int) -> Schedule:
        return lambda moment: float(moment.step // every % len(names) == position)

    return {name: turn(position) for position, name in enumerate(names)}
