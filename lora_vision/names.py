"""A layer's one true name, and every other way the tools spell it.

A true name is `<part>.<path>`: the part is `unet`, `text_encoder`, `text_encoder_2` or `vit`, the path is how classic
checkpoints spell the module. Three other spellings exist, and this file alone knows them:

- module paths of the installed transformers (5 drops `text_model.` from CLIPTextModel and renames ViT layers),
- sgm/LDM paths of the original Stable Diffusion code (`input_blocks.4.1...`), which SDXL adapter files use,
- kohya's flat names: a prefix and the path with every dot turned into an underscore, inverted through a table of the
  layers Stable Diffusion 1.x, 2.x and XL have, because splitting at underscores is ambiguous.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

PARTS = ("unet", "text_encoder", "text_encoder_2", "vit")

# ---------------------------------------------------------------------------------------------- classic spelling

_HEAD_PREFIX = re.compile(r"^(?:vit|deit|beit|dinov2|dinov2_with_registers|swin)\.")
_VIT5_LAYER = re.compile(r"^(layers|encoder\.layer)\.(\d+)\.((?:attention|mlp|layernorm_before|layernorm_after)\b.*)$")
_SWIN5_LAYER = re.compile(r"^(encoder\.layers\.\d+\.blocks\.\d+)\.(.+)$")
_ATTENTION5 = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}
_FEEDFORWARD5 = {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
_SWIN5 = {
    "attention.q_proj": "attention.self.query",
    "attention.k_proj": "attention.self.key",
    "attention.v_proj": "attention.self.value",
    "attention.o_proj": "attention.output.dense",
    **_FEEDFORWARD5,
}
_CLIP_TEXT5 = re.compile(r"^(?:encoder|embeddings|final_layer_norm)\b")
_CLIP_VISION5 = re.compile(
    r"^(?:encoder\.layers\.\d+\.(?:self_attn|mlp|layer_norm\d)|pre_layrnorm|post_layernorm|embeddings\.(?:patch|position)_embedding)\b"
)


def classic(part: str, path: str) -> str:
    """Returns the path as classic checkpoints spell it, for a path in any transformers generation's spelling.

    Args:
        part: `unet`, `text_encoder`, `text_encoder_2` or `vit`.
        path: dotted module path inside that part, e.g. `layers.0.attention.q_proj`.
    """
    if part.startswith("text_encoder"):
        return "text_model." + path if _CLIP_TEXT5.match(path) else path
    if part == "vit":
        return _classic_vit(_HEAD_PREFIX.sub("", path))
    return path


def _classic_vit(path: str) -> str:
    """Returns a ViT, DINOv2, Swin or CLIP-vision path in the spelling of transformers 4."""
    if match := _SWIN5_LAYER.match(path):
        return f"{match[1]}.{_SWIN5.get(match[2], match[2])}"
    if _CLIP_VISION5.match(path):
        return "vision_model." + path
    if match := _VIT5_LAYER.match(path):
        stem, number, inner = match.groups()
        if stem == "layers":  # ViT, DeiT, BEiT; DINOv2 kept `encoder.layer.` and `mlp.fc1`
            inner = _FEEDFORWARD5.get(inner, inner)
        return f"encoder.layer.{number}.{_ATTENTION5.get(inner, inner)}"
    return path


def paths(part: str, model: nn.Module) -> dict[str, str]:
    """Returns true layer name -> module path for every layer of the model that an adapter can change.

    Those are its linear, convolution, embedding and normalisation layers, in the model's own order.

    Args:
        part: which part of a pipeline the model is: `unet`, `text_encoder`, `text_encoder_2` or `vit`.
        model: any torch module; device and dtype do not matter (the meta device will do).
    """
    from torch import nn

    kinds = (nn.Linear, nn.Conv2d, nn.Embedding, nn.LayerNorm, nn.GroupNorm)
    return {
        f"{part}.{classic(part, path)}": path for path, module in model.named_modules() if isinstance(module, kinds)
    }


def index(parts: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Returns true layer name -> module for every layer of all parts; one walk per model, so keep the answer."""
    found: dict[str, nn.Module] = {}
    for part, model in parts.items():
        modules = dict(model.named_modules())
        found.update((name, modules[path]) for name, path in paths(part, model).items())
    return found


def kernel(name: str) -> int | None:
    """Returns the kernel size of a convolution known by name: 3 or 1; None where the name does not tell.

    `proj_in` and `proj_out` do not: 1x1 convolutions in Stable Diffusion 1.x, linear layers in 2.x and XL.
    """
    if not name.startswith("unet."):
        return None
    last = name.rpartition(".")[2]
    return 1 if last == "conv_shortcut" else 3 if last in ("conv", "conv1", "conv2", "conv_in", "conv_out") else None


