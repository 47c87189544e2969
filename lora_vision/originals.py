"""Merged weights: the untouched ones are copied aside once, changed in place, and written back bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lora_vision.factors import LowRank
from lora_vision.layers import LoraEmbedding, LoraLayer

Keep = Literal["device", "cpu", "nowhere"]


@dataclass
class _Copy:
    """One untouched tensor; after it was written back also where that was, to tell whether it still is the same."""

    values: Tensor
    written: tuple[int, int] | None = None


class Originals:
    """What the weights and biases of merged layers were.

    Attributes:
        forgotten: Layers merged with ``keep="nowhere"``.
    """

    def __init__(self) -> None:
        self.forgotten: set[str] = set()
        self._copies: dict[tuple[str, str], _Copy] = {}

    def get(self, name: str, attribute: str) -> Tensor | None:
        """The untouched weight or bias of a layer that holds another one now, else None."""
        copy = self._copies.get((name, attribute))
        return copy.values if copy is not None and copy.written is None else None

    def save(self, name: str, layer: LoraLayer, attribute: str, keep: Keep) -> None:
        """Copies the weight or bias of an untouched layer, unless the copy of the last merge is still true."""
        if keep == "nowhere":
            self.forgotten.add(name)
            self._copies.pop((name, attribute), None)
            return
        held, copy = getattr(layer, attribute), self._copies.get((name, attribute))
        if copy is not None and not isinstance(layer, LoraEmbedding) and _is_same(held, copy):  # tokens change singly
            copy.written = None
        else:
            place = "cpu" if keep == "cpu" else held.device
            self._copies[name, attribute] = _Copy(held.data.to(place, copy=True))

    def put_back(self, name: str, layer: LoraLayer) -> None:
        """Writes the untouched weight and bias back. Copies in CPU memory wait for the next merge."""
        for attribute in ("weight", "bias"):
            if (values := self.get(name, attribute)) is not None:
                held = getattr(layer, attribute)
                held.data.copy_(values)
                self._copies[name, attribute].written = (held.data_ptr(), held._version)
                if values.device.type != "cpu":
                    del self._copies[name, attribute]

    def drop_idle(self) -> None:
        """Frees the copies that no layer needs for getting its weight back."""
        self._copies = {at: copy for at, copy in self._copies.items() if copy.written is None}


def _is_same(held: Tensor, copy: _Copy) -> bool:
    """Whether nobody wrote to a weight since the copy was written back, as far as address, version and a sample tell.

    The sample is for those who write through ``.data``, which counts no version.
    """
    values = copy.values
    if copy.written != (held.data_ptr(), held._version) or (held.dtype, held.shape) != (values.dtype, values.shape):
        return False
    if not held.is_contiguous() or not values.is_contiguous():
        return False
    step = max(1, held.numel() // 61)
    return torch.equal(held.data.view(-1)[::step].to(values.device), values.view(-1)[::step])


def add_pairs(weight: Tensor, pairs: Sequence[tuple[LowRank, float]]) -> None:
    """Adds Σ share · delta of each pair to a weight, in place: one product of the stacked factors, in float32."""
    at, exact = weight.device, torch.float32
    shares = [pair.scale * share for pair, share in pairs]
    ups = [pair.up.to(at, exact).flatten(1) for pair, _ in pairs]
    downs = [pair.down.to(at, exact).flatten(1) for pair, _ in pairs]
    up, down, share = ups[0], downs[0], shares[0]
    if len(pairs) > 1:
        up, down, share = torch.cat(ups, dim=1), torch.cat(downs), 1.0
        for part, factor in zip(down.split([len(each) for each in downs]), shares, strict=True):
            part.mul_(factor)
    if weight.dtype == exact and weight.is_contiguous():
        weight.view(len(weight), -1).addmm_(up, down, alpha=share)
    else:
        weight.copy_(torch.addmm(weight.float().flatten(1), up, down, alpha=share).view(weight.shape))
