"""Seeded random adapters of every algorithm, made without any file."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_vision.adapter import Adapter
from lora_vision.factors import IA3, Dora, Factors, Full, Hadamard, Kronecker, LowRank
from lora_vision.replacement import Replacement

LINEAR = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
CONV = "unet.down_blocks.1.resnets.0.conv1"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
TEXT_2 = "text_encoder_2.text_model.encoder.layers.1.mlp.fc1"
NORM = "unet.down_blocks.1.resnets.0.norm1"
VIT = "vit.encoder.layer.0.attention.attention.query"


class Maker:
    """Draws factors from one seed."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def tensor(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def lora(self, out: int = 16, inp: int = 16, rank: int = 4, alpha: float = 2.0) -> LowRank:
        return LowRank(self.tensor(rank, inp), self.tensor(out, rank), alpha)

    def locon(self, out: int = 16, inp: int = 8, rank: int = 3, alpha: float = 1.5) -> LowRank:
        return LowRank(self.tensor(rank, inp, 3, 3), self.tensor(out, rank, 1, 1), alpha)

    def tucker(self, out: int = 16, inp: int = 8, rank: int = 3) -> LowRank:
        mid = self.tensor(rank, rank, 3, 3)
        return LowRank(self.tensor(rank, inp, 1, 1), self.tensor(out, rank, 1, 1), 1.5, mid)

    def loha(self, out: int = 16, inp: int = 16, rank: int = 2, kernel: int = 1) -> Hadamard:
        sides = [self.tensor(*s) for s in ((out, rank), (rank, inp * kernel * kernel)) * 2]
        return Hadamard(*sides, alpha=1.0, shape=(out, inp, kernel, kernel) if kernel > 1 else None)

    def lokr(self, full: bool = False, alpha: float = 1.0) -> Kronecker:
        if full:
            return Kronecker(alpha=alpha, w1=self.tensor(4, 4), w2=self.tensor(4, 4))
        return Kronecker(alpha=alpha, w1=self.tensor(4, 4), w2_a=self.tensor(4, 2), w2_b=self.tensor(2, 4))

    def dora(self, inner: Factors, axis: int, length: int) -> Dora:
        return Dora(inner, self.tensor(length).abs() + 0.5, axis)


def every_kind(dtype: torch.dtype = torch.float32) -> dict[str, Adapter]:
    """One small adapter for each algorithm, by name."""
    make = Maker(dtype=dtype)
    one = {
        "lora": {LINEAR: make.lora(), TEXT: make.lora(alpha=4.0)},
        "lora-ranks": {LINEAR: make.lora(rank=2, alpha=3.3), TEXT: make.lora(rank=5, alpha=0.1)},
        "lora-bias": {LINEAR: LowRank(make.tensor(4, 16), make.tensor(16, 4), 2.0, bias=make.tensor(16))},
        "locon": {CONV: make.locon(), LINEAR: make.lora()},
        "tucker": {CONV: make.tucker()},
        "loha": {LINEAR: make.loha(), CONV: make.loha(inp=8, kernel=3)},
        "lokr": {LINEAR: make.lokr()},
        "lokr-full": {LINEAR: make.lokr(full=True, alpha=9999999999.0)},
        "dora": {LINEAR: make.dora(make.lora(inp=12), 0, 16), CONV: make.dora(make.locon(), 0, 16)},
        "dora-input": {LINEAR: make.dora(make.lora(inp=12), 1, 12), CONV: make.dora(make.locon(), 1, 8)},
        "ia3": {LINEAR: IA3(make.tensor(16), with_bias=False), TEXT: IA3(make.tensor(16), True)},
        "full": {LINEAR: Full(make.tensor(16, 16), bias=make.tensor(16)), TEXT: Full(bias=make.tensor(16))},
        "norm": {NORM: Full(make.tensor(16), bias=make.tensor(16))},
        "whole": {CONV: Replacement(weight=make.tensor(16, 8, 3, 3), new_bias=make.tensor(16)), LINEAR: make.lora()},
        "vit": {VIT: make.lora()},
    }
    adapters = {kind: Adapter(layers, {}, {"note": kind}) for kind, layers in one.items()}
    embedding = {"embedding.inky.text_encoder": make.tensor(2, 16)}
    adapters["embedding"] = Adapter({LINEAR: make.lora()}, embedding, {})
    sdxl = {LINEAR: make.lora(), CONV: make.locon(), TEXT: make.lora(), TEXT_2: make.lora(32, 16)}
    adapters["sdxl"] = Adapter(sdxl, {}, {})
    return adapters


def assert_same(found: Adapter, expected: Adapter) -> None:
    """Fails unless both hold the same layers, and each the same kind of change bit for bit, alpha included."""
    assert set(found.layers) == set(expected.layers)
    for name, one in expected.layers.items():
        same_factors(found.layers[name], one)
    assert set(found.extras) == set(expected.extras)
    assert all(torch.equal(found.extras[name], value) for name, value in expected.extras.items())
    assert expected.metadata.items() <= found.metadata.items()


def same_factors(found: Factors, expected: Factors) -> None:
    assert type(found) is type(expected)
    ours, theirs = found.tensors(), expected.tensors()
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
    for field in ("alpha", "axis", "on_input", "with_bias"):
        assert getattr(found, field, None) == getattr(expected, field, None), field
    if isinstance(expected, Dora):
        same_factors(found.inner, expected.inner)  # type: ignore[attr-defined]
