"""What one layer's change is: LowRank, Hadamard, Kronecker, Dora, IA3, Full; each with ``.delta()``.

Shapes: O/I output/input features, R rank, K kernel. Embeddings count as [O, I] = [vocabulary, width].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lora_vision.errors import AdapterError


@dataclass(frozen=True, eq=False, kw_only=True)
class Factors:
    """The change of one layer's weight and, rarely, of its bias.

    Attributes:
        bias: Added to the layer's bias [O], alpha included; None for nearly every adapter.
    """

    needs_base: ClassVar[bool] = False
    bias: Tensor | None = None

    @property
    def rank(self) -> int | None:
        """The rank the file speaks of, or None where the word means nothing."""
        return None

    def delta(self, base: Tensor | None = None) -> Tensor:
        """The added weight in float32, alpha included, in the weight's shape [O, I] or [O, I, K, K].

        Args:
            base: The untouched weight. Dora and IA3 need it; the others take its shape from it, which matters only
                where a file flattens the kernel.

        Raises:
            AdapterError: The change cannot be computed without the base, or does not fit it.
        """
        if base is None and self.needs_base:
            raise AdapterError(f"{type(self).__name__} multiplies the base weight: call delta(base) with that weight")
        if base is not None and not self.fits(base.shape):
            raise AdapterError(f"{type(self).__name__} of size {self.size} does not fit a weight {tuple(base.shape)}")
        change = self._delta(base)
        return change if base is None else change.reshape(base.shape)

    def bias_delta(self, base_bias: Tensor | None = None) -> Tensor | None:
        """The added bias [O] in float32, or None when the bias stays."""
        return None if self.bias is None else self.bias.float()

    def low_rank(self) -> "LowRank | None":
        """The same weight change as one pair of matrices, exactly, or None where it is not usefully low-rank."""
        return None

    @property
    def size(self) -> tuple[int, int] | None:
        """The weight's size [O, I·K·K], or None where the factors alone do not tell."""
        raise NotImplementedError

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether this change can be added to a weight of that shape."""
        fits_bias = self.bias is None or self.bias.numel() == shape[0]
        return fits_bias and self.size in (None, (shape[0], math.prod(shape[1:])))

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by field name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def _delta(self, base: Tensor | None) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class LowRank(Factors):
    """LoRA (Hu et al. 2021, eq. 3): ``delta = alpha/rank · up @ down``; LoCon for convolutions.

    Attributes:
        down: [R, I], or [R, I, K, K]; beside ``mid`` [R, I, 1, 1].
        up: [O, R] or [O, R, 1, 1].
        alpha: Strength; the change is scaled by ``alpha / rank``.
        mid: The kernel of a Tucker convolution [R, R, K, K] (LyCORIS ``lora_mid``), or None.
    """

    down: Tensor
    up: Tensor
    alpha: float
    mid: Tensor | None = None

    def __post_init__(self) -> None:
        rank = self.down.shape[0] if self.down.dim() in (2, 4) else 0
        fits = self.up.dim() in (2, 4) and self.up.shape[1] == rank and self.up.numel() == len(self.up) * rank
        if rank < 1 or not fits:
            raise AdapterError(
                f"LowRank with down {tuple(self.down.shape)} and up {tuple(self.up.shape)}; "
                "expected [R, I] or [R, I, K, K] and [O, R] or [O, R, 1, 1]"
            )
        if self.mid is not None and (
            self.mid.dim() != 4 or self.mid.shape[:2] != (rank, rank) or self.down[0, 0].numel() != 1
        ):
            raise AdapterError(
                f"LowRank with mid {tuple(self.mid.shape)} and down {tuple(self.down.shape)}; "
                "expected [R, R, K, K] and [R, I, 1, 1]"
            )

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    @property
    def size(self) -> tuple[int, int]:
        kernel = 1 if self.mid is None else self.mid[0, 0].numel()
        return self.up.shape[0], self.down[0].numel() * kernel

    def fits(self, shape: Sequence[int]) -> bool:
        if self.bias is None and self.mid is None and len(shape) == self.down.dim() == 2:
            return shape[0] == self.up.shape[0] and shape[1] == self.down.shape[1]
        kernel = self.down.shape[2:] if self.mid is None else self.mid.shape[2:]
        same_kernel = len(shape) != 4 or not kernel or tuple(kernel) == tuple(shape[2:])
        return same_kernel and super().fits(shape)

    def low_rank(self) -> "LowRank":
        if self.mid is None:
            return self
        down = torch.einsum("mnkl,ni->mikl", self.mid.float(), self.down.float().flatten(1))
        return LowRank(down, self.up, self.alpha, bias=self.bias)

    def _delta(self, base: Tensor | None) -> Tensor:
        pair = self.low_rank()
        change = pair.up.float().flatten(1) @ pair.down.float().flatten(1)
        return (change * self.scale).reshape(-1, *pair.down.shape[1:])


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """[O, I, K, K] from a core [R, R, K, K] and two sides [R, O], [R, I] (LyCORIS ``rebuild_tucker``)."""
    return torch.einsum("ijkl,ip,jr->prkl", core.float(), a.float(), b.float())


@dataclass(frozen=True, eq=False)
class Hadamard(Factors):
    """LoHa (Hyeon-Woo et al. 2022, FedPara; LyCORIS): ``delta = alpha/rank · (w1_a @ w1_b) ⊙ (w2_a @ w2_b)``.

    Attributes:
        w1_a, w2_a: [O, R]; with Tucker cores [R, O].
        w1_b, w2_b: [R, I], convolutions flattened to [R, I·K·K]; with Tucker cores [R, I].
        t1, t2: Tucker cores [R, R, K, K], both or neither.
        shape: The weight's shape if the reader knows it; without it a flattened kernel stays flat in ``delta()``.
    """

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    alpha: float
    t1: Tensor | None = None
    t2: Tensor | None = None
    shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        halves = ((self.w1_a, self.w1_b, self.t1), (self.w2_a, self.w2_b, self.t2))
        flat = all(a.dim() == b.dim() == 2 and min(b.shape) > 0 for a, b, _ in halves)
        joined = flat and all(_joins(a, b, t) for a, b, t in halves) and (self.t1 is None) == (self.t2 is None)
        if not joined or len({_half_shape(a, b, t) for a, b, t in halves}) != 1:
            raise AdapterError(
                f"LoHa with {_shapes(self)}; expected a [O, R], b [R, I] (with t [R, R, K, K]: a [R, O])"
            )
        if self.shape is not None and not self.fits(self.shape):
            raise AdapterError(f"LoHa of size {self.size} does not fit a weight {self.shape}")

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    @property
    def size(self) -> tuple[int, int]:
        shape = _half_shape(self.w1_a, self.w1_b, self.t1)
        return shape[0], math.prod(shape[1:])

    def low_rank(self) -> LowRank | None:
        """The pair of rank R² whose product it is (Khatri-Rao); None when that is no smaller than the weight."""
        rank = self.w1_b.shape[0] * self.w2_b.shape[0]
        if self.t1 is not None or 2 * rank > min(self.size):
            return None
        up = torch.einsum("or,os->ors", self.w1_a.float(), self.w2_a.float()).flatten(1)
        down = torch.einsum("ri,si->rsi", self.w1_b.float(), self.w2_b.float()).flatten(0, 1)
        down = down if self.shape is None else down.reshape(rank, *self.shape[1:])
        return LowRank(down, up, self.scale * rank, bias=self.bias)

    def _delta(self, base: Tensor | None) -> Tensor:
        if self.t1 is None or self.t2 is None:
            change = (self.w1_a.float() @ self.w1_b.float()) * (self.w2_a.float() @ self.w2_b.float())
        else:
            change = _tucker(self.t1, self.w1_a, self.w1_b) * _tucker(self.t2, self.w2_a, self.w2_b)
        change = change * self.scale
        return change if self.shape is None else change.reshape(self.shape)


@dataclass(frozen=True, eq=False, kw_only=True)
class Kronecker(Factors):
    """LoKr (Edalati et al. 2022, KronA; LyCORIS): ``delta = alpha/rank · kron(w1, w2)``; 1 when both are full.

    Attributes:
        w1: The first factor [O1, I1], or None when given as ``w1_a`` [O1, R] and ``w1_b`` [R, I1].
        w2: The second [O2, I2] or [O2, I2, K, K], or None when given as ``w2_a`` [O2, R] and ``w2_b`` [R, I2·K·K],
            or as a Tucker core ``t2`` [R, R, K, K] with ``w2_a`` [R, O2] and ``w2_b`` [R, I2].
        shape: The weight's shape if the reader knows it (O = O1·O2, I = I1·I2).
    """

    alpha: float
    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    t2: Tensor | None = None
    shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        first = _is_factor(self.w1, self.w1_a, self.w1_b, None) and (self.w1 is None or self.w1.dim() == 2)
        if not first or not _is_factor(self.w2, self.w2_a, self.w2_b, self.t2):
            raise AdapterError(
                f"LoKr with {_shapes(self)}; expected w1 [O1, I1] or w1_a [O1, R] with w1_b [R, I1], and "
                "w2 [O2, I2(, K, K)] or w2_a [O2, R] with w2_b [R, I2] (with t2 [R, R, K, K]: w2_a [R, O2])"
            )
        if self.shape is not None and not self.fits(self.shape):
            raise AdapterError(f"LoKr of size {self.size} does not fit a weight {self.shape}")

    @property
    def rank(self) -> int | None:
        split = self.w2_b if self.w2_b is not None else self.w1_b
        return None if split is None else split.shape[0]

    @property
    def scale(self) -> float:
        """alpha / rank, or 1 when both factors are full, whatever alpha says."""
        return 1.0 if self.rank is None else self.alpha / self.rank

    @property
    def size(self) -> tuple[int, int]:
        first, second = (
            _factor_shape(self.w1, self.w1_a, self.w1_b, None),
            _factor_shape(self.w2, self.w2_a, self.w2_b, self.t2),
        )
        return first[0] * second[0], math.prod(first[1:]) * math.prod(second[1:])

    def _delta(self, base: Tensor | None) -> Tensor:
        first = _factor(self.w1, self.w1_a, self.w1_b, None)
        second = _factor(self.w2, self.w2_a, self.w2_b, self.t2)
        change = torch.kron(first.reshape(*first.shape, *(1,) * (second.dim() - 2)), second.contiguous()) * self.scale
        return change if self.shape is None else change.reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Dora(Factors):
    """DoRA (Liu et al. 2024, eq. 5): ``W' = magnitude · V / ‖V‖`` with ``V = W + inner``; ``delta = W' - W``.

    A scale c adds ``c · (W' - W)``, so that zero is the base (ComfyUI's meaning; PEFT and LyCORIS differ).

    Attributes:
        inner: The direction's change.
        magnitude: The lengths [O] (axis 0) or [I] (axis 1), in any shape with one long dimension.
        axis: 0 when each output row has a length (PEFT, LyCORIS now), 1 when each input column has (LyCORIS before).
    """

    needs_base: ClassVar[bool] = True
    inner: Factors
    magnitude: Tensor
    axis: int = 0

    def __post_init__(self) -> None:
        if self.axis not in (0, 1) or self.magnitude.numel() not in (max(self.magnitude.shape, default=1), 1):
            raise AdapterError(
                f"DoRA with magnitude {tuple(self.magnitude.shape)}, axis {self.axis}; "
                "expected [O] with axis 0 or [I] with axis 1"
            )

    @property
    def rank(self) -> int | None:
        return self.inner.rank

    @property
    def size(self) -> tuple[int, int] | None:
        return self.inner.size

    def fits(self, shape: Sequence[int]) -> bool:
        return (
            len(shape) > 1
            and self.magnitude.numel() == shape[self.axis]
            and self.inner.fits(shape)
            and super().fits(shape)
        )

    def bias_delta(self, base_bias: Tensor | None = None) -> Tensor | None:
        return self.inner.bias_delta(base_bias) if self.bias is None else self.bias.float()

    def tensors(self) -> dict[str, Tensor]:
        return {**{f"inner.{name}": value for name, value in self.inner.tensors().items()}, **super().tensors()}

    def _delta(self, base: Tensor | None) -> Tensor:
        assert base is not None  # delta() has checked
        weight = base.float()
        moved = weight + self.inner.delta(base).to(weight.device)
        length = moved.transpose(0, self.axis).flatten(1).norm(dim=1) + torch.finfo(torch.float32).eps
        along = [1] * weight.dim()
        along[self.axis] = -1
        scaled: Tensor = moved * (self.magnitude.flatten().to(weight) / length).view(along)
        return scaled - weight


@dataclass(frozen=True, eq=False)
class IA3(Factors):
    """(IA)³ (Liu et al. 2022): ``delta = W · vector``, rows or columns; PEFT stores ``1 + vector``.

    Attributes:
        vector: What is added to the factor 1: [O], or [I] when ``on_input``.
        on_input: Whether it multiplies the input's features (columns) instead of the output's (rows).
        with_bias: Whether an output-side vector multiplies the layer's bias too (PEFT does, LyCORIS does not).
    """

    needs_base: ClassVar[bool] = True
    vector: Tensor
    on_input: bool = False
    with_bias: bool = False

    @property
    def size(self) -> None:
        return None

    def fits(self, shape: Sequence[int]) -> bool:
        return len(shape) > 1 and self.vector.numel() == shape[1 if self.on_input else 0] and super().fits(shape)

    def bias_delta(self, base_bias: Tensor | None = None) -> Tensor | None:
        if self.bias is not None or base_bias is None or self.on_input or not self.with_bias:
            return super().bias_delta()
        return base_bias.float() * self.vector.flatten().to(base_bias.device, torch.float32)

    def _delta(self, base: Tensor | None) -> Tensor:
        assert base is not None  # delta() has checked
        along = [1] * base.dim()
        along[1 if self.on_input else 0] = -1
        return base.float() * self.vector.to(base.device, torch.float32).view(along)


@dataclass(frozen=True, eq=False)
class Full(Factors):
    """A change stored whole (LyCORIS ``diff``/``diff_b``, ``w_norm``/``b_norm``).

    Attributes:
        diff: Added to the weight, in its shape; None when only the bias changes.
    """

    diff: Tensor | None = None

    def __post_init__(self) -> None:
        if self.diff is None and self.bias is None:
            raise AdapterError("Full with neither diff nor bias; expected at least one of them")

    @property
    def size(self) -> tuple[int, int] | None:
        return None if self.diff is None else (self.diff.shape[0], math.prod(self.diff.shape[1:]))

    def _delta(self, base: Tensor | None) -> Tensor:
        if self.diff is not None:
            return self.diff.float()
        if base is None:
            raise AdapterError("this change moves only the bias: call delta(base) for a zero of the weight's shape")
        return torch.zeros_like(base, dtype=torch.float32)


def _shapes(factors: Factors) -> str:
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in factors.tensors().items())


def _joins(a: Tensor, b: Tensor, core: Tensor | None) -> bool:
    """Whether a pair, or a Tucker triple, can be multiplied."""
    if core is None:
        return a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0] > 0
    return core.dim() == 4 and a.dim() == b.dim() == 2 and core.shape[:2] == (a.shape[0], b.shape[0]) and a.shape[0] > 0


def _half_shape(a: Tensor, b: Tensor, core: Tensor | None) -> tuple[int, ...]:
    return (a.shape[0], b.shape[1]) if core is None else (a.shape[1], b.shape[1], *core.shape[2:])


def _is_factor(whole: Tensor | None, a: Tensor | None, b: Tensor | None, core: Tensor | None) -> bool:
    if whole is not None:
        return whole.dim() in (2, 4) and whole.numel() > 0 and a is None and b is None and core is None
    return a is not None and b is not None and _joins(a, b, core)


def _factor(whole: Tensor | None, a: Tensor | None, b: Tensor | None, core: Tensor | None) -> Tensor:
    if whole is not None:
        return whole.float()
    assert a is not None and b is not None  # __post_init__ has checked
    return a.float() @ b.float() if core is None else _tucker(core, a, b)


def _factor_shape(whole: Tensor | None, a: Tensor | None, b: Tensor | None, core: Tensor | None) -> tuple[int, ...]:
    if whole is not None:
        return tuple(whole.shape)
    assert a is not None and b is not None  # __post_init__ has checked
    return _half_shape(a, b, core)
