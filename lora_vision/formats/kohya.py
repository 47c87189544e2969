"""kohya, A1111, ComfyUI and LyCORIS files: `lora_unet_<path with underscores>.<leaf>`.

Read: every algorithm's LyCORIS leaves, SD1/2 and SDXL names in diffusers', sgm and mixed spelling, `lora_te`,
`lora_te1`, `lora_te2`, the `lycoris_` prefix, bundled embeddings. Written: what kohya itself writes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora_vision import names
from lora_vision.errors import AdapterError
from lora_vision.formats import leaves as vocabulary
from lora_vision.formats.reading import Reading

if TYPE_CHECKING:
    from torch import Tensor

    from lora_vision.adapter import Adapter

_MINE = re.compile(r"^(?:lora_(?:unet|te1?|te2)_|lycoris_|oft_unet_|bundle_emb\.)")
_EMBEDDING = re.compile(r"^bundle_emb\.(.+)\.(string_to_param\.\*|emb_params|clip_l|clip_g)$")
_SPELLING = {"down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight", "ia3": "weight"}
_MODELSPEC = {"sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2-768-v", "sdxl": "stable-diffusion-xl-v1-base"}
_PLACES: dict[str, tuple[str, str]] = {}  # every key once understood -> (layer, leaf); names and leaves are tables
_VERSION = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}


def matches(key: str) -> bool:
    """Returns whether a key is spelled kohya's way."""
    return _MINE.match(key) is not None


def read(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> Reading:
    """Returns the layers of kohya-style tensors (or of their header entries)."""
    found = Reading()
    for key, tensor in tensors.items():
        if key in _PLACES:
            found.add(key, *_PLACES[key], tensor)
        elif match := _EMBEDDING.match(key):
            word = f"embedding.{match[1]}.text_encoder{'_2' if match[2] == 'clip_g' else ''}"
            if word in found.extras:
                raise AdapterError(f"{key!a} is the second embedding of {match[1]!a}; expected one spelling of it")
            found.extras[word] = tensor
        else:
            flat, _, ending = key.partition(".")
            name, leaf = names.from_kohya(flat), "ia3" if ending == "weight" else vocabulary.LEAVES.get(ending)
            if name and leaf:
                _PLACES[key] = name, leaf
            found.add(key, name, leaf, tensor)
    return found


def write(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns (tensors, metadata) of an adapter as kohya and LyCORIS write it, alpha in every layer.

    Raises:
        AdapterError: a layer or a change that this format cannot hold.
    """
    family = names.family(dict.fromkeys(adapter.layers))
    tensors: dict[str, Tensor] = {}
    for name, factors in adapter.layers.items():
        flat = names.to_kohya(name, family == "sdxl")
        if flat is None:
            raise AdapterError(
                f"layer {name}: kohya's format names UNet and text encoder layers only; use format='peft'"
            )
        leaves = vocabulary.disassemble(factors)
        if refused := {"new_weight", "new_bias", "with_bias"} & leaves.keys():
            raise AdapterError(
                f"layer {name}: {vocabulary.algorithm(leaves)} ({', '.join(sorted(refused))}) needs the base model and "
                "has no kohya spelling; use format='peft', or approximate it against a base"
            )
        conv = len(vocabulary.weight_shape(leaves) or ()) == 4 or names.kernel(name) is not None
        for leaf, value in leaves.items():
            ending, tensor = _spell(leaf, value, 2 if conv else 0)
            tensors[f"{flat}.{ending}"] = tensor
    tensors.update(_embeddings(adapter, family == "sdxl"))
    return tensors, _metadata(adapter)


def _spell(leaf: str, value: Any, extra: int) -> tuple[str, Tensor]:
    """Returns (ending, tensor) of one leaf; DoRA magnitudes get the singleton dimensions that mark their axis."""
    if leaf in ("magnitude", "dora_scale"):
        lead = (-1, 1) if leaf == "magnitude" else (1, -1)
        return "dora_scale", value.reshape(*lead, *(1,) * extra)
    if leaf == "alpha":
        return leaf, vocabulary.number(value)
    if leaf == "on_input":
        import torch

        return leaf, torch.tensor(int(value))
    return _SPELLING.get(leaf, leaf), value


def _embeddings(adapter: Adapter, sdxl: bool) -> dict[str, Tensor]:
    """Returns the bundled embeddings as A1111 (one encoder) or OneTrainer (two) spell them."""
    tensors = {}
    for name, tensor in adapter.extras.items():
        kind, _, rest = name.partition(".")
        token, _, part = rest.rpartition(".")
        if kind != "embedding" or part not in ("text_encoder", "text_encoder_2"):
            raise AdapterError(
                f"{name} is no layer of a Stable Diffusion model; kohya's format cannot hold it, use 'peft'"
            )
        ending = ("clip_g" if part == "text_encoder_2" else "clip_l") if sdxl else "string_to_param.*"
        tensors[f"bundle_emb.{token}.{ending}"] = tensor
    return tensors


def _metadata(adapter: Adapter) -> dict[str, str]:
    """Returns the header that kohya's tools and model pages read; what the adapter says itself comes first."""
    layers = {name: vocabulary.disassemble(factors) for name, factors in adapter.layers.items()}
    family = names.family({name: vocabulary.weight_shape(leaves) for name, leaves in layers.items()})
    ranks = [(rank, leaves.get("alpha")) for leaves in layers.values() if (rank := vocabulary.rank(leaves))]
    rank, alpha = vocabulary.commonest(ranks) if ranks else (None, None)
    plain = all(vocabulary.algorithm(leaves) in ("LoRA", "LoCon") for leaves in layers.values())
    found = {
        "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
        "ss_network_dim": None if rank is None else str(rank),
        "ss_network_alpha": None if alpha is None else str(alpha),
        "ss_base_model_version": _VERSION.get(family or ""),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{_MODELSPEC[family]}/lora" if family in _MODELSPEC else None,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": adapter.metadata.get("ss_output_name", "lora"),
        "modelspec.resolution": {"sd1": "512x512", "sd2": "768x768", "sdxl": "1024x1024"}.get(family or ""),
    }
    return {key: value for key, value in found.items() if value is not None} | dict(adapter.metadata)
