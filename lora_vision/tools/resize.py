"""resize: an adapter with ranks of another size, chosen layer by layer from the singular values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_vision import formats
from lora_vision.adapter import Adapter
from lora_vision.errors import AdapterError
from lora_vision.factors import Dora, Factors, LowRank
from lora_vision.formats import container
from lora_vision.spectrum import Spectrum, spectrum


def sv_ratio(values: Tensor, target: float) -> int:
    """How many singular values are above the largest divided by the target (kohya ``sv_ratio``)."""
    return int((values > values[0] / target).sum())


def sv_cumulative(values: Tensor, target: float) -> int:
    """How many singular values sum up to this share of their sum (kohya ``sv_cumulative``)."""
    return _until(values.double(), target)


def sv_fro(values: Tensor, target: float) -> int:
    """How many singular values keep this share of the Frobenius norm (kohya ``sv_fro``)."""
    return _until(values.double().square(), target**2)


def _until(parts: Tensor, share: float) -> int:
    reached = parts.cumsum(0) / parts.sum().clamp_min(1e-300)
    return int((reached < share * (1 - 1e-9)).sum()) + 1


METHODS: Mapping[str, Callable[[Tensor, float], int]] = {
    "sv_ratio": sv_ratio,
    "sv_cumulative": sv_cumulative,
    "sv_fro": sv_fro,
}
"""The dynamic methods, as kohya's ``resize_lora.py`` names them; its parameter is the target here."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the result may be. ``rank`` caps the others; energy, size and a dynamic method exclude each other.

    Attributes:
        rank: Largest rank of a layer.
        energy: Share of each layer's squared Frobenius norm that is kept at least, in (0, 1].
        size: Bytes of the file; ranks are spent where they keep most.
        dynamic_method: One of METHODS.
        dynamic_param: Its target.
        dtype: Type of the stored numbers (None: as they were).
        format: The file format that ``size`` is counted in.
    """

    rank: int | None = None
    energy: float | None = None
    size: int | None = None
    dynamic_method: str | None = None
    dynamic_param: float | None = None
    dtype: torch.dtype | None = None
    format: str = "kohya"

    def __post_init__(self) -> None:
        ways = [name for name in ("energy", "size", "dynamic_method") if getattr(self, name) is not None]
        if len(ways) > 1 or (not ways and self.rank is None):
            raise AdapterError(f"{' and '.join(ways) or 'nothing'} given; expected one of rank, energy, size, a method")
        if self.rank is not None and self.rank < 1:
            raise AdapterError(f"rank {self.rank}; expected at least 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise AdapterError(f"energy {self.energy}; expected a share above 0, at most 1")
        if self.dynamic_method is None:
            return
        if self.dynamic_method not in METHODS:
            raise AdapterError(f"method {self.dynamic_method!r}; expected one of {', '.join(METHODS)}")
        least, most = (1, math.inf) if self.dynamic_method == "sv_ratio" else (0, 1)
        if self.dynamic_param is None or not least < self.dynamic_param <= most:
            wanted = "a ratio above 1" if self.dynamic_method == "sv_ratio" else "a share above 0, at most 1"
            raise AdapterError(f"{self.dynamic_method} with {self.dynamic_param}; expected {wanted}")


@dataclass(frozen=True, eq=False)
class Resized:
    """An adapter of another size.

    Attributes:
        adapter: The result.
        ranks: Layer name to (rank before, rank after), of every layer that has one.
        errors: Layer name to the relative Frobenius error: the norm of the discarded singular values over all.
    """

    adapter: Adapter
    ranks: Mapping[str, tuple[int, int]]
    errors: Mapping[str, float]

    @property
    def error(self) -> float:
        """The mean relative error over layers."""
        return sum(self.errors.values()) / max(1, len(self.errors))

    def to_dict(self) -> dict[str, Any]:
        """Ranks and errors as plain values, for JSON."""
        layers = {name: {"from": a, "to": b, "error": self.errors[name]} for name, (a, b) in self.ranks.items()}
        return {"error": self.error, "layers": layers}

    def __str__(self) -> str:
        width = max(map(len, self.ranks), default=0)
        rows = [f"{n:{width}}  rank {a:3} -> {b:3}  error {self.errors[n]:.4f}" for n, (a, b) in self.ranks.items()]
        count = max(1, len(self.ranks))
        old, new = (sum(pair[side] for pair in self.ranks.values()) / count for side in (0, 1))
        kept = len(self.adapter.layers) - len(self.ranks)
        rest = f"; {kept} layers that are no pairs stayed as they were" if kept else ""
        return "\n".join([*rows, f"mean rank {old:.1f} -> {new:.1f}, mean error {self.error:.4f}{rest}"])


def resize(adapter: Adapter, size: Size) -> Resized:
    """The adapter with each layer cut to what the size allows, and what that costs.

    A layer whose rank stays is kept bit for bit. LoHa and LoKr layers become pairs; of DoRA layers the direction is
    cut and the magnitude kept; biases, norms and (IA)³ stay as they are.

    Raises:
        AdapterError: The size cannot be reached, the change of a layer is not finite, or there is no layer.
    """
    adapter.check_layers()
    spectra: dict[str, Spectrum] = {}
    with torch.no_grad():
        for name, factors in adapter.layers.items():
            if (inner := _matrix(factors)) is not None:
                try:
                    spectra[name] = spectrum(inner)
                except AdapterError as error:
                    raise AdapterError(f"layer {name}: {error}") from error
        ranks = _ranks(adapter, spectra, size)
        layers = {name: _cut(f, spectra.get(name), ranks.get(name), size.dtype) for name, f in adapter.layers.items()}
    before = {name: _rank(adapter.layers[name], found) for name, found in spectra.items()}
    after = {name: (rank, min(rank, ranks[name])) for name, rank in before.items()}
    errors = {name: 0.0 if ranks[name] >= before[name] else found.lost(ranks[name]) for name, found in spectra.items()}
    return Resized(replace(adapter, layers=layers), after, errors)


def _matrix(factors: Factors) -> Factors | None:
    """The part of a layer's change that has singular values without the base, or None."""
    inner = factors.inner if isinstance(factors, Dora) else factors
    size = inner.size
    return None if inner.needs_base or size is None or size[1] == 1 else inner


