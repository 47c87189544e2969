"""Every layer of the real models has one true name, whatever spelling it is met in."""

from __future__ import annotations

import functools

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from lora_vision import names

UNETS = {
    "sd1": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    "sdxl": {
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
TEXTS = {"sd1": (768, 12), "sd2": (1024, 23), "sdxl": (768, 12)}
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 8,
}


@functools.cache
def full_size(family: str) -> dict[str, nn.Module]:
    """The parts of a real-size base, on the meta device."""
    width, depth = TEXTS[family]
    with torch.device("meta"):
        text = CLIPTextModel(CLIPTextConfig(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth))
        parts = {"unet": UNet2DConditionModel(**UNETS[family]), "text_encoder": text}
        if family == "sdxl":
            big = CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20)
            parts["text_encoder_2"] = CLIPTextModelWithProjection(big)
    return parts


@pytest.mark.parametrize("family", UNETS)
def test_every_layer_of_a_real_base_has_a_kohya_name_that_leads_back(family: str) -> None:
    layers = names.index(full_size(family))
    assert all(map(names.known, layers))
    flat = {name: names.to_kohya(name, family == "sdxl") for name in layers}
    assert len(set(flat.values())) == len(layers)
    assert {name: names.from_kohya(spelled or "") for name, spelled in flat.items()} == {name: name for name in layers}
    if family == "sdxl":
        assert not any("down_blocks" in str(spelled) or "mid_block" in str(spelled) for spelled in flat.values())
    classic = {name: names.from_kohya(str(names.to_kohya(name, sdxl=False))) for name in layers}
    assert all(found == name for name, found in classic.items() if not name.startswith("text_encoder"))


@pytest.mark.parametrize("family", UNETS)
def test_shapes_tell_the_family(family: str) -> None:
    layers = names.index(full_size(family))
    shapes = {name: tuple(layer.weight.shape) for name, layer in layers.items() if "attn2" in name}
    assert names.family(shapes) == family
    assert names.family({"vit.encoder.layer.0.output.dense": None}) == "vit"
    assert names.family({"unet.mid_block.attentions.0.proj_in": None}) == "sd"


@pytest.mark.parametrize("family", UNETS)
def test_kernels_are_those_of_the_model(family: str) -> None:
    for name, layer in names.index(full_size(family)).items():
        if kernel := names.kernel(name):
            assert isinstance(layer, nn.Conv2d) and layer.kernel_size == (kernel, kernel), name


@pytest.mark.parametrize(
    ("sgm", "path"),
    [
        ("input_blocks.1.0.in_layers.2", "down_blocks.0.resnets.0.conv1"),
        ("input_blocks.3.0.op", "down_blocks.0.downsamplers.0.conv"),
        ("input_blocks.4.1.proj_in", "down_blocks.1.attentions.0.proj_in"),
        ("input_blocks.8.1.transformer_blocks.9.ff.net.2", "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.2"),
        ("middle_block.2.out_layers.3", "mid_block.resnets.1.conv2"),
        ("middle_block.1.proj_out", "mid_block.attentions.0.proj_out"),
        ("output_blocks.2.2.conv", "up_blocks.0.upsamplers.0.conv"),
        ("output_blocks.5.0.skip_connection", "up_blocks.1.resnets.2.conv_shortcut"),
        ("output_blocks.8.0.emb_layers.1", "up_blocks.2.resnets.2.time_emb_proj"),
        ("label_emb.0.2", "add_embedding.linear_2"),
        ("time_embed.0", "time_embedding.linear_1"),
        ("out.2", "conv_out"),
    ],
)
def test_sgm_names(sgm: str, path: str) -> None:
    assert (names.from_sgm(sgm), names.to_sgm(path)) == (path, sgm)


def test_sgm_upsampler_without_attention_is_the_one_of_sd1() -> None:
    assert names.from_sgm("output_blocks.2.1.conv") == "up_blocks.0.upsamplers.0.conv"
    assert names.from_kohya("lora_unet_output_blocks_2_1_conv") == "unet.up_blocks.0.upsamplers.0.conv"


@pytest.mark.parametrize("wrong", ["input_blocks.3.1.op", "middle_block.3.x", "output_blocks.1.9.conv", "conv_in", ""])
def test_what_is_no_sgm_name(wrong: str) -> None:
    assert names.from_sgm(wrong) is None


VIT = {
    "layers.0.attention.q_proj": "encoder.layer.0.attention.attention.query",
    "vit.layers.11.attention.v_proj": "encoder.layer.11.attention.attention.value",
    "vit.encoder.layer.0.attention.attention.key": "encoder.layer.0.attention.attention.key",
    "deit.layers.0.attention.o_proj": "encoder.layer.0.attention.output.dense",
    "layers.0.mlp.fc1": "encoder.layer.0.intermediate.dense",
    "layers.0.mlp.fc2": "encoder.layer.0.output.dense",
    "layers.0.layernorm_before": "encoder.layer.0.layernorm_before",
    "dinov2.encoder.layer.3.attention.k_proj": "encoder.layer.3.attention.attention.key",
    "encoder.layer.3.mlp.fc1": "encoder.layer.3.mlp.fc1",
    "encoder.layers.0.self_attn.q_proj": "vision_model.encoder.layers.0.self_attn.q_proj",
    "swin.encoder.layers.0.blocks.1.attention.o_proj": "encoder.layers.0.blocks.1.attention.output.dense",
    "blocks.0.attn.qkv": "blocks.0.attn.qkv",
    "layers.0.blocks.0.attn.qkv": "layers.0.blocks.0.attn.qkv",
    "classifier": "classifier",
}


@pytest.mark.parametrize(("path", "expected"), VIT.items())
def test_vit_names_are_classic(path: str, expected: str) -> None:
    assert names.classic("vit", path) == expected
    assert names.classic("vit", expected) == expected


@pytest.mark.parametrize("path", ["text_model.encoder.layers.0.mlp.fc1", "encoder.layers.0.mlp.fc1"])
def test_text_encoder_names_are_classic(path: str) -> None:
    assert names.classic("text_encoder", path) == "text_model.encoder.layers.0.mlp.fc1"
    assert names.classic("text_encoder_2", "text_projection") == "text_projection"


def small_models() -> dict[str, nn.Module]:
    swin = SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=4)
    with torch.device("meta"):
        return {
            "vit": ViTModel(ViTConfig(**SMALL)),
            "vit-head": ViTForImageClassification(ViTConfig(**SMALL)),
            "dinov2": Dinov2ForImageClassification(Dinov2Config(**SMALL)),
            "clip": CLIPVisionModel(CLIPVisionConfig(**SMALL)),
            "swin": SwinForImageClassification(swin),
        }


@pytest.mark.parametrize("kind", ["vit", "vit-head", "dinov2", "clip", "swin"])
def test_models_of_the_installed_transformers_get_classic_names(kind: str) -> None:
    model = small_models()[kind]
    paths = names.paths("vit", model)
    modules = dict(model.named_modules())
    assert len(paths) == sum(
        isinstance(m, nn.Linear | nn.Conv2d | nn.LayerNorm | nn.Embedding) for m in modules.values()
    )
    query = {
        "vit": "vit.encoder.layer.0.attention.attention.query",
        "clip": "vit.vision_model.encoder.layers.0.self_attn.q_proj",
        "swin": "vit.encoder.layers.0.blocks.0.attention.self.query",
    }
    name = query.get(kind.split("-")[0], query["vit"])
    assert isinstance(modules[paths[name]], nn.Linear)
    assert names.index({"vit": model})[name] is modules[paths[name]]
