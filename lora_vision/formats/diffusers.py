"""diffusers files of three generations: `unet.<module path>.lora_A.weight` and its ancestors.

Read, decided key by key because files mix them: the attn-processor keys of 2023 (`...attn1.processor.to_q_lora.down`,
with and without `unet.`), `lora_linear_layer` and `lora.down`, and today's `lora_A`, whose alpha sits in the header
(`lora_adapter_metadata`). Written: today's keys, with alpha folded into `lora_B` so that readers with and without the
header see the same change.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora_vision import names
from lora_vision.errors import AdapterError
from lora_vision.formats import leaves as vocabulary
from lora_vision.formats import peft
from lora_vision.formats.reading import Reading

if TYPE_CHECKING:
    from torch import Tensor

    from lora_vision.adapter import Adapter

HEADER = "lora_adapter_metadata"
FOLDED = "lora_vision.alpha"
_MINE = re.compile(
    r"^(?:unet|text_encoder|text_encoder_2|down_blocks|up_blocks|mid_block|conv_in|conv_out|time_embedding|add_embedding)\."
)
_PROCESSOR = re.compile(r"\.(self_attn\.)?to_(q|k|v|out)_lora\.")
_SPELLING = {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "lora_magnitude_vector"}


def matches(key: str) -> bool:
    """Returns whether a key is spelled diffusers' way, with or without the part in front."""
    return _MINE.match(key) is not None


def read(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> Reading:
    """Returns the layers of diffusers-style tensors (or of their header entries), alpha taken from the header."""
    found = Reading()
    configs = _configs(metadata)
    modules: dict[str, tuple[str, str]] = {}
    for key, tensor in tensors.items():
        modern = key
        if ".processor." in key or "_lora." in key:
            modern = _PROCESSOR.sub(_projection, key.replace(".processor.", "."))
        path, leaf = vocabulary.split(modern) or ("", None)
        part, _, module = path.partition(".")
        if part not in ("unet", "text_encoder", "text_encoder_2"):
            part, module = "unet", path
        module = module.removeprefix("base_model.model.")
        name = f"{part}.{(part == 'unet' and names.from_sgm(module)) or names.classic(part, module)}"
        found.add(key, name if names.known(name) else None, leaf, tensor)
        modules[name] = (part, module)
    for name, leaves in found.layers.items():
        part, module = modules[name]
        if "alpha" not in leaves and part in configs and "down" in leaves:
            leaves["alpha"] = peft.alpha(configs[part], module, leaves)
    _unfold(found, metadata)
    return found


def _projection(old: re.Match[str]) -> str:
    """Returns how today's keys spell the projection of a 2023 key, of a text encoder or of a UNet."""
    if old[1]:
        return f".self_attn.{old[2]}_proj."
    return f".to_{old[2]}{'.0' if old[2] == 'out' else ''}."


def _configs(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Returns the PEFT configuration of each part from the header field, if it is there."""
    if HEADER not in metadata:
        return {}
    try:
        flat = json.loads(metadata[HEADER])
    except (ValueError, RecursionError):
        flat = None
    if not isinstance(flat, dict):
        raise AdapterError(f"the header field {HEADER} is no JSON object; expected diffusers' PEFT settings")
    configs: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        part, _, setting = key.partition(".")
        configs.setdefault(part, {})[setting] = value
    return {part: config for part, config in configs.items() if "r" in config}


def _unfold(found: Reading, metadata: Mapping[str, str]) -> None:
    """Gives layers of our own files the alpha and the `up` they had before `write` folded one into the other."""
    try:
        before = json.loads(metadata.get(FOLDED, "{}"))
    except (ValueError, RecursionError):
        before = None
    if not isinstance(before, dict):
        raise AdapterError(f"the header field {FOLDED} is no JSON object; delete it, or save the file again")
    for name, alpha in before.items():
        leaves = found.layers.get(name, {})
        rank = vocabulary.rank(leaves)
        if (
            not isinstance(alpha, (int, float))
            or not 0 < abs(alpha) < 1e300
            or not rank
            or not {"down", "up"} <= leaves.keys()
        ):
            raise AdapterError(
                f"the header field {FOLDED} does not fit layer {name!a}; delete it, or save the file again"
            )
        leaves["alpha"] = float(alpha)
        if hasattr(leaves["up"], "to"):  # a tensor, not a header entry
            leaves["up"] = (leaves["up"].float() * (rank / alpha)).to(leaves["down"].dtype)


def write(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns (tensors, metadata) of an adapter as diffusers writes it today: LoRA and DoRA only.

    `lora_B` holds the whole scale and alpha equals the rank. A header field of ours remembers alpha, so that reading
    gives it back: bit for bit when alpha/rank is a power of two or the factors are half precision.

    Raises:
        AdapterError: a layer or a change that this format cannot hold.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, dict[str, int]] = {}
    folded: dict[str, float] = {}
    dora: dict[str, bool] = {}
    for name, factors in adapter.layers.items():
        leaves = vocabulary.disassemble(factors)
        part, _, path = name.partition(".")
        held = {"down", "up", "alpha"} <= leaves.keys() <= {*_SPELLING, "alpha"}
        if part == "vit" or not held or peft.EMBEDDING.search(path):
            raise AdapterError(
                f"layer {name}: {vocabulary.algorithm(leaves)} has no spelling in diffusers' format, which holds LoRA "
                "and output-axis DoRA of a UNet and text encoders; use format='kohya' or 'peft', or approximate it"
            )
        alpha, rank = leaves.pop("alpha"), vocabulary.rank(leaves) or 1
        if alpha != rank:
            folded[name] = alpha
            leaves["up"] = leaves["up"].float() * (alpha / rank)
        ranks.setdefault(part, {})[path] = rank
        dora[part] = dora.get(part, False) or "magnitude" in leaves
        for leaf, value in leaves.items():
            tensors[f"{name}.{_SPELLING[leaf]}"] = peft.magnitude(value, leaves) if leaf == "magnitude" else value
    if adapter.extras:
        raise AdapterError(
            f"{next(iter(adapter.extras))} is no layer; diffusers' format cannot hold it, use 'kohya' or 'peft'"
        )
    if zero := [name for name, alpha in folded.items() if alpha == 0]:
        raise AdapterError(f"layer {zero[0]}: alpha 0 would erase it in diffusers' format; leave it out or use 'kohya'")
    header = {f"{part}.{k}": v for part, r in sorted(ranks.items()) for k, v in _settings(r, dora[part]).items()}
    metadata = {**adapter.metadata, "format": "pt", HEADER: json.dumps(header, sort_keys=True)}
    return tensors, metadata | ({FOLDED: json.dumps(folded)} if folded else {})


def _settings(ranks: Mapping[str, int], dora: bool) -> dict[str, Any]:
    """Returns the PEFT settings of one part; module names as both transformers generations end them."""
    rank = vocabulary.commonest(ranks.values())
    pattern = {path.removeprefix("text_model."): r for path, r in ranks.items() if r != rank}
    return {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(path.removeprefix("text_model.") for path in ranks),
        "use_dora": dora,
        "use_rslora": False,
        "lora_bias": False,
        "bias": "none",
        "peft_type": "LORA",
    }
