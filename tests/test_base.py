"""Bases: each kind is recognised, computes as the stock pipeline does, and what is no Stable Diffusion is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from models import Family, ldm_checkpoint, tiny_sd, write_pictures
from safetensors.torch import load_file, save_file

from lora_vision.base import RECIPES, Base, fingerprint_of, load_base
from lora_vision.errors import BaseModelError
from lora_vision.targets import SETS


@pytest.fixture(scope="module")
def sd2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("sd2"), "sd2")


@pytest.fixture(scope="module")
def base(sd1_folder: Path) -> Base:
    return load_base(sd1_folder)


def test_families_are_recognised(sd1_folder: Path, sd2_folder: Path, sdxl_folder: Path) -> None:
    for folder, family, prediction in (
        (sd1_folder, "sd1", "epsilon"),
        (sd2_folder, "sd2", "v_prediction"),
        (sdxl_folder, "sdxl", "epsilon"),
    ):
        base = load_base(folder)
        encoders = ["text_encoder", "text_encoder_2"] if family == "sdxl" else ["text_encoder"]
        assert (base.family, base.prediction, base.factor) == (family, prediction, 2)
        assert list(base.parts) == ["unet", *encoders] and list(base.tokenizers) == encoders
        for module in (*base.parts.values(), base.vae):
            assert not module.training and not any(weight.requires_grad for weight in module.parameters())


def test_recipes_name_layers_that_exist(base: Base) -> None:
    assert base.recipe is RECIPES["tiny"]
    for recipe in RECIPES.values():
        assert set(recipe.targets.split("+")) <= set(SETS)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_text_states_and_pictures_are_the_stock_pipelines(family: str, sd1_folder: Path, sdxl_folder: Path) -> None:
    folder = sd1_folder if family == "sd1" else sdxl_folder
    base, stock = load_base(folder), DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    captions = ["a fox", "dot"]
    text = base.encode_text(captions)
    wanted = stock.encode_prompt(captions, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    assert torch.equal(text.states, wanted[0])
    assert text.pooled is None or torch.equal(text.pooled, wanted[2])
    options = {"num_inference_steps": 2, "output_type": "latent"}
    pipe = base.pipeline()
    ours = pipe("a fox", generator=torch.Generator().manual_seed(0), **options).images
    theirs = stock("a fox", generator=torch.Generator().manual_seed(0), **options).images
    assert torch.equal(ours, theirs)
    assert pipe.unet is base.unet and pipe.vae is base.vae
    assert isinstance(pipe, StableDiffusionPipeline if family == "sd1" else StableDiffusionXLPipeline)
    pixels = base.decode(ours)
    assert pixels.shape == (1, 3, 32, 32) and pixels.abs().max() <= 1
    assert torch.equal(pixels, stock.vae.decode(ours / stock.vae.config.scaling_factor).sample.clamp(-1, 1))


def test_the_fingerprint_is_of_the_weights_whatever_their_dtype(sd1_folder: Path, base: Base) -> None:
    assert load_base(sd1_folder, dtype=torch.float16).fingerprint == base.fingerprint
    assert load_base(sd1_folder).fingerprint == base.fingerprint


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_the_fingerprint_tells_any_changed_layer(sd1_folder: Path, base: Base, part: str) -> None:
    other = load_base(sd1_folder)
    modules = {**other.parts, "vae": other.vae}
    weight = list(modules[part].parameters())[-1]
    weight += 0.01
    assert fingerprint_of(modules) != base.fingerprint


def test_dtype_and_device_reach_every_part(sd1_folder: Path) -> None:
    base = load_base(sd1_folder, dtype=torch.bfloat16)
    assert {part.dtype for part in (*base.parts.values(), base.vae)} == {torch.bfloat16}
    base = base.to("cpu", torch.float32)
    assert {part.dtype for part in (*base.parts.values(), base.vae)} == {torch.float32}
    assert base.device == torch.device("cpu")


def test_half_precision_files_are_found(sd1_folder: Path, tmp_path: Path, base: Base) -> None:
    pipe = load_base(sd1_folder, dtype=torch.float16).pipeline()
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    assert load_base(tmp_path).fingerprint == base.fingerprint


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_single_checkpoint_is_the_same_base(family: Family, tmp_path: Path) -> None:
    """The original keys of each family; diffusers tells SDXL's encoders apart by their widths."""
    folder = tiny_sd(tmp_path / "folder", family, second=24)
    base = load_base(folder)
    save_file(ldm_checkpoint(base.pipeline()), tmp_path / "model.safetensors")
    single = load_base(tmp_path / "model.safetensors", config=folder)
    assert (single.family, single.prediction) == (family, base.prediction)
    assert single.fingerprint == base.fingerprint
    found, wanted = (each.encode_text(["a fox"]) for each in (single, base))
    assert torch.equal(found.states, wanted.states)
    assert wanted.pooled is None or torch.equal(found.pooled, wanted.pooled)
    assert not any(weight.requires_grad for part in single.parts.values() for weight in part.parameters())


