"""``lora-vision merge``: the file it writes is the blend, and says what it is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Outcome

from lora_vision import load_adapter, save_adapter
from lora_vision.config import MergeConfig
from lora_vision.factors import LowRank

Run = Callable[..., Outcome]


def test_the_exact_way_is_the_weighted_sum(lora_vision: Run, sd1_adapters: tuple[Path, Path], tmp_path: Path) -> None:
    ink, gold = sd1_adapters
    both = tmp_path / "both.safetensors"
    done = lora_vision("merge", f"{ink}:0.8@unet.up_blocks.*=0.5", f"{gold}:-0.3", "--output", both)
    assert done.code == 0, done.err
    assert done.out.startswith(f"wrote {both}: 32 layers, rank 4, by concat\nrelative error")
    first, second, found = load_adapter(ink), load_adapter(gold), load_adapter(both)
    for name, factors in found.layers.items():
        scale = 0.5 if name.startswith("unet.up_blocks.") else 0.8
        total = scale * first.layers[name].delta() - 0.3 * second.layers[name].delta()
        assert torch.allclose(factors.delta(), total, atol=1e-5)
    assert "lora_vision.lineage" in found.metadata


@pytest.mark.parametrize("how", ["svd", "linear", "ties", "dare", "magnitude", "klora"])
def test_other_ways_tell_their_error(
    lora_vision: Run, sd1_adapters: tuple[Path, Path], tmp_path: Path, how: str
) -> None:
    both = tmp_path / "both.safetensors"
    words = ["merge", *sd1_adapters, "--how", how, "--output", both, "--json"]
    told = lora_vision(*words)
    assert told.code == 0, told.err
    assert set(told.json["errors"]) == {"unet attention", "all"} and told.json["errors"]["all"] > 0.01
    assert told.json["ranks"] == [2, 2] and [source["scale"] for source in told.json["sources"]] == [1, 1]
    terms = [load_adapter(path) for path in sd1_adapters]
    found = load_adapter(both)
    gap = total = 0.0
    for name, factors in found.layers.items():
        true = sum(term.layers[name].delta() for term in terms)
        gap += float((factors.delta() - true).square().sum())
        total += float(torch.as_tensor(true).square().sum())
    assert told.json["errors"]["all"] == pytest.approx((gap / total) ** 0.5, rel=1e-3)


def test_wrong_use_is_told(lora_vision: Run, sd1_adapters: tuple[Path, Path], tmp_path: Path) -> None:
    ink, gold = sd1_adapters
    both = tmp_path / "both.safetensors"
    assert "klora is for two adapters" in lora_vision("merge", ink, "--how", "klora", "--output", both).err
    assert "two --prompts" in lora_vision("merge", ink, gold, "--how", "ziplora", "--output", both).err
    assert "absent: there is no such file" in lora_vision("merge", "absent", "--output", both).err
    assert lora_vision("merge", ink, "--output", "both.bin").code == 2
    assert (
        "--rank 0; expected at least 1" in lora_vision("merge", ink, "--how", "svd", "--rank", 0, "--output", both).err
    )
    assert "ink.safetensors is a file already" in lora_vision("merge", ink, "--output", ink / "both.safetensors").err
    other = replace(load_adapter(gold), layers={})
    for name, factors in load_adapter(gold).layers.items():
        assert isinstance(factors, LowRank)
        other.layers[name] = LowRank(torch.ones(2, 999), torch.ones(999, 2), 2.0)
    save_adapter(other, tmp_path / "other.safetensors")
    assert "made for different bases" in lora_vision("merge", ink, tmp_path / "other.safetensors", "--output", both).err
    assert not both.exists()
    kept = ink.read_bytes()
    assert "would overwrite what it is made of" in lora_vision("merge", ink, gold, "--output", ink).err
    assert ink.read_bytes() == kept
    with pytest.raises(ValueError, match="at least 1"):
        MergeConfig(adapters=("a",), output="b.safetensors", steps=0)
