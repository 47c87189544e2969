"""The report page: its numbers are those of the adapter, and what it says of blocks is what they do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import CONV, LINEAR, NORM, TEXT, Maker
from PIL import Image

import lora_vision as lv
from lora_vision import names
from lora_vision.adapter import Adapter
from lora_vision.base import RECIPES, load_base
from lora_vision.factors import Full, LowRank
from lora_vision.targets import select
from lora_vision.tools import plots
from lora_vision.tools.account import account
from lora_vision.tools.commands import prompts_of
from lora_vision.tools.trials import Trials, look, pixels, trials

Run = Callable[..., Any]


def uneven(base: lv.Base, loud: str = "unet.up_blocks.1") -> Adapter:
    """An adapter that is loud in one block and all but silent elsewhere."""
    generator, layers = torch.Generator().manual_seed(2), names.index({"unet": base.unet})
    found = {}
    for name in select("attention+conv", layers):
        shape = layers[name].weight.shape
        scale = 1.0 if name.startswith(loud) else 1e-3
        down = torch.randn(2, *shape[1:], generator=generator) / shape[1:].numel() ** 0.5
        up = torch.randn(shape[0], 2, *(1,) * (len(shape) - 2), generator=generator)
        found[name] = LowRank(down, scale * up, 2.0)
    return Adapter(found, {}, {"ss_tag_frequency": json.dumps({"<b>set</b>": {"a fox": 1, "a hen": 1}})})


@pytest.fixture(scope="module", autouse=True)
def few_steps() -> Iterator[None]:
    """Pictures in three denoising steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "tiny", replace(RECIPES["tiny"], sample_steps=3))
        yield


@pytest.fixture(scope="module")
def tried(sd1_folder: Path) -> tuple[lv.Base, Adapter, Trials]:
    base = load_base(sd1_folder)
    adapter = uneven(base)
    return base, adapter, trials(base, adapter, ["fox", "hen"], seed=3)


def test_numbers_are_those_of_the_changes() -> None:
    make = Maker()
    layers = {LINEAR: make.lora(), CONV: make.locon(), TEXT: make.loha(), NORM: Full(make.tensor(16))}
    weights = {LINEAR: make.tensor(16, 16), CONV: make.tensor(16, 8, 3, 3), TEXT: make.tensor(16, 16)}
    found = account(Adapter(layers), {**weights, NORM: make.tensor(16)})
    assert set(found.skipped) == {NORM} and found.measured
    squares = {name: float(layers[name].delta().square().sum()) for name in weights}
    for name, weight in weights.items():
        true = layers[name].delta()
        assert found.layers[name].norm == pytest.approx(float(true.norm()), rel=1e-5)
        assert found.layers[name].relative == pytest.approx(float(true.norm() / weight.norm()), rel=1e-5)
        assert found.layers[name].rms == pytest.approx(float(true.square().mean().sqrt()), rel=1e-5)
        values = torch.linalg.svdvals(true.double().flatten(1)).square()
        assert found.layers[name].energy(2) == pytest.approx(float(values[:2].sum() / values.sum()), abs=1e-5)
    assert found.text_share == pytest.approx(squares[TEXT] / sum(squares.values()), rel=1e-4)
    assert found.energy(64) == pytest.approx(1)
    rank = found.enough(0.95)
    assert found.energy(rank) >= 0.95 > found.energy(rank - 1)
    assert found.layers[LINEAR].rank == 4
    assert not account(Adapter(layers)).measured
    json.dumps(found.to_dict(), allow_nan=False)


def test_what_needs_a_base_is_skipped_without_one() -> None:
    make = Maker()
    dora = Adapter({LINEAR: make.dora(make.lora(), 0, 16)})
    assert "name the base" in account(dora).skipped[LINEAR]
    assert account(dora, {LINEAR: make.tensor(16, 16)}).layers[LINEAR].rank == 4
    with pytest.raises(lv.AdapterError, match="made for another"):
        account(dora, {})


def test_distances_are_zero_for_the_same_and_the_look_ignores_places() -> None:
    noise = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy()
    one, moved = Image.fromarray(noise), Image.fromarray(noise[::-1, ::-1].copy())
    assert look([one], [one]) == pixels([one], [one]) == 0
    assert pixels([one], [moved]) > 0.2 and look([one], [moved]) < 0.02
    black, white = (Image.new("RGB", (8, 8), colour) for colour in ("black", "white"))
    assert pixels([black], [white]) == 1


