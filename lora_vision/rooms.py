"""The memory that a layer's stacked factors lie in, with room for more: the tenth adapter copies itself alone.

Shapes: O/I/R and K as in layers.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lora_vision.layers import LoraLayer, place, put

_SPARE = 512
"""The most ranks that a layer on a CPU has free at first."""


class Room(NamedTuple):
    """The memory of one layer's stack, ranks the slow dimension: its downs, and behind all that fit its ups.

    Attributes:
        memory: Flat.
        held: How many ranks fit.
        inner: [I] or [I, K, K].
        strides: Of a down.
        out: O.
    """

    memory: Tensor
    held: int
    inner: tuple[int, ...]
    strides: tuple[int, ...]
    out: int

    @classmethod
    def of(cls, layer: LoraLayer, width: int, kept: int, number: int) -> Room:
        """Memory for more ranks than asked, so that the tenth adapter copies itself alone.

        A CPU commits memory only when it is written to, so there the first room is large, and differs with the layer's
        number: no single adapter makes all layers move.
        """
        (device, dtype), (out, *inner) = place(layer), layer.weight.shape
        held = max(width, 2 * kept)  # what stays may grow again
        if device.type == "cpu" and layer._buffers["lora_down"] is None:
            held = min(width * (12 + number % 8), width + _SPARE)
        strides = tuple(math.prod(inner[axis:]) for axis in range(len(inner) + 1))
        memory = torch.empty(held * (strides[0] + out), device=device, dtype=dtype)
        return cls(memory, held, tuple(inner), strides, out)

    def ranks(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Views of some ranks: down [count, I] and up [O, count]."""
        step = self.strides[0]
        down = self.memory.as_strided((count, *self.inner), self.strides, first * step)
        return down, self.memory.as_strided((self.out, count), (1, self.out), self.held * step + first * self.out)


def widened(layer: LoraLayer, room: Room | None, width: int, kept: int, number: int) -> Room:
    """The memory of a layer whose stack now has ``width`` ranks, the first ``kept`` of them as they were.

    Args:
        layer: Its ``lora_down`` and ``lora_up`` are set.
        room: Where its stack was, if it had one.
        width: At least 1.
        kept: How many ranks stay.
        number: The layer's; see ``Room.of``.
    """
    down, up = layer._buffers["lora_down"], layer._buffers["lora_up"]
    there = room is not None and down is not None and down.data_ptr() == room.memory.data_ptr()  # no: it was moved
    if room is not None and down is not None and there and len(down) == width:
        return room
    if room is None or not (there and kept and width <= room.held):
        room = Room.of(layer, width, kept, number)
        for new, old, axis in zip(room.ranks(0, kept), (down, up), (0, 1), strict=True):
            if kept and old is not None:
                new.copy_(old.narrow(axis, 0, kept))
    down, up = room.ranks(0, width)
    put(layer, lora_down=down, lora_up=up)
    return room
