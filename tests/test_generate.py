"""Pictures are drawn as asked, and can be drawn again from nothing but themselves."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lora_vision.base import RECIPES, load_base
from lora_vision.blend import Blend
from lora_vision.config import GenerateConfig
from lora_vision.errors import AdapterError, BaseModelError, DataError, LoraVisionError
from lora_vision.generate import generate, read_recipe
from lora_vision.regions import Region, composite

Draw = Callable[..., list[Path]]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def differ(one: Path, other: Path) -> bool:
    return not np.array_equal(pixels(one), pixels(other))


@pytest.fixture
def draw(sd1_folder: Path, tmp_path: Path) -> Draw:
    """Draws with the random base; gives the files."""

    def draw(*prompts: str, output: str = "out.png", **settings: object) -> list[Path]:
        values = {"base": str(sd1_folder), "steps": 2, "output": str(tmp_path / output), **settings}
        return [Path(picture["file"]) for picture in generate(GenerateConfig(prompts=prompts, **values))]

    return draw


def again(picture: Path, output: Path) -> Path:
    """The picture drawn once more from its own metadata."""
    settings = {name: tuple(v) if isinstance(v, list) else v for name, v in read_recipe(picture)["config"].items()}
    return Path(generate(GenerateConfig(**settings, output=str(output)))[0]["file"])


def test_one_picture_goes_where_it_is_asked(draw: Draw, tmp_path: Path) -> None:
    assert draw("a fox", output="fox.png") == [tmp_path / "fox.png"]
    assert pixels(tmp_path / "fox.png").shape == (32, 32, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["fox.png"]


def test_picture_is_the_stock_pipelines(draw: Draw, sd1_folder: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(sd1_folder, safety_checker=None)
    generator = torch.Generator("cpu").manual_seed(3)
    stock = pipe("a fox", num_inference_steps=2, guidance_scale=4.0, negative_prompt="red", generator=generator).images[
        0
    ]
    (mine,) = draw("a fox", seed=3, guidance=4.0, negative="red")
    assert np.abs(np.asarray(stock).astype(int) - pixels(mine)).max() <= 1


def test_several_pictures_are_numbered_and_depend_on_their_own_recipe_only(draw: Draw) -> None:
    files = draw("a fox", "a red apple", count=2, seed=5)
    assert [file.name for file in files] == ["out-1.png", "out-2.png", "out-3.png", "out-4.png"]
    recipes = [read_recipe(file)["config"] for file in files]
    told = [(recipe["prompts"], recipe["seed"]) for recipe in recipes]
    assert told == [(["a fox"], 5), (["a fox"], 6), (["a red apple"], 5), (["a red apple"], 6)]
    assert differ(files[0], files[1]) and differ(files[0], files[2])
    (alone,) = draw("a red apple", seed=6, output="alone.png")
    assert not differ(alone, files[3])


def test_a_picture_is_repeated_from_its_metadata_bit_for_bit(
    draw: Draw, sd1_adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    ink, gold = sd1_adapters
    settings = {"adapter": (f"{ink}:0.8", f"{gold}:-0.3"), "negative": "grün", "size": "40x32", "guidance": 2.5}
    for picture in draw("a fox", "ein Fuchs, süß", seed=9, **settings):
        repeated = again(picture, tmp_path / "again.png")
        assert repeated.read_bytes() == picture.read_bytes()


def test_metadata_tells_everything(draw: Draw, sd1_folder: Path, sd1_adapters: tuple[Path, Path]) -> None:
    ink, _ = sd1_adapters
    (picture,) = draw("a fox", seed=4, adapter=(f"{ink}:0.5",), negative="blur")
    recipe = read_recipe(picture)
    guidance = RECIPES["tiny"].guidance
    settled = {"steps": 2, "guidance": guidance, "size": "32x32", "precision": "fp32", "seed": 4, "negative": "blur"}
    assert {name: recipe["config"][name] for name in settled} == settled
    assert recipe["adapters"][0]["scale"] == 0.5
    assert len(recipe["adapters"][0]["sha256"]) == len(recipe["base"]["fingerprint"]) == 64
    assert {"lora_vision", "torch", "diffusers", "transformers"} == set(recipe["versions"])
    lines = Image.open(picture).info["parameters"].splitlines()
    assert lines[:2] == ["a fox <lora:ink:0.5>", "Negative prompt: blur"]
    assert lines[2].startswith(f"Steps: 2, Sampler: DDIM, CFG scale: {guidance}, Seed: 4, Size: 32x32, Model hash: ")


def test_adapters_sound_at_their_scales_and_zero_is_the_base(draw: Draw, sd1_adapters: tuple[Path, Path]) -> None:
    ink, gold = sd1_adapters
    (base,) = draw("a fox", output="base.png")
    drawn = {
        scale: draw("a fox", adapter=(f"{ink}:{scale}",), output=f"{number}.png")[0]
        for number, scale in enumerate((0, 0.1, 1))
    }
    (both,) = draw("a fox", adapter=(str(ink), str(gold)), output="both.png")
    assert not differ(base, drawn[0])
    change = [np.abs(pixels(drawn[scale]) - pixels(base)).sum() for scale in (0, 0.1, 1)]
    assert change[0] < change[1] < change[2]
    assert differ(both, drawn[1])


def test_grid_has_prompts_down_and_adapters_across(draw: Draw, sd1_adapters: tuple[Path, Path], tmp_path: Path) -> None:
    adapters = tuple(map(str, sd1_adapters))
    (grid,) = draw("a fox", "an apple", adapter=adapters, grid=True, output="grid.png")
    columns = [(), adapters[:1], adapters[1:], adapters]
    page = Image.open(grid)
    side, gap = 128, 2
    left, top = page.width - 4 * (side + gap), page.height - 2 * (side + gap)
    for row, prompt in enumerate(["a fox", "an apple"]):
        for column, chosen in enumerate(columns):
            (single,) = draw(prompt, adapter=chosen, output="single.png")
            x, y = left + column * (side + gap), top + row * (side + gap)
            cell = np.asarray(page.crop((x, y, x + side, y + side))).astype(int)
            whole = np.asarray(Image.open(single).resize((side, side), Image.Resampling.BICUBIC)).astype(int)
            assert np.abs(cell - whole).max() <= 2, (prompt, column)  # another order of the sum, another rounding
    assert read_recipe(grid)["config"]["prompts"] == ["a fox", "an apple"]
    assert again(grid, tmp_path / "again.png").read_bytes() == grid.read_bytes()


def test_sdxl_draws_too(tmp_path: Path) -> None:
    from models import tiny_sd

    folder = tiny_sd(tmp_path / "sdxl", "sdxl")
    config = GenerateConfig(prompts=("a fox",), base=str(folder), steps=2, output=str(tmp_path / "out.png"))
    assert generate(config)[0]["base"]["family"] == "sdxl"
    assert pixels(tmp_path / "out.png").shape == (32, 32, 3)


def test_tags_in_prompts_are_adapters(draw: Draw, sd1_adapters: tuple[Path, Path], tmp_path: Path) -> None:
    """``<lora:ink:0.5>`` is the adapter at that scale, taken out of the prompt, and repeated from the picture."""
    ink, gold = sd1_adapters
    folder = str(ink.parent)
    (asked,) = draw("a fox", adapter=(f"{ink}:0.5",), output="asked.png")
    (tagged,) = draw("a fox <lora:ink:0.5>", adapter_dir=folder, output="tagged.png")
    (over,) = draw("<lora:ink:0.5> a  fox", adapter=(f"{ink}:0.9",), output="over.png")
    assert not differ(asked, tagged) and not differ(asked, over)
    assert Image.open(tagged).info["parameters"].splitlines()[0] == "a fox <lora:ink:0.5>"
    assert [voice["name"] for voice in read_recipe(tagged)["adapters"]] == ["ink"]
    assert again(tagged, tmp_path / "again.png").read_bytes() == tagged.read_bytes()
    with pytest.raises(AdapterError, match="no adapter is called 'inc': did you mean ink"):
        draw("a fox <lora:inc:0.5>", adapter_dir=folder)
    with pytest.raises(AdapterError, match="there is no such folder"):
        draw("a fox", adapter_dir=str(tmp_path / "absent"))


def test_what_was_drawn_before_leaves_no_trace(draw: Draw, sd1_adapters: tuple[Path, Path], tmp_path: Path) -> None:
    """Sums are rounded in the order of names, whatever sounded before: a picture depends on its recipe alone."""
    both = "a fox <lora:ink:0.5> <lora:gold:0.7>"
    folder = str(sd1_adapters[0].parent)
    _, second = draw("a fox <lora:ink:1>", both, adapter_dir=folder)
    assert again(second, tmp_path / "again.png").read_bytes() == second.read_bytes()


def test_layers_have_scales_of_their_own(draw: Draw, sd1_adapters: tuple[Path, Path], tmp_path: Path) -> None:
    ink, _ = sd1_adapters
    (base,) = draw("a fox", output="base.png")
    (plain,) = draw("a fox", adapter=(f"{ink}:0.5",), output="plain.png")
    (same,) = draw("a fox", adapter=(f"{ink}:0.1@*=0.5",), output="same.png")
    (part,) = draw("a fox", adapter=(f"{ink}:0.5@unet.up_blocks.*=0",), output="part.png")
    assert not differ(plain, same) and differ(plain, part) and differ(base, part)
    assert again(part, tmp_path / "again.png").read_bytes() == part.read_bytes()
    with pytest.raises(AdapterError, match=r"unet\.up_block\.\*"):
        draw("a fox", adapter=(f"{ink}@unet.up_block.*=0",))


def test_schedules_are_recorded(draw: Draw, sd1_adapters: tuple[Path, Path], tmp_path: Path) -> None:
    ink, gold = map(str, sd1_adapters)
    (base,) = draw("a fox", output="base.png")
    (full,) = draw("a fox", adapter=(ink,), output="full.png")
    drawn = [
        draw("a fox", adapter=(ink,), schedule=(schedule,), output=f"{number}.png")[0]
        for number, schedule in enumerate(["constant:1", "constant:0", "ink=list:1:0"])
    ]
    assert np.abs(pixels(drawn[0]) - pixels(full)).max() <= 1 and not differ(drawn[1], base)
    assert differ(drawn[2], full) and differ(drawn[2], base)
    (both,) = draw("a fox", adapter=(ink, gold), schedule=("klora",), output="both.png")
    (alone,) = draw("a fox", adapter=(ink, f"{gold}:0"), schedule=("klora",), output="alone.png")
    assert not differ(alone, full)  # nobody to share with
    for picture in (drawn[2], both):
        assert again(picture, tmp_path / "again.png").read_bytes() == picture.read_bytes()


def test_regions_and_composition_are_the_blends(
    draw: Draw, sd1_folder: Path, sd1_adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    """What the command line calls regions and composite are the Blend's own, and come back from the picture."""
    ink, gold = sd1_adapters
    folder = str(ink.parent)
    mask = np.zeros((32, 32), np.uint8)
    mask[:, 16:] = 255
    Image.fromarray(mask).save(tmp_path / "right.png")
    halves = ("left=<lora:ink:0.5>", f"{tmp_path / 'right.png'}=an owl <lora:gold:1>")
    (parts,) = draw("a fox", region=halves, adapter_dir=folder, output="parts.png")
    (mean,) = draw("a fox", adapter=(str(ink), str(gold)), how="composite", output="mean.png")
    (both,) = draw("a fox", adapter=(str(ink), str(gold)), output="both.png")

    base = load_base(sd1_folder)
    blend = Blend(base.pipeline())
    blend.load(ink, "ink", scale=0.0)
    blend.load(gold, "gold", scale=0.0)
    left = torch.zeros(32, 32)
    left[:, :16] = 1
    wanted = {
        parts: [Region({"ink": 0.5}, left), Region({"gold": 1.0}, 1 - left, "an owl")],
        mean: composite({"ink": 1.0, "gold": 1.0}),
    }
    for picture, regions in wanted.items():
        blend.set({}, regions=regions)
        generator = torch.Generator("cpu").manual_seed(0)
        guidance = base.recipe.guidance
        drawn = blend.pipe("a fox", num_inference_steps=2, guidance_scale=guidance, generator=generator).images[0]
        assert np.abs(np.asarray(drawn).astype(int) - pixels(picture)).max() <= 1
        assert again(picture, tmp_path / "again.png").read_bytes() == picture.read_bytes()
        assert differ(picture, both)
    recipe = read_recipe(parts)
    assert {voice["name"] for voice in recipe["adapters"]} == {"ink", "gold"}
    assert list(recipe["masks"]) == [str(tmp_path / "right.png")]
    (alone,) = draw("a fox", adapter=(str(ink),), how="composite", output="alone.png")
    (plain,) = draw("a fox", adapter=(str(ink),), output="plain.png")
    assert not differ(alone, plain)
    for how in ("switch", "klora"):
        (one,) = draw("a fox", adapter=(str(ink), str(gold)), how=how, output="one.png")
        (other,) = draw("a fox", adapter=(str(ink), str(gold)), schedule=(how,), output="other.png")
        assert not differ(one, other)


