"""The account of an adapter in numbers: where its change lies, in how many directions, what lower ranks would keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_vision.adapter import Adapter
from lora_vision.errors import AdapterError
from lora_vision.factors import Dora, Factors, Full, LowRank
from lora_vision.spectrum import spectrum
from lora_vision.tools import places


@dataclass(frozen=True)
class Layer:
    """One layer's change.

    Attributes:
        norm: Frobenius norm.
        relative: Norm over that of the base's weight, or None without a base.
        rms: Root mean square of the change's numbers.
        rank: The rank its file spends, or None where the word means nothing.
        effective_rank: Over how many directions its energy is spread.
        values: Its singular values, the largest first.
    """

    norm: float
    relative: float | None
    rms: float
    rank: int | None
    effective_rank: float
    values: tuple[float, ...]

    def energy(self, rank: int) -> float:
        """Share of the squared norm that the first directions hold."""
        total = math.fsum(value**2 for value in self.values)
        return math.fsum(value**2 for value in self.values[:rank]) / total if total else 1.0


@dataclass(frozen=True)
class Account:
    """All layers of an adapter.

    Attributes:
        layers: True name to what was found.
        skipped: Layers without an entry, and why: changes of biases or norms, and such as need a base.
    """

    layers: Mapping[str, Layer]
    skipped: Mapping[str, str]

    @property
    def measured(self) -> bool:
        """Whether changes are known relative to a base."""
        return all(layer.relative is not None for layer in self.layers.values()) and bool(self.layers)

    def share(self, of: Callable[[str], bool]) -> float:
        """The share of the whole squared norm that lies in the layers chosen by name."""
        whole = math.fsum(layer.norm**2 for layer in self.layers.values())
        return math.fsum(layer.norm**2 for name, layer in self.layers.items() if of(name)) / whole if whole else 0.0

    @property
    def text_share(self) -> float:
        """The share of the text encoders."""
        return self.share(lambda name: name.startswith("text_encoder"))

    @property
    def ranks(self) -> list[int]:
        """1, 2, 4 ... up to the largest rank."""
        largest = max((len(layer.values) for layer in self.layers.values()), default=1)
        return [2**power for power in range(int(math.log2(largest)) + 1)]

    def energy(self, rank: int) -> float:
        """The share of the whole squared norm that this rank in every layer would have kept."""
        whole = math.fsum(layer.norm**2 for layer in self.layers.values())
        kept = math.fsum(layer.norm**2 * layer.energy(rank) for layer in self.layers.values())
        return kept / whole if whole else 1.0

    def enough(self, share: float) -> int:
        """The smallest rank that keeps this share in all layers together."""
        largest = max((len(layer.values) for layer in self.layers.values()), default=1)
        return next((rank for rank in range(1, largest) if self.energy(rank) >= share), largest)

    def cells(self, of: Callable[[Layer], float]) -> dict[tuple[str, str], float]:
        """Block and kind of layer to the mean over its layers."""
        found: dict[tuple[str, str], list[float]] = {}
        for name, layer in self.layers.items():
            found.setdefault((places.block(name), places.kind(name)), []).append(of(layer))
        return {place: sum(values) / len(values) for place, values in found.items()}

    def size(self, layer: Layer) -> float:
        """What the heat map shows: percent of the base's weight, or a thousand times the change's rms."""
        return 100 * layer.relative if self.measured and layer.relative is not None else 1000 * layer.rms

    def curves(self) -> dict[str, list[tuple[float, float]]]:
        """Block to its mean singular values relative to the first, by their number."""
        found: dict[str, list[tuple[float, ...]]] = {}
        for name, layer in self.layers.items():
            if layer.norm:
                found.setdefault(places.block(name), []).append(layer.values)
        return {row: _mean_curve(found[row]) for row in places.blocks(self.layers) if row in found}

    def to_dict(self) -> dict[str, Any]:
        """All numbers as plain values, for JSON."""
        layers = {
            name: {
                "block": places.block(name),
                "kind": places.kind(name),
                "norm": layer.norm,
                "relative": layer.relative,
                "rms": layer.rms,
                "rank": layer.rank,
                "effective_rank": layer.effective_rank,
                "energy": {str(rank): layer.energy(rank) for rank in self.ranks if rank <= len(layer.values)},
                "values": list(layer.values),
            }
            for name, layer in self.layers.items()
        }
        shares = {row: self.share(lambda n, row=row: places.block(n) == row) for row in places.blocks(self.layers)}  # type: ignore[misc]
        return {
            "text_share": self.text_share,
            "energy": {str(rank): self.energy(rank) for rank in self.ranks},
            "rank_for_95": self.enough(0.95),
            "shares": shares,
            "layers": layers,
            "skipped": dict(self.skipped),
        }


def _mean_curve(values: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    longest = max(map(len, values))
    columns = [[each[at] / each[0] for each in values if at < len(each) and each[0]] for at in range(longest)]
    return [(float(at + 1), sum(column) / len(column)) for at, column in enumerate(columns) if column]


def account(adapter: Adapter, base: Mapping[str, Tensor] | None = None) -> Account:
    """The account of an adapter.

    Args:
        adapter: The adapter.
        base: True layer name to untouched weight: sizes are then told relative to it, and changes that multiply it
            (DoRA, IA3) can be counted.

    Raises:
        AdapterError: A change does not fit the base, or there is none.
    """
    adapter.check_layers()
    layers: dict[str, Layer] = {}
    skipped: dict[str, str] = {}
    with torch.no_grad():
        for name, factors in adapter.layers.items():
            weight = None if base is None else base.get(name)
            if base is not None and weight is None:
                raise AdapterError(f"layer {name} is not in the base; it was made for another")
            if reason := _reason(factors, weight):
                skipped[name] = reason
            else:
                layers[name] = _layer(factors, weight)
    return Account(layers, skipped)


def _reason(factors: Factors, weight: Tensor | None) -> str:
    """Why a change cannot be counted, or nothing."""
    if factors.needs_base and weight is None:
        return f"{type(factors).__name__} multiplies the base's weight: name the base"
    if isinstance(factors, Full) and (factors.diff is None or factors.diff.dim() < 2):
        return "a bias or a norm"
    return ""


def _layer(factors: Factors, weight: Tensor | None) -> Layer:
    found = spectrum(factors, None if weight is None else weight.detach().cpu())
    inner = factors.inner if isinstance(factors, Dora) else factors
    relative = None if weight is None else found.norm / max(float(weight.float().norm()), 1e-12)
    count = found.left.shape[0] * found.right.shape[1]
    values = tuple(found.values[: max(1, found.rank)].tolist())
    rank = inner.rank if isinstance(inner, LowRank) else factors.rank
    return Layer(found.norm, relative, found.norm / count**0.5, rank, found.effective_rank, values)