def _rank(factors: Factors, found: Spectrum) -> int:
    """The rank that the file spends on a layer."""
    inner = factors.inner if isinstance(factors, Dora) else factors
    return inner.rank if isinstance(inner, LowRank) else len(found.values)


def _cut(factors: Factors, found: Spectrum | None, rank: int | None, dtype: torch.dtype | None) -> Factors:
    """The layer's change at that rank; untouched where nothing is cut and the type stays."""
    inner = factors.inner if isinstance(factors, Dora) else factors
    if found is None or rank is None:
        return factors
    if isinstance(inner, LowRank) and rank >= inner.rank:
        kept: dict[str, Any] = {k: t.to(dtype or t.dtype) for k, t in inner.tensors().items() if k != "bias"}
        cut = replace(inner, **kept)
    else:
        stored = next(iter(inner.tensors().values())).dtype
        cut = found.pair(rank, dtype or stored, inner.bias)
    return replace(factors, inner=cut) if isinstance(factors, Dora) else cut


def _ranks(adapter: Adapter, spectra: Mapping[str, Spectrum], size: Size) -> dict[str, int]:
    """The rank of each layer, at least 1."""
    most = {name: min(size.rank or 10**9, _rank(adapter.layers[name], found)) for name, found in spectra.items()}
    if size.size is not None:
        return _spend(adapter, spectra, most, size)
    if size.energy is not None:
        wanted = {name: sv_fro(found.values, math.sqrt(size.energy)) for name, found in spectra.items()}
    elif size.dynamic_method is not None and size.dynamic_param is not None:
        method = METHODS[size.dynamic_method]
        wanted = {name: method(found.values, size.dynamic_param) for name, found in spectra.items()}
    else:
        wanted = most
    return {name: max(1, min(rank, most[name])) for name, rank in wanted.items()}


def _spend(adapter: Adapter, spectra: Mapping[str, Spectrum], most: Mapping[str, int], size: Size) -> dict[str, int]:
    """Ranks that keep most energy in that many bytes: singular values are bought by energy per byte, in order."""
    assert size.size is not None
    cost: dict[str, int] = {}
    offers: list[tuple[float, str]] = []
    for name, found in spectra.items():
        dtype = size.dtype or next(iter(adapter.layers[name].tensors().values())).dtype
        cost[name] = (len(found.left) + found.right.shape[1]) * dtype.itemsize
        offers += [(float(value) ** 2 / cost[name], name) for value in found.values[1 : most[name]]]
    ranks = dict.fromkeys(spectra, 1)
    smallest = {n: _cut(f, spectra.get(n), ranks.get(n), size.dtype) for n, f in adapter.layers.items()}
    header, pieces = container.serialise(*formats.CODECS[size.format].write(replace(adapter, layers=smallest)))
    least = len(header) + sum(len(piece) for piece in pieces)
    left = size.size - least - 8 * len(ranks)  # offsets in the header grow by a few digits
    if left < 0:
        raise AdapterError(f"{size.size / 1e3:.3g} kB is too small: rank 1 everywhere takes {least / 1e3:.3g} kB")
    for _, name in sorted(offers, key=lambda offer: -offer[0]):
        if cost[name] <= left:
            left -= cost[name]
            ranks[name] += 1
    return ranks


def parse_size(text: str) -> int:
    """Bytes meant by ``5MB``, ``800 kB`` or ``1.5 GB`` (powers of ten, MiB of two), or by a plain number.

    Raises:
        AdapterError: It is no size.
    """
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    number = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = text.strip()[len(number) :].strip().lower()
    try:
        found = float(number) * units[unit]
    except (ValueError, KeyError):
        found = 0.0
    if not 0 < found < math.inf:
        raise AdapterError(f"{text!r} is no size; expected one such as 5MB, 800kB or 4MiB")
    return int(found)