@pytest.mark.parametrize(
    ("region", "said"),
    [
        ("lfet=<lora:ink:1>", "no such mask picture and no such place: did you mean left"),
        ("left", "expected PLACE=PROMPT"),
        ("left= ", "expected PLACE=PROMPT"),
        ("left=<lora:inc:1>", "did you mean ink"),
        ("left=<lora:ink:much>", "cannot be read"),
        ("{ink}=<lora:gold:1>", "this is no picture"),
        ("{black}=<lora:gold:1>", "black all over"),
    ],
)
def test_regions_that_mean_nothing_are_refused(
    draw: Draw, sd1_adapters: tuple[Path, Path], tmp_path: Path, region: str, said: str
) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    text = region.format(ink=sd1_adapters[0], black=tmp_path / "black.png")
    with pytest.raises(AdapterError, match=said):
        draw("a fox", region=(text,), adapter_dir=str(sd1_adapters[0].parent))


def test_a_sweep_is_a_sheet_over_scales(draw: Draw, sd1_adapters: tuple[Path, Path], tmp_path: Path) -> None:
    """Lesson 24 (kohya_ss#2918): one look at an adapter over its weights, instead of one picture for each try."""
    adapters = tuple(map(str, sd1_adapters))
    (page,) = draw("a fox", adapter=adapters, sweep=("ink=0,0.5,...,1", "gold=0,1"), output="sweep.png")
    side, gap = 128, 2
    with Image.open(page) as sheet:
        left, top = sheet.width - 3 * (side + gap), sheet.height - 2 * (side + gap)
        for row, gold in enumerate((0, 1)):
            for column, ink in enumerate((0, 0.5, 1)):
                chosen = (f"{adapters[0]}:{ink}", f"{adapters[1]}:{gold}")
                (single,) = draw("a fox", adapter=chosen, output="single.png")
                x, y = left + column * (side + gap), top + row * (side + gap)
                cell = np.asarray(sheet.crop((x, y, x + side, y + side))).astype(int)
                whole = np.asarray(Image.open(single).resize((side, side), Image.Resampling.BICUBIC)).astype(int)
                assert np.abs(cell - whole).max() <= 2, (ink, gold)
    assert again(page, tmp_path / "again.png").read_bytes() == page.read_bytes()
    with pytest.raises(AdapterError, match="no adapter is called 'gild'"):
        draw("a fox", adapter=adapters, sweep=("gild=0,1",))


