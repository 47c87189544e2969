"""The memory that a layer's stacked factors lie in, with room for more: the tenth adapter copies itself alone.

On a CPU the layer's next forward copies them there, from the mapped file if they come from one: touching new memory is
most of what loading would cost. Where ranks are reserved, and on other devices, they are copied at once.

Shapes: O/I/R and K as in layers.py.
"""

from __future__ import annotations

import math
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from lora_vision.factors import LowRank
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
        held = max(width, 2 * kept)  # what has grown may grow again
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


class Held(NamedTuple):
    """What a layer's stack holds.

    Attributes:
        pairs: The factors, in this order; ranks behind theirs are zero.
        room: How it lies in memory.
    """

    pairs: tuple[LowRank, ...]
    room: Room


class Wanted(NamedTuple):
    """What a layer's stack shall hold.

    Attributes:
        pairs: The factors, in this order.
        width: R, at least the sum of their ranks.
        number: The layer's; see ``Room.of``.
    """

    pairs: tuple[LowRank, ...]
    width: int
    number: int

    def settle(self, layer: LoraLayer) -> None:
        """Makes it so; what stays at the front of the stack is not copied again."""
        with torch.inference_mode(False), torch.no_grad():
            held = self._filled(layer)
        layer.__dict__.update(lora_held=held, lora_wanted=None)  # last: another thread may be at the same layer

    def joined(self, layer: LoraLayer) -> tuple[Tensor, Tensor]:
        """The pairs as new tensors, down [R, I] and up [O, R]; for compilers, under which no layer may change."""
        (device, dtype), inner = place(layer), layer.weight.shape[1:]
        downs, ups = [p.down.reshape(-1, *inner) for p in self.pairs], [p.up.flatten(1) for p in self.pairs]
        return torch.cat(downs).to(device, dtype), torch.cat(ups, 1).to(device, dtype)

    def _filled(self, layer: LoraLayer) -> Held:
        """What is in the layer's stack, after it was put there."""
        before: Held = layer.lora_held or Held((), Room.of(layer, 0, 0, 0))
        alike = (one is other for one, other in zip(before.pairs, self.pairs, strict=False))
        same = len(list(takewhile(bool, alike)))
        at = kept = sum(pair.rank for pair in self.pairs[:same])
        memory, room = layer._buffers["lora_down"], before.room
        if memory is None or not room.holds(memory) or (self.width > room.held if kept else self.width != len(memory)):
            room, old = Room.of(layer, self.width, kept, self.number), (memory, layer._buffers["lora_up"])
            memory = torch.empty(room.size, device=room.place[0], dtype=room.place[1])
            for new, elder, axis in zip(room.ranks(memory, 0, kept), old, (0, 1), strict=True):
                if kept and elder is not None:
                    new.copy_(elder.narrow(axis, 0, kept))
        places: list[Tensor] = []
        factors: list[Tensor] = []
        for pair in self.pairs[same:]:
            places += room.ranks(memory, at, pair.rank)
            factors += pair.down, pair.up
            at += pair.rank
        if places:
            shaped = [f if f.shape == p.shape else f.reshape(p.shape) for f, p in zip(factors, places, strict=True)]
            torch._foreach_copy_(places, shaped)
        for spare in room.ranks(memory, at, self.width - at) if at < self.width else ():
            spare.zero_()
        down, up = room.ranks(memory, 0, self.width)
        put(layer, lora_down=down, lora_up=up)
        return Held(self.pairs, room)


def empty(layer: LoraLayer) -> None:
    """Gives the memory of a layer's stack back; what shall be in it is copied anew."""
    put(layer, lora_down=None, lora_up=None)
    layer.__dict__["lora_held"] = None
