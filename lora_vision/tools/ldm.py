"""The keys of Stable Diffusion's original checkpoints (LDM, sgm), which A1111 and ComfyUI open, for whole models.

Written from the code of those models: where ``input_blocks.4.1`` stands follows from the UNet's own blocks, so that
UNets of any depth are spelt right. diffusers has the opposite direction only (``from_single_file``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_vision import names
from lora_vision.base import Base

_UNET_MIDDLE = {
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_VAE = (  # applied in this order
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.group_norm\.", "mid.attn_1.norm."),
    (r"mid_block\.attentions\.0\.to_([qkv])\.", r"mid.attn_1.\1."),
    (r"mid_block\.attentions\.0\.to_out\.0\.", "mid.attn_1.proj_out."),
    (r"down_blocks\.(\d+)\.resnets\.(\d+)\.", r"down.\1.block.\2."),
    (r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample."),
    (r"conv_norm_out\.", "norm_out."),
    (r"conv_shortcut\.", "nin_shortcut."),
)
_OPEN_CLIP = {
    "embeddings.token_embedding": "token_embedding",
    "final_layer_norm": "ln_final",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_CLIP_PREFIX = {
    ("sd1", "text_encoder"): "cond_stage_model.transformer.",
    ("sd2", "text_encoder"): "cond_stage_model.model.",
    ("sdxl", "text_encoder"): "conditioner.embedders.0.transformer.",
    ("sdxl", "text_encoder_2"): "conditioner.embedders.1.model.",
}


def checkpoint(base: Base) -> dict[str, Tensor]:
    """All weights of a Stable Diffusion under the keys of an original checkpoint."""
    found: dict[str, Tensor] = {}
    for key, weight in base.unet.state_dict().items():
        found[f"model.diffusion_model.{_renamed(key, dict(unet_stems(base.unet)))}"] = weight
    for key, weight in base.vae.state_dict().items():
        new = vae_key(key, len(base.vae.config.block_out_channels))
        found[f"first_stage_model.{new}"] = weight[:, :, None, None] if _flat_attention(new, weight) else weight
    for part, encoder in base.parts.items():
        if part != "unet":
            prefix = _CLIP_PREFIX[base.family, part]
            states = {names.classic(part, key): weight for key, weight in encoder.state_dict().items()}
            told = open_clip(states) if prefix.endswith("model.") else states
            found |= {f"{prefix}{key}": weight for key, weight in told.items()}
    return {key: weight.contiguous() for key, weight in found.items()}


def unet_stems(unet: Any) -> Iterator[tuple[str, str]]:
    """Each block of a UNet with its original name: ``down_blocks.1.attentions.0`` and ``input_blocks.4.1``."""
    yield from (names.SGM_TOP | _UNET_MIDDLE).items()
    number = 1
    for at, block in enumerate(unet.down_blocks):
        for layer in range(len(block.resnets)):
            yield from _layer(f"down_blocks.{at}", layer, f"input_blocks.{number}", block)
            number += 1
        if block.downsamplers is not None:
            yield f"down_blocks.{at}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
            number += 1
    number = 0
    for at, block in enumerate(unet.up_blocks):
        for layer in range(len(block.resnets)):
            yield from _layer(f"up_blocks.{at}", layer, f"output_blocks.{number}", block)
            number += 1
        if block.upsamplers is not None:
            place = 2 if _attends(block) else 1
            yield f"up_blocks.{at}.upsamplers.0.conv", f"output_blocks.{number - 1}.{place}.conv"


def _layer(ours: str, layer: int, theirs: str, block: nn.Module) -> Iterator[tuple[str, str]]:
    yield f"{ours}.resnets.{layer}", f"{theirs}.0"
    if _attends(block):
        yield f"{ours}.attentions.{layer}", f"{theirs}.1"


def _attends(block: nn.Module) -> bool:
    return bool(getattr(block, "attentions", None))


def _renamed(key: str, stems: Mapping[str, str]) -> str:
    """A UNet key under its original name."""
    parts = key.split(".")
    for length in range(len(parts) - 1, 0, -1):
        stem = ".".join(parts[:length])
        if stem in stems:
            rest = parts[length:]
            if ".resnets." in stem:
                rest[0] = names.SGM_RESNET[rest[0]]
            return ".".join([stems[stem], *rest])
    raise KeyError(f"{key} has no place in an original Stable Diffusion checkpoint")


def vae_key(key: str, levels: int) -> str:
    """A VAE key under its original name.

    Args:
        key: As diffusers spells it.
        levels: Number of resolutions; the original numbers the decoder's from the last.
    """
    for pattern, new in _VAE:
        key = re.sub(pattern, new, key)
    block = re.match(r"decoder\.up_blocks\.(\d+)\.(?:resnets\.(\d+)|(upsamplers)\.0)\.", key)
    if block is None:
        return key
    place = f"decoder.up.{levels - 1 - int(block[1])}."
    return place + ("upsample." if block[3] else f"block.{block[2]}.") + key[block.end() :]


def _flat_attention(key: str, weight: Tensor) -> bool:
    """Whether this is a linear projection of the VAE's attention, which the original has as a 1x1 convolution."""
    return ".attn_1." in key and weight.dim() == 2


def open_clip(states: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a CLIP text encoder as OpenCLIP names them; q, k and v are one matrix there."""
    found: dict[str, Tensor] = {}
    for key, weight in states.items():
        path = key.removeprefix("text_model.")
        if path == "text_projection.weight":
            found["text_projection"] = weight.t()
        elif path == "embeddings.position_embedding.weight":
            found["positional_embedding"] = weight
        elif match := re.match(r"(.+self_attn)\.q_proj\.(weight|bias)$", path):
            three = [states[key.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            place = match[1].replace("encoder.layers", "transformer.resblocks").replace("self_attn", "attn")
            found[f"{place}.in_proj_{match[2]}"] = torch.cat(three)
        elif not re.search(r"self_attn\.[kv]_proj|position_ids", path):
            for ours, theirs in _OPEN_CLIP.items():
                path = path.replace(ours, theirs)
            found[path.replace("encoder.layers", "transformer.resblocks")] = weight
    return found
