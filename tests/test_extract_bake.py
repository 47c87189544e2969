"""Into a checkpoint and out again: baking draws what the live blend draws, extracting gives the adapter back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from models import ldm_checkpoint, tiny_sd
from safetensors import safe_open
from safetensors.torch import load_file

import lora_vision as lv
from lora_vision import lineage, names
from lora_vision.base import load_base
from lora_vision.factors import LowRank
from lora_vision.targets import select
from lora_vision.tools import bake, ldm
from lora_vision.tools.extract import automatic, extract

Run = Callable[..., Any]
KINDS = {"sd1": StableDiffusionPipeline, "sd2": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


@pytest.fixture(scope="module")
def sd2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("sd2"), "sd2")


def random_adapter(base: lv.Base, targets: str = "attention+ff+conv+text", rank: int = 3) -> lv.Adapter:
    """A large random adapter with alpha other than the rank."""
    generator, layers = torch.Generator().manual_seed(5), names.index(base.parts)
    found = {}
    for name in select(targets, layers):
        shape = layers[name].weight.shape
        down, up = (torch.randn(s, generator=generator) for s in ((rank, *shape[1:]), (shape[0], rank)))
        found[name] = LowRank(down / shape[1:].numel() ** 0.5, up.reshape(*up.shape, *(1,) * (len(shape) - 2)), 2.0)
    return lv.Adapter(found)


def picture(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    pixels: torch.Tensor = pipe("fox", num_inference_steps=2, generator=generator, output_type="pt").images
    return pixels


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_baked_checkpoint_draws_what_the_live_blend_draws(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(f"{family}_folder")
    base = load_base(folder)
    adapter = random_adapter(base)
    plain = picture(base.pipeline())
    blend = lv.Blend(base.pipeline())
    blend.load(adapter, "it", scale=0.5)
    live = picture(blend.pipe)
    blend.detach()
    assert (live - plain).abs().max() > 0.01

    bake.bake(base, [(adapter, 0.5)])
    told = bake.provenance(base, [{"file": "it.safetensors", "sha256": "0", "scale": 0.5}])
    assert not any(type(layer).__module__.startswith("lora_vision") for layer in base.unet.modules())
    whole = bake.write_folder(base, tmp_path / "baked", told)
    single = bake.write_file(base, tmp_path / "baked.safetensors", told)
    opened = KINDS[family].from_pretrained(whole)
    assert (picture(opened) - live).abs().max() < 2e-4
    config: dict[str, Any] = {"config": str(folder), "local_files_only": True}
    if family == "sdxl":  # diffusers tells the two encoders apart by their width, which is one here
        second = opened.text_encoder_2
        told_of_it = convert_open_clip_checkpoint(second, load_file(single), prefix="conditioner.embedders.1.model.")
        states = {names.classic("text_encoder_2", key): weight for key, weight in second.state_dict().items()}
        found = {names.classic("text_encoder_2", key): weight for key, weight in told_of_it.items()}
        assert states.keys() == found.keys() and all(torch.equal(states[key], found[key]) for key in states)
        config["text_encoder_2"] = second
    alone = KINDS[family].from_single_file(str(single), **config)
    assert torch.equal(picture(alone), picture(opened))
    again = bake.write_file(base, tmp_path / "again.safetensors", told)
    assert again.read_bytes() == single.read_bytes()


def test_single_files_have_the_original_keys(sd1_folder: Path) -> None:
    """Against the table of the tests, which was written by hand from the original checkpoints."""
    base = load_base(sd1_folder)
    found, expected = ldm.checkpoint(base), ldm_checkpoint(base.pipeline())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_the_unet_of_sd15_is_spelt_as_in_its_checkpoint() -> None:
    """Names and order of Stable Diffusion 1's own `model.diffusion_model`; SDXL's upsampler follows an attention."""
    with torch.device("meta"):
        sd15 = UNet2DConditionModel(cross_attention_dim=768)
        sdxl = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        )
    stems = dict(ldm.unet_stems(sd15))
    known = {
        "down_blocks.0.resnets.0": "input_blocks.1.0",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "down_blocks.2.attentions.1": "input_blocks.8.1",
        "down_blocks.3.resnets.1": "input_blocks.11.0",
        "mid_block.attentions.0": "middle_block.1",
        "up_blocks.0.resnets.0": "output_blocks.0.0",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv",
        "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
        "up_blocks.3.attentions.2": "output_blocks.11.1",
    }
    assert {stem: stems[stem] for stem in known} == known
    assert dict(ldm.unet_stems(sdxl))["up_blocks.1.resnets.2"] == "output_blocks.5.0"
    for ours, theirs in ldm.unet_stems(sdxl):  # the other table of this house, made for adapters
        probe = f"{ours}.conv1" if ".resnets." in ours else f"{ours}.proj_in" if ".attentions." in ours else ours
        expected = f"{theirs}.in_layers.2" if ".resnets." in ours else probe.replace(ours, theirs)
        assert names.to_sgm(probe) == expected


def test_baking_is_told_in_header_and_folder(lora_vision: Run, sd1_folder: Path, tmp_path: Path) -> None:
    file = lv.save_adapter(random_adapter(load_base(sd1_folder), "attention"), tmp_path / "ink.safetensors")
    words = ["bake", "--base", sd1_folder, "--adapter", f"{file}:0.5", "--precision", "fp16", "--output"]
    told = lora_vision(*words, tmp_path / "one.safetensors", "--json")
    assert told.code == 0, told.err
    assert lora_vision(*words, tmp_path / "folder").code == 0
    with safe_open(tmp_path / "one.safetensors", framework="pt") as opened:
        header = opened.metadata()
    assert header == json.loads((tmp_path / "folder" / bake.PROVENANCE).read_text())
    born = lineage.read(header)
    assert born is not None and born.how == "bake"
    assert born.parents == ({"file": "ink.safetensors", "sha256": lineage.sha256_of(file), "scale": 0.5},)
    assert born.settings["base_fingerprint"] == load_base(sd1_folder).fingerprint
    assert {weight.dtype for weight in load_file(tmp_path / "one.safetensors").values()} == {torch.float16}
    single = load_base(tmp_path / "one.safetensors", config=sd1_folder)
    assert single.fingerprint == load_base(tmp_path / "folder").fingerprint == told.json["fingerprint"]
    for config in (tmp_path / "folder").rglob("*.json"):
        assert str(tmp_path) not in config.read_text() and str(sd1_folder) not in config.read_text()
    for there in ("folder", "one.safetensors"):
        before = lineage.sha256_of(tmp_path / there)
        refused = lora_vision(*words, tmp_path / there)
        assert refused.code == 1 and "is there already" in refused.err
        assert lineage.sha256_of(tmp_path / there) == before
    for there in ("folder", "one.safetensors"):
        swapped = ["extract", sd1_folder, tmp_path / there, "--base-config", sd1_folder, "--output", tmp_path / "x"]
        refused = lora_vision(*swapped)
        assert refused.code == 1 and f"name the tuned model first ({tmp_path / there})" in refused.err


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_extracting_gives_a_baked_adapter_back(family: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(f"{family}_folder")
    base, tuned = load_base(folder), load_base(folder)
    adapter = random_adapter(base)
    bake.bake(tuned, [(adapter, 1.0)])
    for rank in (3, "auto"):
        found = extract(tuned.parts, base.parts, rank)
        assert found.adapter.layers.keys() == adapter.layers.keys()
        for name, factors in adapter.layers.items():
            true = factors.delta()
            assert float((found.adapter.layers[name].delta() - true).norm()) < 1e-5 * float(true.norm()), name
            assert found.errors[name] < 1e-5
    assert not found.left_out


def test_extraction_loses_what_the_discarded_spectrum_says(sd1_folder: Path) -> None:
    base, tuned = load_base(sd1_folder), load_base(sd1_folder)
    adapter = random_adapter(base, rank=6)
    bake.bake(tuned, [(adapter, 1.0)])
    found = extract(tuned.parts, base.parts, 2)
    for name, factors in adapter.layers.items():
        values = torch.linalg.svdvals(factors.delta().double().flatten(1))
        told = float(values[2:].norm() / values.norm())
        assert found.errors[name] == pytest.approx(told, abs=1e-5)
        gap = found.adapter.layers[name].delta() - factors.delta()
        assert float(gap.norm() / factors.delta().norm()) == pytest.approx(told, abs=1e-5)
    clamped = extract(tuned.parts, base.parts, 2, clamp=0.9)
    assert all(clamped.errors[name] >= found.errors[name] - 1e-6 for name in found.errors)
    assert max(clamped.errors.values()) > max(found.errors.values())


def test_what_no_pair_can_hold_is_told_or_stored(sd1_folder: Path) -> None:
    base, tuned = load_base(sd1_folder), load_base(sd1_folder)
    with torch.no_grad():
        for weight in tuned.unet.parameters():
            weight += 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
    found = extract({"unet": tuned.unet}, base.parts, 64)
    assert found.left_out and all(name.endswith((".bias", ".weight")) for name in found.left_out)
    assert "--vectors" in str(found)
    whole = extract({"unet": tuned.unet}, base.parts, 64, vectors=True)
    assert not whole.left_out
    blend = lv.Blend(base.parts)
    blend.load(whole.adapter, "it")
    blend.merge()
    for name, weight in tuned.unet.state_dict().items():
        assert torch.allclose(base.unet.state_dict()[name], weight, atol=1e-6), name


def test_auto_finds_the_rank_under_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(5, 200, generator=generator), torch.randn(100, 5, generator=generator)
    noisy = up @ down + 0.2 * torch.randn(100, 200, generator=generator)
    assert automatic(torch.linalg.svdvals(noisy), (100, 200)) == 5


def test_extract_says_what_does_not_fit(
    lora_vision: Run, sd1_folder: Path, sdxl_folder: Path, sd2_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.safetensors"
    same = lora_vision("extract", sd1_folder, sd1_folder, "--rank", 4, "--output", out)
    assert same.code == 1 and "nothing to extract" in same.err
    other = lora_vision("extract", sdxl_folder, sd1_folder, "--output", out)
    assert other.code == 1 and "not built alike" in other.err
    assert lora_vision("extract", sd2_folder, sd1_folder, "--rank", "many").code == 2
    assert not out.exists()


def test_the_command_extracts_from_a_single_file(lora_vision: Run, sd1_folder: Path, tmp_path: Path) -> None:
    base = load_base(sd1_folder)
    adapter = random_adapter(base, "attention")
    bake.bake(base, [(adapter, 1.0)])
    single = bake.write_file(base, tmp_path / "tuned.safetensors", {})
    out = tmp_path / "back.safetensors"
    words = ["extract", single, sd1_folder, "--rank", 3, "--output", out]  # configured as the folder is
    told = lora_vision(*words, "--json")
    assert told.code == 0, told.err
    assert set(told.json["layers"]) == set(adapter.layers)
    found = lv.load_adapter(out)
    assert found.metadata["lora_vision.base_fingerprint"] == load_base(sd1_folder).fingerprint
    born = lineage.read(found.metadata)
    assert born is not None and [parent["file"] for parent in born.parents] == ["tuned.safetensors", sd1_folder.name]
