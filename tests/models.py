"""Seeded random Stable Diffusions of the real classes, small enough to train in a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

Family = Literal["sd1", "sd2", "sdxl"]


def tiny_sd(folder: Path, family: Family = "sd1", seed: int = 0, second: int = 16) -> Path:
    """The folder, holding a random base of this family in the diffusers layout: 32-pixel pictures, 16x16 latents.

    SDXL's second text encoder is `second` wide.
    """
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    parts = {
        "vae": tiny_vae(),
        "unet": tiny_unet(family, second),
        "text_encoder": tiny_text_encoder(tokenizer, gelu="quick_gelu" if family != "sd2" else "gelu"),
        "tokenizer": tokenizer,
        "scheduler": tiny_scheduler("v_prediction" if family == "sd2" else "epsilon"),
    }
    if family == "sdxl":
        parts["text_encoder_2"] = tiny_text_encoder(tokenizer, gelu="gelu", projection=True, width=second)
        parts["tokenizer_2"] = tokenizer
        pipe = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        pipe = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    _wake(parts["unet"], seed)
    pipe.save_pretrained(folder)
    return folder


def tiny_unet(family: Family = "sd1", second: int = 16) -> UNet2DConditionModel:
    """A UNet with one cross-attention block at each end and in the middle."""
    sdxl = family == "sdxl"
    extra = (
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + second,
            "transformer_layers_per_block": (1, 2),
        }
        if sdxl
        else {}
    )
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=16 + second if sdxl else 16,
        attention_head_dim=4,
        use_linear_projection=family != "sd1",
        **extra,
    )


def tiny_vae() -> AutoencoderKL:
    """A VAE of factor 2 with 4 latent channels."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )


def tiny_text_encoder(
    tokenizer: CLIPTokenizer, *, gelu: str = "quick_gelu", projection: bool = False, width: int = 16
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A text encoder with two layers."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        hidden_act=gelu,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def tiny_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that spells: one token for each letter, 16 tokens in all."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.'-"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])
    tokenizer.model_max_length = 16
    return tokenizer


def tiny_scheduler(prediction: str = "epsilon", *, zero_snr: bool = False) -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing="trailing" if zero_snr else "leading",
    )


