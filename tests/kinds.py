"""Random adapters of every kind for the layers of a model: what the laws are tested on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from lora_vision.adapter import Adapter
from lora_vision.factors import IA3, Dora, Factors, Full, Hadamard, Kronecker, LowRank

SIZE = 0.2


def _pair(shape: tuple[int, ...], rank: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    return SIZE * torch.randn(rank, *shape[1:], generator=g), SIZE * torch.randn(shape[0], rank, generator=g)


def lora(weight: Tensor, rank: int, g: torch.Generator) -> Factors:
    down, up = _pair(tuple(weight.shape), rank, g)
    return LowRank(down, up, alpha=rank / 2)


def tucker(weight: Tensor, rank: int, g: torch.Generator) -> Factors:
    if weight.dim() == 2:
        return lora(weight, rank, g)
    down, up = _pair((*weight.shape[:2], 1, 1), rank, g)
    mid = SIZE * torch.randn(rank, rank, *weight.shape[2:], generator=g)
    return LowRank(down, up[..., None, None], 2.0, mid)


def loha(weight: Tensor, rank: int, g: torch.Generator) -> Factors:
    flat = (weight.shape[0], math.prod(weight.shape[1:]))
    (b1, a1), (b2, a2) = _pair(flat, 2, g), _pair(flat, 2, g)
    return Hadamard(5 * a1, b1, 5 * a2, b2, alpha=1.0)


def lokr(weight: Tensor, rank: int, g: torch.Generator) -> Factors:
    out, inner = weight.shape[0], math.prod(weight.shape[1:])
    first = 2 if out % 2 == 0 and weight.shape[1] % 2 == 0 else 1
    b, a = _pair((out // first, inner // first), rank, g)
    return Kronecker(alpha=1.0, w1=torch.randn(first, first, generator=g), w2_a=a, w2_b=b)


def dora(axis: int) -> Callable[[Tensor, int, torch.Generator], Factors]:
    def make(weight: Tensor, rank: int, g: torch.Generator) -> Factors:
        lengths = weight.float().transpose(0, axis).flatten(1).norm(dim=1)
        return Dora(lora(weight, rank, g), lengths * (1 + SIZE * torch.randn(len(lengths), generator=g)), axis)

    return make


def ia3(weight: Tensor, rank: int, g: torch.Generator) -> Factors:
    return IA3(SIZE * torch.randn(weight.shape[1], generator=g), on_input=True)


def full(weight: Tensor, rank: int, g: torch.Generator) -> Factors:
    return Full(SIZE * torch.randn(weight.shape, generator=g))


KINDS: Mapping[str, Callable[[Tensor, int, torch.Generator], Factors]] = {
    "lora": lora,
    "tucker": tucker,
    "loha": loha,
    "lokr": lokr,
    "dora-output": dora(0),
    "dora-input": dora(1),
    "ia3": ia3,
    "full": full,
}


def adapter(layers: Mapping[str, nn.Module], kind: str = "lora", rank: int = 3, seed: int = 0) -> Adapter:
    """A random adapter of one kind over the given layers."""
    g = torch.Generator().manual_seed(seed)
    return Adapter({name: KINDS[kind](layer.weight.detach(), rank, g) for name, layer in layers.items()})


def linear_and_conv(layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    return {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear | nn.Conv2d)}


def same_state(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts hold the same keys in the same order and the same bits."""
    return list(before) == list(after) and all(_bits(before[key], after[key]) for key in before)


def _bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def snapshot(models: Iterable[nn.Module]) -> list[dict[str, Tensor]]:
    return [{key: value.clone() for key, value in model.state_dict().items()} for model in models]
