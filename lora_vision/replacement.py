"""Replacement: a layer whose weight or bias an adapter gives anew instead of changing it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lora_vision.errors import AdapterError
from lora_vision.factors import Factors


@dataclass(frozen=True, eq=False, kw_only=True)
class Replacement(Factors):
    """New values for a layer (PEFT ``modules_to_save`` and ``bias="lora_only"``): ``delta = weight - W``.

    Attributes:
        weight: The new weight, in the layer's shape; None when it stays or ``inner`` changes it.
        new_bias: The new bias [O], or None when it stays.
        inner: What changes the weight when only the bias is replaced.
    """

    needs_base: ClassVar[bool] = True
    weight: Tensor | None = None
    new_bias: Tensor | None = None
    inner: Factors | None = None

    def __post_init__(self) -> None:
        if (self.weight is None and self.new_bias is None) or (self.weight is not None and self.inner is not None):
            raise AdapterError("Replacement expects a new weight, or a new bias with or without another change")

    @property
    def rank(self) -> int | None:
        return None if self.inner is None else self.inner.rank

    @property
    def size(self) -> tuple[int, int] | None:
        if self.weight is None:
            return None if self.inner is None else self.inner.size
        return self.weight.shape[0], math.prod(self.weight.shape[1:])

    def fits(self, shape: Sequence[int]) -> bool:
        fits_bias = self.new_bias is None or self.new_bias.numel() == shape[0]
        return fits_bias and (self.inner is None or self.inner.fits(shape)) and super().fits(shape)

    def bias_delta(self, base_bias: Tensor | None = None) -> Tensor | None:
        if self.new_bias is None:
            return None if self.inner is None else self.inner.bias_delta(base_bias)
        if base_bias is None:
            raise AdapterError("this change replaces a bias, and the layer has none")
        return self.new_bias.to(base_bias.device, torch.float32) - base_bias.float()

    def tensors(self) -> dict[str, Tensor]:
        inner = {} if self.inner is None else self.inner.tensors()
        return {**{f"inner.{name}": value for name, value in inner.items()}, **super().tensors()}

    def _delta(self, base: Tensor | None) -> Tensor:
        assert base is not None  # delta() has checked
        if self.weight is not None:
            return self.weight.to(base.device, torch.float32) - base.float()
        return torch.zeros_like(base, dtype=torch.float32) if self.inner is None else self.inner.delta(base)
