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


def tiny_sd(folder: Path, family: Family = "sd1", seed: int = 0) -> Path:
    """The folder, holding a random base of this family in the diffusers layout: 32-pixel pictures, 16x16 latents."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    parts = {
        "vae": tiny_vae(),
        "unet": tiny_unet(family),
        "text_encoder": tiny_text_encoder(tokenizer, gelu="quick_gelu" if family != "sd2" else "gelu"),
        "tokenizer": tokenizer,
        "scheduler": tiny_scheduler("v_prediction" if family == "sd2" else "epsilon"),
    }
    if family == "sdxl":
        parts["text_encoder_2"] = tiny_text_encoder(tokenizer, gelu="gelu", projection=True)
        parts["tokenizer_2"] = tokenizer
        pipe = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        pipe = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    _wake(parts["unet"], seed)
    pipe.save_pretrained(folder)
    return folder


def tiny_unet(family: Family = "sd1") -> UNet2DConditionModel:
    """A UNet with one cross-attention block at each end and in the middle."""
    sdxl = family == "sdxl"
    extra = (
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 16,
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
        cross_attention_dim=32 if sdxl else 16,
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
    tokenizer: CLIPTokenizer, *, gelu: str = "quick_gelu", projection: bool = False
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A text encoder 16 wide with two layers."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        hidden_act=gelu,
        projection_dim=16,
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
