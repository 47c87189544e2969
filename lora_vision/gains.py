"""The numbers of a stack: which rank of which layer takes which weight, kept in one flat tensor the layers look into.

Shapes: G rows of weights, L layers of one adapter, R all ranks of one adapter, layer after layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from lora_vision.factors import Factors, LowRank
from lora_vision.layers import LoraLayer, place, put


@dataclass(frozen=True)
class Loaded:
    """One adapter, sorted by how its layers enter the sum.

    Attributes:
        columns: Layer name to its column in the weights [G, L].
        pairs: What is stacked.
        dense: What changes a weight or bias as a whole.
        table: For each pair [3, pairs] its layer's number, its rank and its column in the weights.
        unit: For each pair alpha/rank.
    """

    columns: Mapping[str, int]
    pairs: Mapping[str, LowRank]
    dense: Mapping[str, Factors]
    table: Tensor
    unit: Tensor

    @classmethod
    def of(
        cls,
        layers: Iterable[str],
        pairs: Mapping[str, LowRank],
        dense: Mapping[str, Factors],
        numbers: Mapping[str, int],
    ) -> Loaded:
        """An adapter of these layers; ``numbers`` counts those of the model."""
        columns = {layer: column for column, layer in enumerate(layers)}
        ranks = [pair.rank for pair in pairs.values()]
        table = [numbers[layer] for layer in pairs], ranks, [columns[layer] for layer in pairs]
        unit = torch.tensor([pair.scale for pair in pairs.values()])
        return cls(columns, pairs, dense, torch.tensor(table, dtype=torch.long), unit)


@dataclass(frozen=True)
class Bank:
    """The gains of all stacked layers of one device and dtype: one flat tensor [G, width], the layers hold views.

    Attributes:
        layers: The layers, in the order of their gains.
        starts: Where each layer's gains begin.
        source: For each gain its place among the weights of all sounding adapters.
        unit: For each gain what the weight is multiplied by; zero where a layer has spare ranks.
        flat: The gains.
        sparse: Whether rows that take less than half of a linear layer's ranks skip the others. A compiled model must
            not: how many ranks are taken would become part of it.
    """

    layers: list[LoraLayer]
    starts: list[int]
    source: Tensor
    unit: Tensor
    flat: Tensor
    sparse: bool

    def fresh(self, rows: int) -> bool:
        """Whether the layers still look into ``flat``; moving the model gives them tensors of their own."""
        if self.flat.shape[0] != rows or place(self.layers[0]) != (self.flat.device, self.flat.dtype):
            return False
        origin, size = self.flat.data_ptr(), self.flat.element_size()
        views = zip((layer._buffers.get("lora_gain") for layer in self.layers), self.starts, strict=True)
        return all(view is not None and view.data_ptr() == origin + at * size for view, at in views)

    def write(self, weights: Tensor) -> None:
        """Sets the gains from the weights of all sounding adapters [G, ΣL]."""
        gains = weights[:, self.source] * self.unit
        self.flat.copy_(gains)
        if len(gains) > 1 and self.sparse:
            widths = [stop - start for start, stop in pairwise([*self.starts, gains.shape[1]])]
            known: dict[bytes, Tensor | None] = {}
            for layer, taken in zip(self.layers, (gains != 0).split(widths, 1), strict=True):
                put(layer, lora_rows=_taken(taken, self.flat.device, known))


def _taken(taken: Tensor, device: torch.device, known: dict[bytes, Tensor | None]) -> Tensor | None:
    """The places of the ranks that each row takes [G, S], from [G, R]; None where that saves nothing."""
    pattern = taken.numpy().tobytes()
    if pattern not in known:
        most = int(taken.sum(1).max())
        order = taken.to(torch.uint8).argsort(stable=True, dim=1, descending=True)
        known[pattern] = order[:, :most].to(device) if 0 < 2 * most <= taken.shape[1] else None
    return known[pattern]


def banks(
    layers: Mapping[int, LoraLayer], sounding: Sequence[Loaded], rows: int, before: Sequence[Bank], sparse: bool
) -> list[Bank]:
    """New banks, filled with zeros, one for each device and dtype; the layers look into them.

    Args:
        layers: Number to layer of all that have a stack.
        sounding: The adapters in the order in which they are stacked.
        rows: G.
        before: The present banks; the memory of one with the same places in the same layers is used again, so that
            nothing a compiled model holds has to move.
        sparse: Whether rows may skip ranks they do not take.
    """
    groups: dict[tuple[torch.device, torch.dtype], dict[int, LoraLayer]] = {}
    for number, layer in layers.items():
        groups.setdefault(place(layer), {})[number] = layer
    count = 1 + max(layers, default=0)
    return [_bank(group, at, count, sounding, rows, before, sparse) for at, group in groups.items()]


def _bank(
    numbered: Mapping[int, LoraLayer],
    at: tuple[torch.device, torch.dtype],
    count: int,
    sounding: Sequence[Loaded],
    rows: int,
    before: Sequence[Bank],
    sparse: bool,
) -> Bank:
    layers = list(numbered.values())
    widths = [layer.lora_width for layer in layers]
    *starts, end = accumulate(widths, initial=0)
    free = torch.full((count,), -(1 << 40))  # where the next rank of each layer goes; below zero: into another bank
    free[torch.tensor(list(numbered))] = torch.tensor(starts)
    tables, units, offset = [torch.zeros(3, 0, dtype=torch.long)], [torch.zeros(0)], 0
    for adapter in sounding:
        number, rank, column = adapter.table
        tables.append(torch.stack((free[number], rank, column + offset)))
        units.append(adapter.unit)
        free[number] += rank
        offset += len(adapter.columns)
    pairs = torch.cat(tables, 1)
    (begin, rank, column), scale = pairs[:, pairs[0] >= 0], torch.cat(units)[pairs[0] >= 0]
    places = (begin - rank.cumsum(0) + rank).repeat_interleave(rank)
    places += torch.arange(len(places))
    source, unit = torch.zeros(end, dtype=torch.long), torch.zeros(end)
    source[places], unit[places] = column.repeat_interleave(rank), scale.repeat_interleave(rank)
    for old in before:
        if (old.layers, old.starts, old.flat.shape[1]) == (layers, starts, end) and old.fresh(rows):
            return Bank(layers, starts, source, unit, old.flat.zero_(), sparse)
    flat = torch.zeros(rows, end, device=at[0], dtype=at[1])
    for layer, gain in zip(layers, flat.split(widths, 1), strict=True):
        put(layer, lora_gain=gain.view(1, -1) if rows == 1 else gain, lora_rows=None)  # strides alike for any total
    return Bank(layers, starts, source, unit, flat, sparse)
