"""What varies while a pipeline runs: schedules, rows, regions; on stock pipelines, with and without guidance."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from kinds import adapter, linear_and_conv, same_state, snapshot
from models import tiny_unet
from torch import Tensor

import lora_vision as lv
from lora_vision import names
from lora_vision.errors import AdapterError
from lora_vision.regions import Region, composite, shares
from lora_vision.schedules import Moment, constant, cosine, linear, listed, switch, window


class Studio:
    """A tiny pipeline with three adapters on its UNet, one of them DoRA and one reaching the text encoder too."""

    def __init__(self, folder: Path) -> None:
        self.pipe: Any = StableDiffusionPipeline.from_pretrained(folder)
        self.pipe.set_progress_bar_config(disable=True)
        self.states = snapshot([self.pipe.unet])
        self.blend = lv.Blend(self.pipe)
        layers = linear_and_conv(names.index(self.blend.parts))
        unet = {name: layer for name, layer in layers.items() if ".attn" in name or "conv1" in name}
        texts = {name: layer for name, layer in layers.items() if "self_attn" in name}
        self.blend.load(adapter(unet, seed=1), "a", scale=0)
        self.blend.load(adapter(unet, "dora-output", seed=2), "b", scale=0)
        self.blend.load(adapter(unet | texts, seed=3), "c", scale=0)

    def draw(self, *prompts: str, steps: int = 3, guidance: float = 3.0, copies: int = 1, seed: int = 0) -> Tensor:
        """Latents [pictures, 4, 16, 16], the same noise for every picture."""
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
        count = len(prompts) * copies
        return self.pipe(  # type: ignore[no-any-return]
            list(prompts),
            num_inference_steps=steps,
            guidance_scale=guidance,
            num_images_per_prompt=copies,
            latents=noise.expand(count, -1, -1, -1).clone(),
            output_type="latent",
        ).images


@pytest.fixture
def studio(sd1_folder: Path) -> Iterator[Studio]:
    with torch.no_grad():
        yield Studio(sd1_folder)


def close(one: Tensor, other: Tensor) -> bool:
    return float((one - other).norm() / other.norm()) < 1e-4


@pytest.mark.parametrize("way", ["rows", "regions", "dropped"])
def test_an_adapter_taken_out_while_weights_vary_leaves_the_others_as_they_are(way: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = tiny_unet()
    layers = linear_and_conv(names.index({"unet": unet}))
    some = {name: layer for name, layer in layers.items() if ".attn1." in name}
    files: dict[str, str | Path] = {name: tmp_path / f"{name}.safetensors" for name in ("a", "b", "c")}
    for seed, (name, path) in enumerate(files.items()):
        lv.save_adapter(adapter(dict(list(some.items())[:3]) if name == "c" else some, seed=seed), path)
    x, states = torch.randn(2, 4, 16, 16), torch.randn(2, 16, unet.config.cross_attention_dim)

    def answer() -> Tensor:
        with torch.no_grad():
            return unet(x, torch.tensor(10), states, return_dict=False)[0]  # type: ignore[no-any-return]

    plain = lv.Blend({"unet": unet})
    plain.register(files)
    wanted = {}
    for name in ("b", "c"):
        plain.set({name: 1.0})
        wanted[name] = answer()
    plain.detach()
    blend = lv.Blend({"unet": unet}, budget=2 * lv.load_adapter(files["a"]).nbytes)
    blend.register(files)
    half = torch.ones(2, 2)
    half[:, 1] = 0
    if way == "regions":
        blend.set({}, regions=[Region({"a": 1.0}, half), Region({"b": 1.0}, 1 - half)])
    else:
        blend.set({"a": [1.0, 0.0], "b": [0.0, 1.0]})
    answer()
    if way == "dropped":
        blend.set({"c": [1.0, 1.0]})  # no room for all three
        assert "a" not in blend.adapters
        assert torch.allclose(answer(), wanted["c"], atol=1e-6)
    blend.set({"b": [1.0, 1.0]})
    if way != "dropped":
        blend.remove("a")
    blend.set({"b": 1.0})
    assert torch.allclose(answer(), wanted["b"], atol=1e-6)


def test_schedules_start_and_end_where_they_say() -> None:
    first, middle, last = Moment(0, 5), Moment(2, 5), Moment(4, 5)
    assert [linear(1, 0)(m) for m in (first, middle, last)] == [1, 0.5, 0]
    assert [round(cosine(0, 2)(m), 9) for m in (first, middle, last)] == [0, 1, 2]
    assert [window(0.3, 0.6)(m) for m in (first, middle, last)] == [0, 1, 0]
    assert [listed([5, 6, 7, 8, 9])(Moment(step, 5)) for step in range(5)] == [5, 6, 7, 8, 9]
    assert [switch(["a", "b"], 2)["b"](Moment(step, 5)) for step in range(5)] == [0, 0, 1, 1, 0]
    assert linear(1, 0)(Moment(0, 1)) == 1


def test_a_constant_schedule_is_no_schedule(studio: Studio) -> None:
    plain = {"a": 0.5, "b": 0.3}
    studio.blend.set(plain)
    expected = studio.draw("dot")
    studio.blend.set(plain, schedule=constant())
    assert close(studio.draw("dot"), expected)
    studio.blend.set({"a": 1.0, "b": 0.6}, schedule=constant(0.5))
    assert close(studio.draw("dot"), expected)
    studio.blend.set({})
    base = studio.draw("dot")
    studio.blend.set(plain, schedule=constant(0))
    assert torch.equal(studio.draw("dot"), base) and not close(expected, base)


def test_a_schedule_follows_the_steps(studio: Studio) -> None:
    seen: list[Moment] = []

    def watched(moment: Moment) -> float:
        seen.append(moment)
        return 1 - moment.progress

    studio.blend.set({"a": 1.0}, schedule=watched)
    studio.draw("dot", steps=4)
    assert [moment.step for moment in seen] == [0, 1, 2, 3] and {moment.steps for moment in seen} == {4}
    seen.clear()
    later = StableDiffusionImg2ImgPipeline.from_pipe(studio.pipe)
    later.set_progress_bar_config(disable=True)
    later("dot", image=torch.zeros(1, 3, 32, 32), strength=0.5, num_inference_steps=4, output_type="latent")
    assert [moment.step for moment in seen] == [2, 3]


def test_steps_are_what_they_would_be_one_by_one(studio: Studio) -> None:
    """A schedule equals changing the weight by hand between the steps."""
    values = [1.0, 0.0, -0.5]
    studio.blend.set({"a": 1.0, "b": 1.0}, schedule={"a": listed(values)})
    scheduled = studio.draw("dot")

    def by_hand(pipe: Any, step: int, timestep: int, state: dict[str, Any]) -> dict[str, Any]:
        if step + 1 < len(values):
            studio.blend.set({"a": values[step + 1], "b": 1.0})
        return {}

    studio.blend.set({"a": values[0], "b": 1.0})
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent", "latents": noise}
    assert close(studio.pipe("dot", callback_on_step_end=by_hand, **options).images, scheduled)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_rows_equal_one_by_one(studio: Studio, guidance: float) -> None:
    rows = [{"a": 0.5}, {"b": 0.8, "a": 0.1}, {}]
    ones = []
    for row in rows:
        studio.blend.set(row)
        ones.append(studio.draw("dot", guidance=guidance))
    together = {name: [row.get(name, 0.0) for row in rows] for name in ("a", "b")}
    studio.blend.set(together)
    prompts = studio.draw("dot", "dot", "dot", guidance=guidance)
    copies = studio.draw("dot", guidance=guidance, copies=3)
    assert all(close(one, row[None]) for one, row in zip(ones, prompts, strict=True))
    assert all(close(one, row[None]) for one, row in zip(ones, copies, strict=True))
    assert close(studio.draw("dot", "dot", "dot", guidance=guidance, copies=2)[2:3], ones[1])
    with pytest.raises(AdapterError, match="batch of"):
        studio.draw("dot", "dot", guidance=guidance)


def test_rows_reach_the_text_encoder(studio: Studio) -> None:
    studio.blend.set({"c": {"unet": 0.0, "text_encoder": 1.0}})
    told = studio.draw("dot")
    studio.blend.set({})
    base = studio.draw("dot")
    studio.blend.set({"c": [{"unet": 0.0}, 0.0]})
    both = studio.draw("dot", "dot")
    assert close(both[:1], told) and close(both[1:], base) and not close(told, base)


def test_masks_share_the_picture() -> None:
    left = torch.zeros(32, 32)
    left[:, :16] = 1
    share = shares([Region({}, left), Region({}, None)], 8, 8)
    assert torch.equal(share.sum(0), torch.ones(8, 8))
    assert share[0, :, :4].eq(1).all() and share[0, :, 4:].eq(0).all()
    three = shares([Region({}, torch.ones(1, 1)), Region({}, torch.full((2, 2), 3.0))], 5, 7)
    assert torch.allclose(three[1], torch.tensor(0.75))
    with pytest.raises(AdapterError, match="no region"):
        shares([Region({}, left)], 8, 8)


def test_a_region_everywhere_is_the_plain_blend(studio: Studio) -> None:
    studio.blend.set({"a": 0.5})
    expected = studio.draw("dot")
    studio.blend.set({}, regions=[Region({"a": 0.5}, torch.ones(4, 4))])
    assert close(studio.draw("dot"), expected)


def test_regions_average_the_predictions_of_their_blends(studio: Studio) -> None:
    unet, x, t = studio.pipe.unet, torch.randn(2, 4, 16, 16), torch.tensor(300)
    states = torch.randn(2, 16, 16)
    left = torch.zeros(16, 16)
    left[:, :8] = 1
    ones = []
    for blend in ({"a": 0.7}, {"b": 0.5}, {"a": -0.2}):
        studio.blend.set(blend)
        ones.append(unet(x, t, states).sample)
    studio.blend.set({"a": -0.2}, regions=[Region({"a": 0.7}, left)])
    assert close(unet(x, t, states).sample, torch.where(left.bool(), ones[0], ones[2]))
    studio.blend.set({}, regions=composite({"a": 0.7, "b": 0.5}))
    assert close(unet(x, t, states, return_dict=False)[0], (ones[0] + ones[1]) / 2)
    studio.blend.set({"b": 0.5})
    assert close(unet(x, t, states).sample, ones[1])


def test_regions_without_adapters_are_the_base(studio: Studio) -> None:
    base = studio.draw("dot")
    left = torch.zeros(4, 4)
    left[:, :2] = 1
    for scales in ({}, {"a": 0.0}):
        studio.blend.set({}, regions=[Region(scales, left), Region(scales, 1 - left)])
        assert close(studio.draw("dot"), base)
    layers = linear_and_conv(names.index({"unet": studio.pipe.unet}))
    studio.blend.detach()
    studio.blend = lv.Blend(studio.pipe, capacity=4)
    studio.blend.load(adapter(layers, seed=1), "a", scale=0.0)
    studio.blend.set({"a": 0.7}, regions=[Region({}, torch.ones(4, 4))])
    assert close(studio.draw("dot"), base)


def test_what_varies_may_begin_in_inference_mode(studio: Studio) -> None:
    studio.blend.set({"a": [0.5, -0.2], "b": [0.0, 0.7]})
    with torch.inference_mode():
        first = studio.draw("dot", "line")
    assert close(studio.draw("dot", "line"), first.clone())


def test_a_region_may_have_its_own_prompt(studio: Studio) -> None:
    everywhere = torch.ones(4, 4)
    studio.blend.set({"a": 0.5})
    expected = studio.draw("line")
    studio.blend.set({}, regions=[Region({"a": 0.5}, everywhere, "line")])
    assert close(studio.draw("dot"), expected) and not close(studio.draw("dot", guidance=1.0), expected)
    studio.blend.set({"c": 1.0})
    with_text = studio.draw("line")
    studio.blend.set({}, regions=[Region({"c": 1.0}, everywhere, "line")])
    one = studio.draw("dot")
    assert not close(one, expected) and one.isfinite().all() and with_text.isfinite().all()


def test_what_cannot_vary_is_refused(studio: Studio) -> None:
    blend = studio.blend
    blend.set({"a": 0.5})
    look = studio.draw("dot")
    for wrong, options, says in (
        ({"a": [1, 2], "b": [1, 2, 3]}, {}, "one length"),
        ({"a": []}, {}, "one length"),
        ({"a": 1}, {"schedule": {"z": constant()}}, "no adapter called 'z'"),
        ({}, {"regions": [Region({"a": 1}, torch.zeros(4, 4))]}, "not all zero"),
        ({"a": [1, 2]}, {"regions": [Region({"a": 1})]}, "no regions beside"),
    ):
        with pytest.raises(AdapterError, match=says):
            blend.set(wrong, **options)  # type: ignore[arg-type]
    blend.merge()
    with pytest.raises(AdapterError, match="a cannot be merged and vary"):
        blend.set({"a": 0.5}, schedule=constant())
    blend.restore()
    assert torch.equal(studio.draw("dot"), look)
    blend.detach()
    assert same_state(studio.states[0], studio.pipe.unet.state_dict())
    assert not studio.pipe.unet._forward_pre_hooks and not studio.pipe.unet._forward_hooks


def test_a_schedule_without_a_pipeline_is_refused(studio: Studio) -> None:
    studio.blend.detach()
    loose = lv.Blend({"unet": studio.pipe.unet})
    loose.load(adapter(linear_and_conv(names.index(loose.parts))), "a")
    with pytest.raises(AdapterError, match="needs a scheduler"):
        loose.set({"a": 1.0}, schedule=constant())
    with pytest.raises(AdapterError, match="needs a pipeline"):
        loose.set({}, regions=[Region({"a": 1.0}, None, "dot")])
