"""ZipLoRA: columns are weighted so that both adapters' own answers are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kinds import adapter, linear_and_conv, same_state, snapshot

from lora_vision import names
from lora_vision.base import Base, load_base
from lora_vision.errors import AdapterError
from lora_vision.factors import LowRank
from lora_vision.ziplora import Zip, ziplora


@pytest.fixture
def base(sd1_folder: Path) -> Base:
    return load_base(sd1_folder)


def test_learning_brings_both_answers_nearer_and_keeps_the_base(base: Base) -> None:
    layers = linear_and_conv(names.index(base.parts))
    some = {n: layer for n, layer in layers.items() if ".attn" in n or ".conv1" in n or "self_attn" in n}
    subject, style = adapter(some, seed=1), adapter(some, "lora", rank=2, seed=2)
    before = snapshot(base.parts.values())
    found, losses = ziplora(base, (subject, 0.7), (style, 0.5), ("fox", "ink"), Zip(steps=12, learning_rate=0.05))
    assert sum(losses[-3:]) < sum(losses[:3])
    assert all(same_state(state, part.state_dict()) for state, part in zip(before, base.parts.values(), strict=True))
    assert found.adapter.layers.keys() == some.keys() and found.errors["unet attention"] > 1e-3
    for name, factors in found.adapter.layers.items():
        deltas = [one.layers[name].delta() * weight for one, weight in ((subject, 0.7), (style, 0.5))]
        merged = factors.delta()
        assert isinstance(factors, LowRank) and factors.rank == 5
        if name.startswith("text_encoder"):
            assert torch.allclose(merged, sum(deltas), atol=1e-5)
            continue
        for column in range(merged.shape[1]):  # each column is a mixture of the two, and of nothing else
            sides = torch.stack([delta[:, column].flatten() for delta in deltas], 1)
            mix = torch.linalg.lstsq(sides, merged[:, column].reshape(-1, 1)).solution
            assert torch.allclose((sides @ mix).flatten(), merged[:, column].flatten(), atol=1e-4)


def test_silence_beside_an_adapter_changes_it_little(base: Base) -> None:
    """With a style of weight zero both answers are reached by leaving the subject's columns alone or at nothing."""
    layers = linear_and_conv(names.index({"unet": base.unet}))
    some = {name: layer for name, layer in layers.items() if name.endswith("attn1.to_q")}
    one = adapter(some, "full", seed=1)
    found, losses = ziplora(base, (one, 0.5), (one, 0.0), ("fox", "ink"), Zip(steps=1, overlap=0.0))
    assert len(losses) == 1
    for name, factors in found.adapter.layers.items():
        ratio = factors.delta() / (0.5 * one.layers[name].delta())
        assert ratio.min() > 0.98 and ratio.max() < 1.02  # one step of Adam at 0.01 from 1


def test_adapters_without_a_common_layer_are_refused(base: Base) -> None:
    layers = linear_and_conv(names.index(base.parts))
    text = {name: layer for name, layer in layers.items() if name.startswith("text_encoder")}
    with pytest.raises(AdapterError, match="there is none"):
        ziplora(base, (adapter(layers), 1.0), (adapter(text), 1.0), ("fox", "ink"))