def _wake(unet: nn.Module, seed: int) -> None:
    """Give every weight a little noise, so that no layer of the random UNet is silent."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in unet.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=noise)


def write_pictures(folder: Path, count: int = 6, *, size: int = 32, captions: bool = True) -> Path:
    """The folder, holding so many small coloured PNG pictures, captioned in metadata.jsonl."""
    from PIL import Image, ImageDraw

    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        colour = (40 * number % 256, 90 * number % 256, 255 - 30 * number % 256)
        picture = Image.new("RGB", (size, size), colour)
        ImageDraw.Draw(picture).ellipse(
            [number, number, size - 4, size - 6], outline="white", fill=(200, 30, colour[0])
        )
        picture.save(folder / f"{number:02}.png")
        rows.append(json.dumps({"file_name": f"{number:02}.png", "text": f"dot {number}"}))
    if captions:
        (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def ldm_checkpoint(pipe: StableDiffusionPipeline | StableDiffusionXLPipeline) -> dict[str, torch.Tensor]:
    """The weights of a tiny_sd under the keys of Stable Diffusion's original checkpoints.

    SD 1 has CLIP as transformers spells it, SD 2 OpenCLIP, SDXL one of each.
    """
    keyed = {}
    for name, weight in pipe.unet.state_dict().items():
        keyed[f"model.diffusion_model.{_renamed(name, UNET_NAMES)}"] = weight
    for name, weight in pipe.vae.state_dict().items():
        new = _renamed(name, VAE_NAMES)
        attention = ".attn_1." in new and weight.ndim == 2
        keyed[f"first_stage_model.{new}"] = weight[:, :, None, None] if attention else weight
    first = pipe.text_encoder.state_dict()
    if isinstance(pipe, StableDiffusionXLPipeline):
        keyed |= _clip(first, "conditioner.embedders.0.transformer.")
        keyed |= _open_clip(pipe.text_encoder_2.state_dict(), "conditioner.embedders.1.model.")
    elif pipe.unet.config.use_linear_projection:
        keyed |= _open_clip(first, "cond_stage_model.model.")
    else:
        keyed |= _clip(first, "cond_stage_model.transformer.")
    return {name: weight.contiguous() for name, weight in keyed.items()}


def _clip(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}text_model.{name.removeprefix('text_model.')}": weight for name, weight in weights.items()}


def _open_clip(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """A text encoder as OpenCLIP spells it: q, k and v in one matrix, the projection transposed."""
    names = {
        "encoder.layers.": "transformer.resblocks.",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        ".fc1.": ".c_fc.",
        ".fc2.": ".c_proj.",
        ".self_attn.": ".attn.",
        "final_layer_norm": "ln_final",
        "embeddings.token_embedding": "token_embedding",
        "embeddings.position_embedding.weight": "positional_embedding",
    }
    keyed, fused = {}, dict[str, list[torch.Tensor]]()
    for name, weight in weights.items():
        name = name.removeprefix("text_model.")
        for old, new in names.items():
            name = name.replace(old, new)
        stem, _, leaf = name.rpartition(".")
        if stem.endswith(("q_proj", "k_proj", "v_proj")):
            place = "qkv".index(stem[-6])
            fused.setdefault(f"{stem[:-6]}in_proj_{leaf}", [weight] * 3)[place] = weight
        elif stem == "text_projection":
            keyed[prefix + stem] = weight.T
        else:
            keyed[prefix + name] = weight
    return keyed | {prefix + name: torch.cat(parts) for name, parts in fused.items()}


RESNET_NAMES = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
UNET_NAMES = {
    "conv_in.": "input_blocks.0.0.",
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "down_blocks.0.downsamplers.0.conv.": "input_blocks.2.0.op.",
    "down_blocks.1.attentions.0.": "input_blocks.3.1.",
    "mid_block.attentions.0.": "middle_block.1.",
    "up_blocks.0.attentions.0.": "output_blocks.0.1.",
    "up_blocks.0.attentions.1.": "output_blocks.1.1.",
    "up_blocks.0.upsamplers.0.conv.": "output_blocks.1.2.conv.",
    **{
        f"{ours}.{old}": f"{theirs}.{new}"
        for ours, theirs in {
            "down_blocks.0.resnets.0": "input_blocks.1.0",
            "down_blocks.1.resnets.0": "input_blocks.3.0",
            "mid_block.resnets.0": "middle_block.0",
            "mid_block.resnets.1": "middle_block.2",
            "up_blocks.0.resnets.0": "output_blocks.0.0",
            "up_blocks.0.resnets.1": "output_blocks.1.0",
            "up_blocks.1.resnets.0": "output_blocks.2.0",
            "up_blocks.1.resnets.1": "output_blocks.3.0",
        }.items()
        for old, new in RESNET_NAMES.items()
    },
}
VAE_NAMES = {
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "mid_block.attentions.0.group_norm.": "mid.attn_1.norm.",
    "mid_block.attentions.0.to_q.": "mid.attn_1.q.",
    "mid_block.attentions.0.to_k.": "mid.attn_1.k.",
    "mid_block.attentions.0.to_v.": "mid.attn_1.v.",
    "mid_block.attentions.0.to_out.0.": "mid.attn_1.proj_out.",
    "conv_norm_out.": "norm_out.",
    "conv_shortcut.": "nin_shortcut.",
    **{f"down_blocks.{block}.resnets.": f"down.{block}.block." for block in range(2)},
    **{f"up_blocks.{block}.resnets.": f"up.{1 - block}.block." for block in range(2)},
    "down_blocks.0.downsamplers.0.conv.": "down.0.downsample.conv.",
    "up_blocks.0.upsamplers.0.conv.": "up.1.upsample.conv.",
}


def _renamed(name: str, names: dict[str, str]) -> str:
    """The name with every part that has another spelling spelt so."""
    for old, new in names.items():
        if name.startswith(old) or (names is VAE_NAMES and f".{old}" in name):
            name = name.replace(old, new)
    return name
