"""diffusers itself, through PEFT, loads what we write; and we load what it writes. Same latents, same weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapters import Maker
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from models import tiny_sd
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from lora_vision import names
from lora_vision.adapter import Adapter
from lora_vision.factors import LowRank
from lora_vision.files import load_adapter, save_adapter
from lora_vision.inject import attach, detach


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: tiny_sd(tmp_path_factory.mktemp(family), family) for family in ("sd1", "sd2", "sdxl")}


def pipeline(folder: Path) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def parts(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    found = {part: getattr(pipe, part, None) for part in ("unet", "text_encoder", "text_encoder_2")}
    return {part: model for part, model in found.items() if model is not None}


def wider_unet(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The same with two layers a block and three blocks, as all SDXL UNets have and sgm names count on."""
    torch.manual_seed(0)
    return UNet2DConditionModel.from_config(
        unet.config,
        layers_per_block=2,
        block_out_channels=(16, 16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
    )


def latents(pipe: DiffusionPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}
    return pipe("a red dot", generator=generator, **shape).images


def assert_same_latents(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp(min=1)


def random_adapter(pipe: DiffusionPipeline, *, convs: bool = False, ranks: tuple[int, ...] = (4,)) -> Adapter:
    """LoRA on the attention of all parts (and the resnets), alpha and rank differing from layer to layer."""
    make, layers = Maker(), {}
    for name, layer in names.index(parts(pipe)).items():
        rank = ranks[len(layers) % len(ranks)]
        shape = tuple(layer.weight.shape)
        attention = name.endswith(("to_q", "to_k", "to_v", "to_out.0", "q_proj", "out_proj", "proj_in"))
        if not (attention or (convs and name.endswith(("conv1", "conv_shortcut", "time_emb_proj")))):
            continue
        down = make.tensor(rank, *shape[1:]) / shape[1] ** 0.5
        up = make.tensor(shape[0], rank, *(1,) * (len(shape) - 2)) / 4
        layers[name] = LowRank(down, up, float(rank) * (0.5 if len(layers) % 2 else 1.2))
    return Adapter(layers)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_diffusers_draws_the_same_with_what_we_write(
    family: str, format: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    pipe = pipeline(folders[family])
    if (format, family) == ("kohya", "sdxl"):
        pipe.unet = wider_unet(pipe.unet)
    before = latents(pipe)
    adapter = random_adapter(pipe, ranks=(4, 2) if format == "diffusers" else (4,), convs=format == "diffusers")
    if format == "kohya":  # diffusers keeps one alpha for all layers of such a file
        adapter = Adapter({name: LowRank(f.down, f.up, 2.0) for name, f in adapter.layers.items()})
    attach(parts(pipe), adapter)
    ours = latents(pipe)
    detach(parts(pipe))
    assert torch.equal(latents(pipe), before)
    path = save_adapter(adapter, tmp_path / "pytorch_lora_weights.safetensors", format)
    pipe.load_lora_weights(tmp_path, weight_name=path.name)
    theirs = latents(pipe)
    assert (ours - before).abs().max() > 0.05, "the adapter does something"
    assert_same_latents(ours, theirs)


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("dora", [True, False])
def test_we_load_what_diffusers_writes(header: bool, dora: bool, folders: dict[str, Path], tmp_path: Path) -> None:
    pipe = pipeline(folders["sd1"])
    torch.manual_seed(0)
    alpha = 3 if header else 4
    config = LoraConfig(
        r=4, lora_alpha=alpha, target_modules=["to_q", "to_out.0", "conv1"], use_dora=dora, init_lora_weights=False
    )
    pipe.unet.add_adapter(config)
    text = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    pipe.text_encoder.add_adapter(text)
    theirs = latents(pipe)
    metadata = {"unet_lora_adapter_metadata": config.to_dict(), "text_encoder_lora_adapter_metadata": text.to_dict()}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(pipe.text_encoder),
        **(json.loads(json.dumps(metadata, default=list)) if header else {}),
    )
    clean = pipeline(folders["sd1"])
    attach(parts(clean), load_adapter(tmp_path))
    assert_same_latents(latents(clean), theirs)


def test_we_load_what_diffusers_writes_for_sdxl(folders: dict[str, Path], tmp_path: Path) -> None:
    pipe = pipeline(folders["sdxl"])
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        encoder.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], init_lora_weights=False))
    theirs = latents(pipe)
    layers = {f"{part}_lora_layers": get_peft_model_state_dict(model) for part, model in parts(pipe).items()}
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, **layers)
    clean = pipeline(folders["sdxl"])
    attach(parts(clean), load_adapter(tmp_path))
    assert_same_latents(latents(clean), theirs)