def family(layers: Mapping[str, tuple[int, ...] | None]) -> str | None:
    """Returns the base family these layers belong to: `sd1`, `sd2`, `sdxl`, `sd`, `vit`, or None when unknown.

    Shapes decide, never what the file says about itself. `sd` means Stable Diffusion 1.x or 2.x, not told apart.

    Args:
        layers: true layer name -> weight shape [O, I, ...], or None where it is not known.
    """
    if any(name.startswith("vit.") for name in layers):
        return "vit"
    if any(name.startswith("text_encoder_2.") for name in layers):
        return "sdxl"
    kind = None
    for name, shape in layers.items():
        part, _, path = name.partition(".")
        if part == "unet":
            kind = "sd"
            if re.search(r"transformer_blocks\.[1-9]", path) or path.startswith("add_embedding."):
                return "sdxl"
            width = shape[1] if shape and path.endswith(("attn2.to_k", "attn2.to_v")) else None
        else:
            kind = kind or "sd"
            width = shape[1] if shape and path.endswith(("q_proj", "k_proj", "v_proj", "fc1")) else None
        exact = {768: "sd1", 1024: "sd2", 2048: "sdxl"}.get(width or 0)
        if exact and (part == "unet" or exact != "sd1"):
            return exact
    return kind


# ---------------------------------------------------------------------------------------------- sgm / LDM spelling

SGM_TOP = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
SGM_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_DIFFUSERS_TOP = {sgm: ours for ours, sgm in SGM_TOP.items()}
_DIFFUSERS_RESNET = {sgm: ours for ours, sgm in SGM_RESNET.items()}
_SGM_BLOCK = re.compile(r"^(input_blocks|output_blocks)\.(\d+)\.(\d)\.(.+)$")
_SGM_MIDDLE = re.compile(r"^middle_block\.([012])\.(.+)$")
_BLOCK = re.compile(r"^(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.+)$")
_MIDDLE = re.compile(r"^mid_block\.(resnets|attentions)\.([01])\.(.+)$")


def from_sgm(path: str) -> str | None:
    """Returns the diffusers path of a UNet path in the original sgm/LDM spelling, or None if it is not one.

    Three layers a block, as every Stable Diffusion UNet has: `input_blocks.{3b+j+1}`, `output_blocks.{3b+j}`.
    """
    if path in _DIFFUSERS_TOP:
        return _DIFFUSERS_TOP[path]
    if match := _SGM_MIDDLE.match(path):
        child, inner = int(match[1]), match[2]
        if child == 1:
            return f"mid_block.attentions.0.{inner}"
        return f"mid_block.resnets.{child // 2}.{_DIFFUSERS_RESNET[inner]}" if inner in _DIFFUSERS_RESNET else None
    match = _SGM_BLOCK.match(path)
    if not match:
        return None
    side, number, child, inner = match[1], int(match[2]), int(match[3]), match[4]
    down = side == "input_blocks"
    block, layer = divmod(number - 1 if down else number, 3)
    stem = f"{'down' if down else 'up'}_blocks.{block}"
    if down and layer == 2:
        return f"{stem}.downsamplers.0.conv" if (child, inner) == (0, "op") else None
    if not down and layer == 2 and child in (1, 2) and inner == "conv":
        return f"{stem}.upsamplers.0.conv"
    if child == 0 and inner in _DIFFUSERS_RESNET:
        return f"{stem}.resnets.{layer}.{_DIFFUSERS_RESNET[inner]}"
    return f"{stem}.attentions.{layer}.{inner}" if child == 1 else None


def to_sgm(path: str) -> str | None:
    """Returns the sgm spelling of an SDXL UNet path (upsamplers follow an attention there), or None if it has none."""
    if path in SGM_TOP:
        return SGM_TOP[path]
    if match := _MIDDLE.match(path):
        kind, number, inner = match[1], int(match[2]), match[3]
        if kind == "attentions":
            return f"middle_block.1.{inner}" if number == 0 else None
        return f"middle_block.{2 * number}.{SGM_RESNET[inner]}" if inner in SGM_RESNET else None
    match = _BLOCK.match(path)
    if not match:
        return None
    side, block, kind, layer, inner = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return f"input_blocks.{3 * block + 3}.0.op" if inner == "conv" else None
    if kind == "upsamplers":
        return f"output_blocks.{3 * block + 2}.2.conv" if inner == "conv" else None
    if layer > (1 if side == "down" else 2):
        return None
    stem = f"input_blocks.{3 * block + layer + 1}" if side == "down" else f"output_blocks.{3 * block + layer}"
    if kind == "attentions":
        return f"{stem}.1.{inner}"
    return f"{stem}.0.{SGM_RESNET[inner]}" if inner in SGM_RESNET else None


# ---------------------------------------------------------------------------------------------- kohya's flat names