def test_what_cannot_work_is_refused_and_leaves_nothing(
    draw: Draw, sd1_adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    ink, _ = sd1_adapters
    (tmp_path / "broken.safetensors").write_bytes(b"not an adapter")
    with pytest.raises(LoraVisionError, match="no folder one can write to"):
        draw("a fox", output="absent/out.png")
    with pytest.raises(AdapterError, match=r"broken\.safetensors"):
        draw("a fox", adapter=(str(tmp_path / "broken.safetensors"),))
    with pytest.raises(BaseModelError, match="no base 'absent'"):
        draw("a fox", base="absent")
    with pytest.raises(LoraVisionError, match="'a fox' with seed 0 holds NaN or infinity in fp32"):
        draw("a fox", adapter=(f"{ink}:1e38",))
    assert [path.name for path in tmp_path.iterdir()] == ["broken.safetensors"]


def test_a_picture_that_was_half_written_is_not_left_behind(
    draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (old,) = draw("a fox")
    before = old.read_bytes()

    def full(self: Path, target: object) -> None:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        draw("an apple")
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
    assert old.read_bytes() == before


def test_recipes_come_from_our_pictures_only(
    draw: Draw, sd1_adapters: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "foreign.png")
    (tmp_path / "text.png").write_text("no picture")
    for name in ("foreign.png", "text.png", "absent.png"):
        with pytest.raises(DataError, match=f"{name} is no picture drawn by"):
            read_recipe(tmp_path / name)
    ink, gold = sd1_adapters
    copy = tmp_path / "ink.safetensors"
    copy.write_bytes(ink.read_bytes())
    (picture,) = draw("a fox", adapter=(str(copy),))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        read_recipe(picture)
        assert not caplog.records
        copy.write_bytes(gold.read_bytes())
        read_recipe(picture)
    assert "is no longer the file that" in caplog.text


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"prompts": ()}, "an empty prompt"),
        ({"prompts": ("a", " ")}, "an empty prompt"),
        ({"output": "out.jpg"}, "--output out.jpg"),
        ({"grid": True, "sweep": ("ink=0,1",)}, "choose one"),
        ({"grid": True, "region": ("left=a",)}, "goes without --grid"),
        ({"how": "composite", "region": ("left=a",)}, "and composite"),
        ({"count": 0}, "--count 0"),
        ({"steps": 0}, "--steps 0"),
        ({"guidance": -1.0}, "--guidance -1.0"),
        ({"guidance": float("nan")}, "--guidance nan"),
        ({"size": "100"}, "--size 100"),
        ({"size": "64x64x64"}, "--size 64x64x64"),
        ({"size": "big"}, "--size big"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(GenerateConfig(prompts=("a fox",)), **wrong)


def test_size_is_one_number_or_two() -> None:
    config = GenerateConfig(prompts=("a fox",))
    assert config.pixels() is None
    assert dataclasses.replace(config, size="64").pixels() == (64, 64)
    assert dataclasses.replace(config, size="64x128").pixels() == (64, 128)