def test_the_account_names_the_block_that_acts(tried: tuple[lv.Base, Adapter, Trials]) -> None:
    base, adapter, found = tried
    assert found.blocks == ("down 0", "down 1", "mid", "up 0", "up 1")
    assert found.carriers == ("up 1",)
    assert found.lost(found.gone) > 0.9 and found.lost(found.carried) < 0.1
    for block in set(found.blocks) - {"up 1"}:
        assert found.lost(found.without[block]) < 0.1 and found.lost(found.only[block]) > 0.9
    assert len(found.steps) == base.recipe.sample_steps and all(value > 0.01 for value in found.steps.values())
    assert [where.shape for where in found.maps] == [(16, 16)] * 2
    assert all(where.max() == pytest.approx(1) and where.min() >= 0 for where in found.maps)


def test_leaving_a_block_out_is_an_adapter_without_it(tried: tuple[lv.Base, Adapter, Trials]) -> None:
    """Pictures of the trials are those of an adapter file that lacks the block, and the base is as it was."""
    base, adapter, found = tried
    from lora_vision.samples import draw

    rest = {name: layer for name, layer in adapter.layers.items() if not name.startswith("unet.up_blocks.1.")}
    with_rest = lv.Blend(base.parts)
    with_rest.load(replace(adapter, layers=rest), "rest")
    drawn = draw(base, ["fox", "hen"], seed=3, resolution=32)
    with_rest.detach()
    assert pixels(drawn, found.without["up 1"]) < 0.01
    assert pixels(draw(base, ["fox", "hen"], seed=3, resolution=32), found.base) == 0


def test_the_page_holds_everything(lora_vision: Run, sd1_folder: Path, tmp_path: Path) -> None:
    file = lv.save_adapter(uneven(load_base(sd1_folder)), tmp_path / "ink.safetensors")
    told = lora_vision("report", file, "--base", sd1_folder, "--output", tmp_path / "page", "--json")
    assert told.code == 0, told.err
    page = (tmp_path / "page" / "index.html").read_text()
    pngs = {path.stem for path in (tmp_path / "page").glob("*.png")}
    shown = re.findall(r'<img alt="([^"]+)" src="data:image/png;base64,', page)
    assert (
        set(shown) == pngs >= {"size", "spectrum", "energy", "leave-one-out", "one-only", "carriers", "steps", "where"}
    )
    assert not re.search(r'(src|href)="(?!data:)', page), "the page needs nothing but itself"
    assert "The look lives in up 1" in page
    assert told.json["trials"]["carriers"] == ["up 1"] and told.json["trials"]["prompts"] == ["a fox", "a hen"]
    assert json.loads((tmp_path / "page" / "report.json").read_text())["trials"] == told.json["trials"]


def test_without_a_base_the_page_says_what_the_file_tells(lora_vision: Run, tmp_path: Path) -> None:
    make = Maker()
    adapter = Adapter({LINEAR: make.lora(), TEXT: make.lora()}, {}, {"ss_output_name": "<script>alert(1)</script>"})
    adapter = replace(adapter, metadata={"lora_vision.trigger": "<script>alert(1)</script>"})
    file = lv.save_adapter(adapter, tmp_path / "ink.safetensors")
    told = lora_vision("report", file, "--output", tmp_path / "page")
    assert told.code == 0, told.err
    assert "no base given" not in told.out and "text encoders hold" in told.out
    page = (tmp_path / "page" / "index.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert not (tmp_path / "page" / "leave-one-out.png").exists()
    wrong = lora_vision("report", file, "--base", "absent", "--output", tmp_path / "other")
    assert wrong.code == 1 and "there is no base 'absent'" in wrong.err and not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (1, 16, [5, 10, 15]), (0, 1.93, [0, 0.5, 1, 1.5]), (3, 3, [3])],
)
def test_axes_have_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert plots.ticks(low, high) == pytest.approx(expected)


def test_curves_on_a_logarithmic_axis_stand_where_their_powers_do() -> None:
    """One tenth is half way down to one hundredth."""
    picture = plots.lines({"x": [(0.0, 1.0), (1.0, 0.1), (2.0, 0.01)]}, "", "", (400, 300), log=True, most=1.0)
    blue = np.argwhere((np.asarray(picture) == (31, 119, 180)).all(-1) & (np.arange(400) < 272))
    column = {x: blue[blue[:, 1] == x, 0].mean() for x in (68, 168, 268)}
    assert column[168] - column[68] == pytest.approx(column[268] - column[168], abs=4) and column[68] < 60


def test_prompts_come_from_the_captions() -> None:
    many = {"ss_tag_frequency": json.dumps({"set": {f"a {n}": 1 for n in range(40)}})}
    assert prompts_of(many) == ("a 0", "a 10", "a 20", "a 30")
    assert len(prompts_of({})) == 4
    assert prompts_of({"ss_tag_frequency": "[]"}) == prompts_of({})