_ATTENTION = tuple(f"{a}.{p}" for a in ("attn1", "attn2") for p in ("to_q", "to_k", "to_v", "to_out.0"))
_BLOCK_LAYERS = (*_ATTENTION, "ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3")
_TEXT_LAYERS = tuple(f"self_attn.{p}_proj" for p in ("q", "k", "v", "out"))
_TEXT_LAYERS += ("mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2")
_TEXT_TOP = ("embeddings.token_embedding", "embeddings.position_embedding", "final_layer_norm")

_PREFIXES = {  # the first that fits decides
    "lora_unet_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te_": "text_encoder",
    "oft_unet_": "unet",
    "lycoris_unet_": "unet",
    "lycoris_text_encoder_2_": "text_encoder_2",
    "lycoris_text_encoder_": "text_encoder",
    "lycoris_": "unet",
}


def _unet_paths() -> Iterator[str]:
    """Yields every layer path that any Stable Diffusion 1.x, 2.x or XL UNet has, and smaller ones of their kind."""
    yield from SGM_TOP
    stems = [f"{side}_blocks.{block}" for side in ("down", "up") for block in range(4)]
    for stem in [*stems, "mid_block"]:
        for layer in range(2 if stem == "mid_block" else 3):
            yield from (f"{stem}.resnets.{layer}.{inner}" for inner in SGM_RESNET)
            attention = f"{stem}.attentions.{layer}"
            yield from (f"{attention}.{inner}" for inner in ("norm", "proj_in", "proj_out"))
            for block in range(10):
                yield from (f"{attention}.transformer_blocks.{block}.{inner}" for inner in _BLOCK_LAYERS)
        yield f"{stem}.downsamplers.0.conv" if stem.startswith("down") else f"{stem}.upsamplers.0.conv"


def _text_paths() -> Iterator[str]:
    """Yields every layer path of a CLIP or OpenCLIP text encoder of up to 32 layers, without `text_model.`."""
    yield from _TEXT_TOP
    yield from (f"encoder.layers.{number}.{inner}" for number in range(32) for inner in _TEXT_LAYERS)


@cache
def unet_paths() -> frozenset[str]:
    """Returns every layer path a Stable Diffusion 1.x, 2.x or XL UNet can have, in diffusers' spelling."""
    return frozenset(_unet_paths())


@cache
def text_paths() -> frozenset[str]:
    """Returns every layer path a CLIP or OpenCLIP text encoder can have, in the classic spelling."""
    return frozenset(_flat_text().values())


@cache
def _flat_unet() -> dict[str, str]:
    """Returns flat name -> diffusers path for the UNet, in diffusers' spelling."""
    return {path.replace(".", "_"): path for path in _unet_paths()}


@cache
def _flat_sgm() -> dict[str, str]:
    """Returns flat name -> diffusers path for the UNet, in sgm's spelling."""
    table: dict[str, str] = {}
    for path in _unet_paths():
        if sgm := to_sgm(path):
            table[sgm.replace(".", "_")] = path
        if path.startswith("up_blocks") and path.endswith("upsamplers.0.conv"):  # SD1/2: no attention before it
            table[f"output_blocks_{3 * int(path[10]) + 2}_1_conv"] = path
    return table


@cache
def _flat_text() -> dict[str, str]:
    """Returns flat name -> classic path for a text encoder, with and without `text_model` in the flat name."""
    table = {"text_projection": "text_projection"}
    for path in _text_paths():
        flat = path.replace(".", "_")
        table[flat] = table["text_model_" + flat] = "text_model." + path
    return table


def from_kohya(flat: str) -> str | None:
    """Returns the true name of a kohya or LyCORIS flat name such as `lora_te_text_model_encoder_...`, or None."""
    for prefix, part in _PREFIXES.items():
        if flat.startswith(prefix):
            rest = flat[len(prefix) :]
            path = _flat_unet().get(rest) or _flat_sgm().get(rest) if part == "unet" else _flat_text().get(rest)
            return f"{part}.{path}" if path else None
    return None


def to_kohya(name: str, sdxl: bool) -> str | None:
    """Returns kohya's flat name of a true name, or None where kohya has none (a ViT).

    Args:
        name: true layer name.
        sdxl: spell it for SDXL: sgm names for the UNet, `lora_te1` and `lora_te2` for the text encoders.
    """
    part, _, path = name.partition(".")
    if part == "unet":
        return "lora_unet_" + ((to_sgm(path) or path) if sdxl else path).replace(".", "_")
    if part in ("text_encoder", "text_encoder_2"):
        number = "2" if part == "text_encoder_2" else "1" if sdxl else ""
        return f"lora_te{number}_{path.replace('.', '_')}"
    return None


def known(name: str) -> bool:
    """Returns whether a true name can be a layer of its part; a ViT may have any layer."""
    part, _, path = name.partition(".")
    if part == "unet":
        return path in unet_paths()
    return bool(path) if part == "vit" else path in text_paths()
