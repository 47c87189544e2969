"""compare says of two adapters what follows from how they were made."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import CONV, LINEAR, TEXT, Maker, every_kind
from PIL import Image

from lora_vision import AdapterError, save_adapter
from lora_vision.adapter import Adapter
from lora_vision.base import RECIPES, load_base
from lora_vision.factors import LowRank
from lora_vision.tools import places
from lora_vision.tools.clash import lost, nearest
from lora_vision.tools.compare import Comparison, compare

Run = Callable[..., Any]


def pair(out: torch.Tensor, inp: torch.Tensor, scale: float = 1.0) -> LowRank:
    """The change with these output columns [O, R] and input rows [R, I]."""
    return LowRank(inp, out, scale * inp.shape[0])


def bases(seed: int = 0, size: int = 12) -> torch.Tensor:
    """Orthonormal columns."""
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)))[0]


def layer(a: LowRank, b: LowRank) -> Comparison:
    return compare(Adapter({LINEAR: a}), Adapter({LINEAR: b}))


def test_an_adapter_does_not_fight_itself() -> None:
    make = Maker()
    adapter = Adapter({LINEAR: make.lora(), CONV: make.locon(), TEXT: make.lora()})
    found = compare(adapter, adapter)
    assert found.cosine == pytest.approx(1, abs=1e-5)
    assert 0 <= found.fight < 1e-5
    assert found.balance == pytest.approx((1, 1))
    for meeting in found.layers.values():
        assert meeting.writes == pytest.approx(1, abs=1e-5)
        assert meeting.angle_out == pytest.approx(0, abs=0.2)


def test_its_opposite_fights_most_and_its_double_is_turned_down() -> None:
    a = Maker().lora()
    opposite = layer(a, LowRank(a.down, -a.up, a.alpha))
    assert opposite.cosine == pytest.approx(-1, abs=1e-5)
    assert opposite.fight == pytest.approx(2, abs=1e-5)
    double = layer(a, LowRank(a.down, a.up, 2 * a.alpha))
    assert double.fight == pytest.approx(0, abs=1e-5)
    assert double.balance == pytest.approx((1, 0.5))


def test_other_features_do_not_fight_and_the_same_features_do() -> None:
    out, inp = bases(1), bases(2)
    apart = layer(pair(out[:, :3], inp[:3]), pair(out[:, 3:6], inp[:3]))
    meeting = apart.layers[LINEAR]
    assert (meeting.writes, meeting.reads) == pytest.approx((0, 1), abs=1e-5)
    assert (meeting.angle_out, meeting.angle_in) == pytest.approx((90, 0), abs=0.2)
    assert apart.fight == pytest.approx(0, abs=1e-5)
    same = layer(pair(out[:, :3], inp[:3]), pair(out[:, :3], inp[3:6]))
    assert same.cosine == pytest.approx(0, abs=1e-5)
    assert same.fight == pytest.approx(1, abs=1e-5)


def test_the_smallest_angle_between_spaces_is_found() -> None:
    out, inp = bases(3), bases(4)
    turned = math.cos(math.radians(30)) * out[:, :1] + math.sin(math.radians(30)) * out[:, 5:6]
    found = layer(pair(out[:, :2], inp[:2]), pair(torch.cat([turned, out[:, 7:8]], 1), inp[6:8]))
    assert found.layers[LINEAR].angle_out == pytest.approx(30, abs=0.1)
    assert found.layers[LINEAR].angle_in == pytest.approx(90, abs=0.1)


@pytest.mark.parametrize("kind", ["lora-ranks", "locon", "tucker", "loha", "lokr"])
def test_cosines_are_those_of_the_full_changes(kind: str) -> None:
    a = every_kind()[kind]
    make = Maker(7)
    b = Adapter({name: _like(factors.delta(), make) for name, factors in a.layers.items()})
    found = compare(a, b)
    for name, meeting in found.layers.items():
        one, other = a.layers[name].delta().flatten(), b.layers[name].delta().flatten()
        assert meeting.cosine == pytest.approx(float(torch.cosine_similarity(one, other, 0)), abs=1e-5)
        assert (meeting.size_a, meeting.size_b) == pytest.approx((float(one.norm()), float(other.norm())), rel=1e-5)
        covariances = [d.flatten(1) @ d.flatten(1).t() for d in (a.layers[name].delta(), b.layers[name].delta())]
        overlap = torch.cosine_similarity(*(c.flatten() for c in covariances), 0)
        assert meeting.writes == pytest.approx(float(overlap), abs=1e-5)


def _like(change: torch.Tensor, make: Maker) -> LowRank:
    return LowRank(make.tensor(2, *change.shape[1:]), make.tensor(len(change), 2), 1.0)


def test_adapters_without_a_common_layer_cannot_fight() -> None:
    make = Maker()
    found = compare(Adapter({LINEAR: make.lora()}), Adapter({TEXT: make.lora()}))
    assert (found.fight, found.only_a, found.only_b) == (0, 1, 1)
    assert "their weights do not meet" in str(found)


def test_other_bases_and_missing_bases_are_told() -> None:
    make = Maker()
    with pytest.raises(AdapterError, match="different bases"):
        compare(Adapter({LINEAR: make.lora()}), Adapter({LINEAR: make.lora(inp=12)}))
    dora = Adapter({LINEAR: make.dora(make.lora(), 0, 16)})
    with pytest.raises(AdapterError, match=LINEAR):
        compare(dora, dora)
    assert compare(dora, dora, {LINEAR: make.tensor(16, 16)}).cosine == pytest.approx(1, abs=1e-5)


def test_a_class_is_told_by_what_differs_most_from_its_own_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    loud = torch.randn(30, 1, dtype=torch.float64, generator=generator) * torch.tensor([9.0, 9.0, 0.0])
    means = torch.tensor([[0.0, 0, 0], [1, -1, 0], [0, 0, 1]], dtype=torch.float64)  # across what varies, and beside it
    noise = 0.1 * torch.randn(3, 30, 3, dtype=torch.float64, generator=generator)
    classes = [mean + loud + some for mean, some in zip(means, noise, strict=True)]
    for number, some in enumerate(classes):
        assert (nearest(classes, some + 0.1 * means[1]) == number).double().mean() > 0.95


def test_pictures_drawn_with_both_tell_whose_look_is_lost(
    lora_vision: Run, sd1_folder: Path, sd1_adapters: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECIPES, "tiny", replace(RECIPES["tiny"], sample_steps=2))
    base = load_base(sd1_folder)
    before = {name: value.clone() for name, value in base.unet.state_dict().items()}
    ink = _load(sd1_adapters[0])
    prompts = ["a fox", "an owl", "a house", "a tree", "a cat", "a car"]

    def other(scale: float) -> list[float | None]:
        return lost(base, {"ink": ink, "other": _scaled(ink, scale)}, {"ink": prompts, "other": prompts[:4]})

    assert other(-1.0) == [1, 1], "its opposite undoes all of it"
    assert other(1e-9) == [0, None], "one that does nothing takes nothing away, and has no look"
    assert other(1.0) == [None, None], "the same twice cannot be told apart"
    prompts = ["a fox"]
    assert all(share is not None and share > 0.5 for share in other(-1.0)), "one caption is drawn several times"
    assert all(torch.equal(value, before[name]) for name, value in base.unet.state_dict().items())
    told = lora_vision("compare", *sd1_adapters, "--base", sd1_folder, "--json")
    assert told.code == 0, told.err
    assert len(told.json["lost"]) == 2 and all(value is None or 0 <= value <= 1 for value in told.json["lost"])


def _scaled(adapter: Adapter, scale: float) -> Adapter:
    return Adapter({name: LowRank(f.down, scale * f.up, f.alpha) for name, f in adapter.layers.items()})


def test_the_command_draws_it(lora_vision: Run, tmp_path: Path) -> None:
    make = Maker()
    for name in ("a", "b"):
        layers = {LINEAR: make.lora(), CONV: make.locon(), TEXT: make.lora()}
        save_adapter(Adapter(layers), tmp_path / f"{name}.safetensors")
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    told = lora_vision("compare", *files, "--picture", tmp_path / "c.png", "--json")
    assert told.code == 0, told.err
    assert set(told.json["layers"]) == {LINEAR, CONV, TEXT}
    assert told.json["fight"] == pytest.approx(compare(*(_load(file) for file in files)).fight)
    with Image.open(tmp_path / "c.png") as picture:
        assert len(picture.getcolors(1 << 20) or ()) > 20
    assert "equally large at weights" in lora_vision("compare", *files).out
    assert lora_vision("compare", files[0], tmp_path / "c.png").code == 1
    assert lora_vision("compare", *files, "--picture", "c.gif").code == 2
    (tmp_path / "c.png").rename(tmp_path / "d.png")
    refused = lora_vision("compare", *files, "--picture", tmp_path / "d.png" / "c.png")
    assert refused.code == 1 and "d.png is a file already" in refused.err


def _load(file: Path) -> Adapter:
    from lora_vision import load_adapter

    return load_adapter(file)


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        (LINEAR, "down 1", "self out"),
        (CONV, "down 1", "conv1"),
        (TEXT, "text_encoder", "self q"),
        ("unet.conv_in", "unet ends", "other"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "mid", "cross k"),
        ("unet.up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj", "up 3", "ff in"),
        ("unet.up_blocks.1.resnets.0.conv_shortcut", "up 1", "shortcut"),
        ("unet.up_blocks.0.upsamplers.0.conv", "up 0", "sampler"),
        ("text_encoder_2.text_model.encoder.layers.3.mlp.fc2", "text_encoder_2", "ff out"),
        ("vit.encoder.layer.11.attention.attention.query", "layer 11", "self q"),
        ("vit.encoder.layer.2.output.dense", "layer 2", "ff out"),
    ],
)
def test_layers_have_a_block_and_a_kind(name: str, block: str, kind: str) -> None:
    assert (places.block(name), places.kind(name)) == (block, kind)


def test_blocks_stand_in_the_order_of_the_forward_pass() -> None:
    names_ = [
        "unet.up_blocks.1.x",
        "unet.mid_block.x",
        "unet.down_blocks.10.x",
        "unet.down_blocks.2.x",
        "text_encoder.x",
    ]
    assert places.blocks(names_) == ["text_encoder", "down 2", "down 10", "mid", "up 1"]