def test_a_single_checkpoint_without_its_configuration_says_what_to_do(base: Base, tmp_path: Path) -> None:
    save_file(ldm_checkpoint(base.pipeline()), tmp_path / "model.safetensors")
    with pytest.raises(BaseModelError, match=r"needs the configuration and tokenizer .* \(--base-config\)"):
        load_base(tmp_path / "model.safetensors")


def refusal(name: str | Path) -> str:
    with pytest.raises(BaseModelError) as caught:
        load_base(name)
    message = str(caught.value)
    assert "expected" in message
    return message


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "there is no base 'tinny', did you mean tiny?" in refusal("tinny")
    assert "there is no base" in refusal(tmp_path / "absent")
    assert "there is no base" in refusal("absent.safetensors")
    assert "nothing on the Hub" in refusal("nobody/no-such-model")


def test_files_that_are_no_checkpoint_are_refused(tmp_path: Path, sd1_adapters: tuple[Path, Path]) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"not safetensors")
    assert "is not a safetensors file" in refusal(tmp_path / "a.safetensors")
    assert "looks like an adapter" in refusal(sd1_adapters[0])
    save_file({"vit.encoder.weight": torch.zeros(2)}, tmp_path / "vit.safetensors")
    assert "no LDM UNet in it" in refusal(tmp_path / "vit.safetensors")
    keys = ["model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.model.ln_final.weight"]
    save_file({key: torch.zeros(2) for key in keys}, tmp_path / "refiner.safetensors")
    assert "refiner" in refusal(tmp_path / "refiner.safetensors")


def test_folders_of_something_else_are_refused(tmp_path: Path, sd1_folder: Path) -> None:
    assert "no readable model_index.json" in refusal(write_pictures(tmp_path / "pictures", 4))
    flux = tmp_path / "flux"
    flux.mkdir()
    parts = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (flux / "model_index.json").write_text(json.dumps(parts))
    assert "is not a Stable Diffusion: a FluxPipeline whose unet is missing" in refusal(flux)
    holed = tmp_path / "holed"
    shutil.copytree(sd1_folder, holed)
    (holed / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert "cannot be loaded: vae: " in refusal(holed)
    shutil.rmtree(holed / "unet")
    told = refusal(holed)
    assert "cannot be loaded: it has no unet/config.json" in told and told.count("expected") == 1


def changed(folder: Path, target: Path, part: str, **values: object) -> Path:
    """A copy of the folder with another configuration of one part."""
    shutil.copytree(folder, target)
    file = next((target / part).glob("*config.json"))
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return target


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_a_part_that_lacks_weights_is_refused(tmp_path: Path, sd1_folder: Path, part: str) -> None:
    """Libraries draw what is missing at random, and go on."""
    folder = shutil.copytree(sd1_folder, tmp_path / "base")
    (file,) = (folder / part).glob("*.safetensors")
    weights = load_file(file)
    lost = sorted(weights)[0]
    save_file({name: weight for name, weight in weights.items() if name != lost}, file, {"format": "pt"})
    with pytest.raises(BaseModelError, match=rf"{part} lacks 1 of its weights \(.*{lost}"):
        load_base(folder)


def test_models_of_another_purpose_are_refused(tmp_path: Path, sd1_folder: Path) -> None:
    inpaint = changed(sd1_folder, tmp_path / "inpaint", "unet", in_channels=9)
    weights = load_file(inpaint / "unet" / "diffusion_pytorch_model.safetensors")
    weights["conv_in.weight"] = torch.zeros(16, 9, 3, 3)
    save_file(weights, inpaint / "unet" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    assert "takes 9 latent channels and its VAE gives 4" in refusal(inpaint)
    sample = changed(sd1_folder, tmp_path / "sample", "scheduler", prediction_type="sample")
    assert "predicting 'sample'" in refusal(sample)


def test_the_embedded_base_is_a_stable_diffusion_for_small_pictures() -> None:
    base = load_base("tiny")
    assert base.source == "tiny" and base.recipe is RECIPES["tiny"]
    assert base.unet.config.sample_size * base.factor == base.recipe.resolution
