"""compare: how two adapters agree, layer by layer, how much they will fight, and weights that would balance them.

Shapes: R, S ranks of the two changes. Everything is computed from the thin sides of both changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lora_vision.adapter import Adapter
from lora_vision.errors import AdapterError
from lora_vision.factors import Factors
from lora_vision.spectrum import Spectrum, spectrum
from lora_vision.tools import places, plots


@dataclass(frozen=True)
class Meeting:
    """What two changes of one layer do to each other.

    Attributes:
        cosine: Of the two changes as vectors: 1 the same, 0 unrelated, -1 opposite.
        writes: Overlap of the features they write to, in [0, 1]: the RV coefficient of their output covariances for
            white input (Escoufier 1973), so that strong directions count more.
        reads: The same for the features they read.
        angle_out: Smallest principal angle of their output spaces, in degrees (Björck and Golub 1973).
        angle_in: The same for their input spaces.
        size_a: Frobenius norm of the first change.
        size_b: Of the second.
    """

    cosine: float
    writes: float
    reads: float
    angle_out: float
    angle_in: float
    size_a: float
    size_b: float

    @property
    def fight(self) -> float:
        """How much they want different things of the same features: ``writes · (1 - cosine)``, in [0, 2]."""
        return self.writes * max(0.0, 1 - self.cosine)


@dataclass(frozen=True)
class Comparison:
    """Two adapters beside each other.

    Attributes:
        layers: Name to meeting, of the layers both change.
        only_a: How many layers only the first changes.
        only_b: Only the second.
        size_a: Norm of the whole first adapter (its layers that can be compared).
        size_b: Of the second.
        lost: For each the share of pictures drawn with both that do not have its look, or None where that cannot be
            told (see clash.py); None where no base was asked.
    """

    layers: Mapping[str, Meeting]
    only_a: int
    only_b: int
    size_a: float
    size_b: float
    lost: tuple[float | None, float | None] | None = None

    def _mean(self, of: Callable[[Meeting], float]) -> float:
        """A mean over layers, each counted by how much both change it; layers of one adapter count as zero."""
        whole = self.size_a * self.size_b
        return sum(of(m) * m.size_a * m.size_b for m in self.layers.values()) / whole if whole else 0.0

    @property
    def fight(self) -> float:
        """The one number: 0 they do not meet, 1 they write unrelated things to the same features, 2 they cancel."""
        return self._mean(lambda meeting: meeting.fight)

    @property
    def cosine(self) -> float:
        """Of the two adapters as one long vector each."""
        return self._mean(lambda meeting: meeting.cosine)

    @property
    def balance(self) -> tuple[float, float]:
        """Weights at which both adapters are equally large, the smaller one at 1."""
        least = min(self.size_a, self.size_b)
        return least / (self.size_a or 1.0), least / (self.size_b or 1.0)

    def worst(self, count: int = 8) -> list[str]:
        """The layers that add most to the fight, the worst first."""
        gain = {name: m.fight * m.size_a * m.size_b for name, m in self.layers.items()}
        return sorted(gain, key=lambda name: -gain[name])[:count]

    def to_dict(self) -> dict[str, Any]:
        """All numbers as plain values, for JSON."""
        return {
            "fight": self.fight,
            "lost": None if self.lost is None else list(self.lost),
            "cosine": self.cosine,
            "sizes": [self.size_a, self.size_b],
            "balance": list(self.balance),
            "only": [self.only_a, self.only_b],
            "worst": self.worst(),
            "layers": {name: {**asdict(m), "fight": m.fight} for name, m in self.layers.items()},
        }

    def __str__(self) -> str:
        lost = [] if self.lost is None else [_survival(*self.lost)]
        if not self.layers:
            alone = f"no layer in common ({self.only_a} and {self.only_b} of their own): their weights do not meet"
            return "\n".join([alone, *lost])
        weights = self.balance
        lines = [
            f"fight {self.fight:.3f} (0: they do not meet, 1: other things to the same features, 2: they cancel)",
            f"cosine {self.cosine:+.3f}, sizes {self.size_a:.3g} and {self.size_b:.3g}: "
            f"equally large at weights {weights[0]:.2f} and {weights[1]:.2f}",
            *lost,
            f"{len(self.layers)} layers in common, {self.only_a} and {self.only_b} of their own; worst:",
        ]
        for name in self.worst():
            m = self.layers[name]
            lines.append(
                f"  {name}: fight {m.fight:.2f}, cosine {m.cosine:+.2f}, writes {m.writes:.2f}, reads {m.reads:.2f}, "
                f"angles {m.angle_out:.0f}° out {m.angle_in:.0f}° in, sizes {m.size_a:.2g} and {m.size_b:.2g}"
            )
        return "\n".join(lines)

    def picture(self, names: Sequence[str] = ("first", "second")) -> Image.Image:
        """Fight and cosine by block and kind of layer, and both sizes by block."""
        rows, columns = places.blocks(self.layers), places.kinds(self.layers)
        title = f"{names[0]} and {names[1]}: fight {self.fight:.2f}"
        fight = plots.heat_map(self._cells(lambda m: m.fight), rows, columns, title, most=1.0)
        about = "cosine of the two changes"
        cosine = plots.heat_map(self._cells(lambda m: m.cosine), rows, columns, about, signed=True, most=1.0)
        sizes = {row: self._sizes(row) for row in rows}
        return plots.stacked([fight, cosine, plots.bars(sizes, names, "norm of the change")])

    def _cells(self, of: Callable[[Meeting], float]) -> dict[tuple[str, str], float]:
        """Block and kind to the mean over their layers, counted by size."""
        sums: dict[tuple[str, str], list[float]] = {}
        for name, meeting in self.layers.items():
            cell = sums.setdefault((places.block(name), places.kind(name)), [0.0, 1e-30])
            weight = meeting.size_a * meeting.size_b
            cell[0] += of(meeting) * weight
            cell[1] += weight
        return {place: total / weight for place, (total, weight) in sums.items()}

    def _sizes(self, row: str) -> list[float]:
        members = [m for name, m in self.layers.items() if places.block(name) == row]
        return [math.hypot(*(m.size_a for m in members)), math.hypot(*(m.size_b for m in members))]


def compare(a: Adapter, b: Adapter, base: Mapping[str, Tensor] | None = None) -> Comparison:
    """The two adapters beside each other; changes of biases and norms are not compared.

    Args:
        a: One adapter.
        b: The other.
        base: True layer name to untouched weight, for changes that multiply it (DoRA, IA3).

    Raises:
        AdapterError: A change needs the base, or the two are for models of other shapes.
    """
    with torch.no_grad():
        spectra = [_spectra(adapter, base or {}) for adapter in (a, b)]
        both = [name for name in spectra[0] if name in spectra[1]]
        layers = {name: _meet(name, spectra[0][name], spectra[1][name]) for name in both}
    sizes = [math.hypot(*(found.norm for found in side.values())) for side in spectra]
    return Comparison(layers, len(spectra[0]) - len(both), len(spectra[1]) - len(both), sizes[0], sizes[1])


def _survival(first: float | None, second: float | None) -> str:
    """What is said of the looks that are lost."""
    shares = {"the first's": first, "the second's": second}
    told = [
        f"{whose} look cannot be told from the others'" if share is None else f"{share:.0%} have lost {whose} look"
        for whose, share in shares.items()
    ]
    return f"of pictures drawn with both at 1, {', '.join(told)} (a picture has one look)"


def _spectra(adapter: Adapter, base: Mapping[str, Tensor]) -> dict[str, Spectrum]:
    found: dict[str, Spectrum] = {}
    for name, factors in adapter.layers.items():
        try:
            if _is_matrix(factors):
                found[name] = spectrum(factors, base.get(name))
        except AdapterError as error:
            raise AdapterError(f"layer {name}: {error}") from error
    return found


def _is_matrix(factors: Factors) -> bool:
    """Whether a change is more than a bias or a norm."""
    return factors.needs_base or (factors.size is not None and factors.size[1] > 1)


def _meet(name: str, a: Spectrum, b: Spectrum) -> Meeting:
    if a.left.shape[0] != b.left.shape[0] or a.right.shape[1] != b.right.shape[1]:
        sizes = [(s.left.shape[0], s.right.shape[1]) for s in (a, b)]
        raise AdapterError(f"layer {name} is {sizes[0]} in one and {sizes[1]} in the other: made for different bases")
    r, s = a.rank, b.rank
    if not r or not s:
        return Meeting(0.0, 0.0, 0.0, 90.0, 90.0, a.norm, b.norm)
    out, inp = a.left[:, :r].t() @ b.left[:, :s], a.right[:r] @ b.right[:s].t()
    one, other = a.values[:r], b.values[:s]
    cosine = float((out * inp * torch.outer(one, other)).sum()) / (a.norm * b.norm)
    return Meeting(
        cosine, _overlap(out, one, other), _overlap(inp, one, other), _angle(out), _angle(inp), a.norm, b.norm
    )


def _overlap(between: Tensor, one: Tensor, other: Tensor) -> float:
    """RV coefficient of two covariances with these axes' cosines [R, S] and singular values [R], [S]."""
    shared = float((between.square() * torch.outer(one.square(), other.square())).sum())
    return shared / math.sqrt(float(one.pow(4).sum()) * float(other.pow(4).sum()))


def _angle(between: Tensor) -> float:
    """The smallest principal angle in degrees of two spaces, from the cosines of their axes [R, S]."""
    return math.degrees(math.acos(min(1.0, float(torch.linalg.svdvals(between)[0]))))
