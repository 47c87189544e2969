"""The singular values of one layer's change, found on its thin factors: no full matrix where the change is low-rank."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_vision.errors import AdapterError
from lora_vision.factors import Factors, LowRank


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A change as ``left @ diag(values) @ right``, the kernel flattened; S singular values, the largest first.

    Attributes:
        left: Orthonormal columns [O, S].
        values: Singular values [S], float32.
        right: Orthonormal rows [S, I·K·K].
        kernel: What one row of ``right`` is folded to: (I,) or (I, K, K).
    """

    left: Tensor
    values: Tensor
    right: Tensor
    kernel: tuple[int, ...]

    @property
    def norm(self) -> float:
        """Frobenius norm of the change."""
        return float(self.values.norm())

    @property
    def rank(self) -> int:
        """How many singular values are above float32's rounding noise."""
        return int((self.values > self.values[:1] * 1e-6).sum())

    @property
    def effective_rank(self) -> float:
        """Over how many directions the change's energy is spread: the exponential of its entropy.

        Roy and Vetterli 2007, of squared singular values.
        """
        shares = self.values.square() / self.values.square().sum().clamp_min(1e-30)
        return math.exp(float(torch.special.entr(shares).sum())) if self.norm else 0.0

    def energy(self, rank: int) -> float:
        """Share of the squared Frobenius norm that the first directions hold."""
        total = float(self.values.square().sum())
        return float(self.values[:rank].square().sum()) / total if total else 1.0

    def lost(self, rank: int) -> float:
        """Relative Frobenius error of keeping only the first directions (Eckart and Young 1936)."""
        return float(self.values[rank:].norm()) / self.norm if self.norm else 0.0

    def pair(self, rank: int, dtype: torch.dtype = torch.float32, bias: Tensor | None = None) -> LowRank:
        """The best change of that rank, as factors that are scaled by 1."""
        rank = max(1, min(rank, len(self.values)))
        root = self.values[:rank].sqrt()
        up = (self.left[:, :rank] * root).reshape(-1, rank, *(1,) * (len(self.kernel) - 1))
        down = (root[:, None] * self.right[:rank]).reshape(rank, *self.kernel)
        return LowRank(down.to(dtype).contiguous(), up.to(dtype).contiguous(), float(rank), bias=bias)


def spectrum(factors: Factors, base: Tensor | None = None) -> Spectrum:
    """The spectrum of a layer's weight change, alpha included.

    A low-rank change costs two QR decompositions of its thin sides and an SVD of an R x R matrix.

    Raises:
        AdapterError: The change is no matrix (a bias or a norm), needs the base weight (DoRA, IA3), or is not finite.
    """
    pair = factors.low_rank()
    if pair is not None and pair.rank < min(pair.size):
        left, small = torch.linalg.qr(pair.up.float().flatten(1))
        right, low = torch.linalg.qr(pair.down.float().flatten(1).t())
        core = _finite(small @ low.t() * pair.scale)
        u, s, v = torch.linalg.svd(core, full_matrices=False)
        return Spectrum(left @ u, s, v @ right.t(), tuple(pair.down.shape[1:]))
    return of_matrix(factors.delta(base))


def of_matrix(change: Tensor) -> Spectrum:
    """The spectrum of a whole matrix [O, I] or kernel [O, I, K, K].

    From the eigenvalues of the smaller Gram matrix in float64: small values come out closer than by an SVD in float32.
    Where a singular value is zero, the other side's vector is zero too.

    Raises:
        AdapterError: It has one dimension only, or is not finite.
    """
    if change.dim() < 2:
        raise AdapterError("a bias or a norm has no singular values")
    flat = _finite(change).double().flatten(1)
    wide = flat.shape[0] <= flat.shape[1]
    side = flat if wide else flat.t()
    squares, vectors = torch.linalg.eigh(side @ side.t())
    values, vectors = squares.flip(0).clamp_min(0).sqrt(), vectors.flip(1)
    others = vectors.t() @ side / values.clamp_min(1e-30)[:, None]
    others[values <= values[:1] * 1e-12] = 0
    left, right = (vectors, others) if wide else (others.t(), vectors.t())
    return Spectrum(left.float(), values.float(), right.float(), tuple(change.shape[1:]))


def _finite(matrix: Tensor) -> Tensor:
    if not bool(matrix.isfinite().all()):
        raise AdapterError("the change holds NaN or infinity; it has no singular values")
    return matrix
