"""The embedded base and the bundled picture sets: what is shipped is whole, and prompts are followed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from transformers import CLIPTextModel, CLIPTokenizer

import lora_vision
from lora_vision.base import EMBEDDED, Base, load_base
from lora_vision.data import read_pictures
from lora_vision.tiny.subjects import COLOURS, HELD_OUT_STYLES, STYLE_SET_SUBJECTS, SUBJECTS, caption

PACKAGE = Path(lora_vision.__file__).parent
SETS = sorted(folder for folder in (PACKAGE / "pictures").iterdir() if folder.is_dir())


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base("tiny")


def test_the_base_is_made_of_the_real_classes_and_small() -> None:
    folder = PACKAGE / "tiny" / "base"
    assert sum(file.stat().st_size for file in folder.rglob("*")) <= 40_000_000
    pipe: Any = StableDiffusionPipeline.from_pretrained(folder)
    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    assert all(type(getattr(pipe, name)) is kind for name, kind in kinds.items())
    assert isinstance(pipe.tokenizer, CLIPTokenizer)


def test_the_text_encoder_is_spelt_so_that_every_transformers_finds_it() -> None:
    with safe_open(EMBEDDED["tiny"] / "text_encoder" / "model.safetensors", framework="pt") as file:
        assert all(name.startswith("text_model.") for name in file.keys())  # noqa: SIM118


def test_every_prompt_the_base_knows_fits_its_tokenizer(base: Base) -> None:
    tokenizer = base.tokenizers["text_encoder"]
    for noun in SUBJECTS:
        longest = caption(noun, colour="orange", background="yellow", style="silhouette")
        ids = tokenizer(longest).input_ids
        assert len(ids) <= tokenizer.model_max_length
        assert tokenizer.unk_token_id not in ids[1:-1]
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ,", ",") == longest


def test_pictures_follow_the_prompt(base: Base) -> None:
    grounds = ("blue", "red", "green", "yellow")
    made = base.pipeline()(
        [caption("fox", background=ground) for ground in grounds],
        num_inference_steps=10,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(5) for _ in grounds],
        output_type="pt",
    ).images
    assert made.shape == (4, 3, 64, 64) and made.isfinite().all()
    corners = torch.cat([made[..., y, x].flatten(2) for y in (slice(5), slice(-5, None)) for x in (slice(5),)], -1)
    palette = torch.tensor([(255, 255, 255), *COLOURS.values()]) / 255
    nearest = torch.cdist(corners.median(-1).values, palette).argmin(1)
    assert [("white", *COLOURS)[number] for number in nearest.tolist()] == list(grounds)


def test_the_vae_gives_the_bundled_pictures_back(base: Base) -> None:
    for folder in SETS:
        files = sorted(folder.glob("*.png"))
        pictures = [Image.open(file).convert("RGB").resize((64, 64), Image.Resampling.BOX) for file in files]
        pixels = torch.stack([torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8) for p in pictures])
        real = pixels.view(-1, 64, 64, 3).permute(0, 3, 1, 2) / 127.5 - 1
        latents, _ = base.encode_pictures(real)
        error = ((base.decode(latents) - real) / 2).square().mean((1, 2, 3))
        psnr = (-10 * error.log10()).mean().item()
        assert psnr > 24, (folder.name, psnr)


@pytest.mark.parametrize("folder", SETS, ids=lambda folder: folder.name)
def test_each_bundled_set_is_whole_and_holds_no_subject_kept_for_measuring(folder: Path) -> None:
    assert folder.name in HELD_OUT_STYLES
    assert "Apache License" in (folder / "LICENSE").read_text(encoding="utf-8")
    found = read_pictures(folder)
    captions = {item.caption for item in (*found.train, *found.held_out)}
    assert captions == {caption(noun) for noun in STYLE_SET_SUBJECTS}
    assert len(captions) >= 36


def test_at_least_two_sets_and_forty_subjects_for_measuring() -> None:
    assert len(SETS) >= 2
    assert len(SUBJECTS) - len(STYLE_SET_SUBJECTS) >= 40 and len(SUBJECTS) >= 150
