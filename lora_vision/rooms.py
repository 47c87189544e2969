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
    """How one layer's stack lies in memory: its downs, ranks the slow dimension, and behind all that fit its ups.

    The layer's own buffers alone keep that memory: it goes with them.

    Attributes:
        place: Device and dtype.
        held: How many ranks fit.
        inner: [I] or [I, K, K].
        strides: Of a down.
        out: O.
    """

    place: tuple[torch.device, torch.dtype]
    held: int
    inner: tuple[int, ...]
    strides: tuple[int, ...]
    out: int

    @classmethod
    def of(cls, layer: LoraLayer, width: int, kept: int, number: int) -> Room:
        """Room for more ranks than asked, so that the tenth adapter copies itself alone.

        A CPU commits memory only when it is written to, so there the first room is large, and differs with the layer's
        number: no single adapter makes all layers move.
        """
        (device, dtype), (out, *inner) = place(layer), layer.weight.shape
        held = max(width, 2 * kept)  # what stays may grow again
        if device.type == "cpu" and layer._buffers["lora_down"] is None:
            held = min(width * (12 + number % 8), width + _SPARE)
        strides = tuple(math.prod(inner[axis:]) for axis in range(len(inner) + 1))
        return cls((device, dtype), held, tuple(inner), strides, out)

    @property
    def size(self) -> int:
        """How many numbers there are."""
        return self.held * (self.strides[0] + self.out)

    def holds(self, down: Tensor | None) -> bool:
        """Whether a layer's down still lies here; moving or casting the model gives it memory of its own."""
        if down is None or (down.device, down.dtype) != self.place:
            return False
        return down.untyped_storage().nbytes() == self.size * down.dtype.itemsize

    def ranks(self, memory: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Views of some ranks: down [count, I] and up [O, count].

        Args:
            memory: Any tensor that lies here.
            first: The first of them.
            count: How many.
        """
        step = self.strides[0]
        down = memory.as_strided((count, *self.inner), self.strides, first * step)
        return down, memory.as_strided((self.out, count), (1, self.out), self.held * step + first * self.out)


def widened(layer: LoraLayer, room: Room | None, width: int, kept: int, number: int) -> Room:
    """The room of a layer whose stack now has ``width`` ranks, the first ``kept`` of them as they were.

    Args:
        layer: Its ``lora_down`` and ``lora_up`` are set.
        room: That of its stack, if it had one.
        width: At least 1.
        kept: How many ranks stay.
        number: The layer's; see ``Room.of``.
    """
    memory, up = layer._buffers["lora_down"], layer._buffers["lora_up"]
    there = room is not None and room.holds(memory)
    if room is not None and memory is not None and there and len(memory) == width:
        return room
    if room is None or memory is None or not (there and kept and width <= room.held):
        room, old = Room.of(layer, width, kept, number), (memory, up)
        memory = torch.empty(room.size, device=room.place[0], dtype=room.place[1])
        for new, elder, axis in zip(room.ranks(memory, 0, kept), old, (0, 1), strict=True):
            if kept and elder is not None:
                new.copy_(elder.narrow(axis, 0, kept))
    down, up = room.ranks(memory, 0, width)
    put(layer, lora_down=down, lora_up=up)
    return room
