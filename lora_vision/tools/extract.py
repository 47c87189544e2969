"""extract: an adapter out of a fine-tuned checkpoint and the base it was tuned from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lora_vision import names
from lora_vision.adapter import Adapter
from lora_vision.errors import AdapterError, BaseModelError
from lora_vision.factors import Factors, Full, LowRank
from lora_vision.spectrum import of_matrix

LARGEST = 128
"""The highest rank that ``auto`` chooses."""


@dataclass(frozen=True, eq=False)
class Extracted:
    """What a fine-tune changed, as an adapter.

    Attributes:
        adapter: The adapter.
        errors: Layer name to the relative Frobenius error of its pair.
        ranks: Layer name to rank.
        left_out: Changed biases and norms that are not in the adapter, each with its norm relative to the base's.
        change: Norm of all weight changes together over that of the changed weights.
    """

    adapter: Adapter
    errors: Mapping[str, float]
    ranks: Mapping[str, int]
    left_out: Mapping[str, float]
    change: float

    def to_dict(self) -> dict[str, Any]:
        """Ranks and errors as plain values, for JSON."""
        layers = {name: {"rank": rank, "error": self.errors[name]} for name, rank in self.ranks.items()}
        return {"change": self.change, "layers": layers, "left_out": dict(self.left_out)}

    def __str__(self) -> str:
        width = max(map(len, self.ranks), default=0)
        lines = [f"{name:{width}}  rank {rank:3}  error {self.errors[name]:.2e}" for name, rank in self.ranks.items()]
        mean = sum(self.errors.values()) / max(1, len(self.errors))
        lines.append(f"{len(self.ranks)} layers, changed by {self.change:.2%} of their weight, mean error {mean:.2e}")
        if self.left_out:
            worst = max(self.left_out, key=self.left_out.__getitem__)
            lines.append(
                f"left out: {len(self.left_out)} biases and norms, which no pair can hold (largest change "
                f"{self.left_out[worst]:.2%}, {worst}); --vectors stores them whole"
            )
        return "\n".join(lines)


def extract(
    tuned: Mapping[str, nn.Module],
    base: Mapping[str, nn.Module],
    rank: int | str = "auto",
    *,
    clamp: float | None = None,
    vectors: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Extracted:
    """What turns the base into the fine-tuned model, each layer's change cut to a rank by its singular values.

    Args:
        tuned: Part name to fine-tuned model.
        base: Part name to the model it started from; parts that only one side has are ignored.
        rank: The rank of every layer (less where a layer is smaller), or ``auto``: as many directions as stand out
            of the noise in that layer, at most LARGEST.
        clamp: Cut the factors' numbers at this quantile of their size, as kohya does at 0.99. None cuts nothing.
        vectors: Also store changes of biases and norms, whole.
        dtype: Type of the stored factors.

    Raises:
        BaseModelError: The two are not built alike.
        AdapterError: The rank makes no sense, or nothing differs.
    """
    if rank != "auto" and (not isinstance(rank, int) or rank < 1):
        raise AdapterError(f"rank {rank}; expected auto or a number of at least 1")
    if clamp is not None and not 0 < clamp <= 1:
        raise AdapterError(f"clamp {clamp}; expected a quantile above 0, at most 1")
    shared = [part for part in base if part in tuned]
    old: Mapping[str, Any] = names.index({part: base[part] for part in shared})
    new: Mapping[str, Any] = names.index({part: tuned[part] for part in shared})
    _check(old, new)
    layers: dict[str, Factors] = {}
    errors, ranks, left_out, moved, whole = {}, {}, {}, 0.0, 0.0
    with torch.no_grad():
        for name in tqdm(old, "layers", disable=None):
            diff, shift = _difference(old[name], new[name], "weight"), _difference(old[name], new[name], "bias")
            bias = shift if vectors and shift is not None else None
            if shift is not None and not vectors:
                left_out[f"{name}.bias"] = _relative(shift, old[name].bias)
            if diff is not None and diff.dim() < 2 and not vectors:
                left_out[f"{name}.weight"] = _relative(diff, old[name].weight)
            elif diff is not None and diff.dim() > 1:
                layers[name], errors[name] = _pair(diff, rank, clamp, dtype, bias)
                ranks[name] = layers[name].rank or 0
                moved, whole = moved + float(diff.norm()) ** 2, whole + float(old[name].weight.float().norm()) ** 2
            elif vectors and (diff is not None or bias is not None):
                layers[name] = Full(diff=diff, bias=bias)
    if not layers:
        raise AdapterError("the two models have the same weights: there is nothing to extract")
    return Extracted(Adapter(layers), errors, ranks, left_out, (moved / whole) ** 0.5 if whole else 0.0)


def automatic(values: Tensor, shape: tuple[int, int]) -> int:
    """How many singular values stand out of noise of unknown level (Gavish and Donoho 2014), from 1 to LARGEST.

    Args:
        values: Singular values [S], the largest first.
        shape: Of the matrix.
    """
    beta = min(shape) / max(shape)
    threshold = (0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43) * float(values.median())
    return max(1, min(LARGEST, int((values > max(threshold, float(values[0]) * 1e-6)).sum())))


def _pair(
    diff: Tensor, rank: int | str, clamp: float | None, dtype: torch.dtype, bias: Tensor | None
) -> tuple[LowRank, float]:
    """One layer's change at its rank, and the relative error of that."""
    found = of_matrix(diff)
    kept = automatic(found.values, (diff.shape[0], diff[0].numel())) if isinstance(rank, str) else rank
    pair = found.pair(kept, torch.float32, bias)
    if clamp is None:
        return _typed(pair, dtype), found.lost(kept)
    sizes = torch.cat([pair.up.flatten(), pair.down.flatten()]).abs()
    most = float(sizes.sort().values[max(0, int(clamp * len(sizes)) - 1)])  # torch.quantile refuses large tensors
    pair = LowRank(pair.down.clamp(-most, most), pair.up.clamp(-most, most), pair.alpha, bias=bias)
    return _typed(pair, dtype), float((pair.delta() - diff).norm()) / found.norm


def _typed(pair: LowRank, dtype: torch.dtype) -> LowRank:
    return LowRank(pair.down.to(dtype), pair.up.to(dtype), pair.alpha, bias=pair.bias)


def _difference(old: nn.Module, new: nn.Module, kind: str) -> Tensor | None:
    """What was added to the weight or bias, float32, or None when nothing was."""
    before, after = getattr(old, kind, None), getattr(new, kind, None)
    if before is None or after is None:
        return None
    diff = after.detach().float() - before.detach().float()
    return diff if bool(diff.any()) else None


def _relative(diff: Tensor, before: Tensor) -> float:
    return float(diff.norm()) / max(float(before.float().norm()), 1e-12)


def _check(old: Mapping[str, nn.Module], new: Mapping[str, nn.Module]) -> None:
    """Nothing, unless the layers of two models differ in name or shape."""
    strange = sorted(old.keys() ^ new.keys())
    if not strange:
        shapes = ({name: _shape(layer) for name, layer in side.items()} for side in (old, new))
        before, after = shapes
        strange = [f"{name} ({after[name]}, base {before[name]})" for name in before if before[name] != after[name]]
    if strange or not old:
        found = ", ".join(strange[:3]) or "no part in common"
        raise BaseModelError(f"the two models are not built alike: {found}; expected a base and its own fine-tune")


def _shape(layer: nn.Module) -> tuple[int, ...] | None:
    weight = getattr(layer, "weight", None)
    return None if weight is None else tuple(weight.shape)
