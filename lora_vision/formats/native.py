"""Native keys of ComfyUI and OneTrainer: `diffusion_model.<sgm path>.lora_A.weight`, `text_encoders...`. Read only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lora_vision import names
from lora_vision.formats import leaves as vocabulary
from lora_vision.formats.reading import Reading

_TEXT = re.compile(r"^(?:text_encoders\.)?(clip_l|clip_g|clip_h)\.(?:transformer\.)?")
_ENCODERS = {"clip_l": "text_encoder", "clip_h": "text_encoder", "clip_g": "text_encoder_2"}


def matches(key: str) -> bool:
    """Returns whether a key is spelled as ComfyUI names the layers of a whole checkpoint."""
    return key.startswith("diffusion_model.") or _TEXT.match(key) is not None


def read(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> Reading:
    """Returns the layers of native tensors (or of their header entries); diffusers' block names are taken too."""
    found = Reading()
    for key, tensor in tensors.items():
        path, leaf = vocabulary.split(key) or ("", None)
        if match := _TEXT.match(path):
            part = _ENCODERS[match[1]]
            name = f"{part}.{names.classic(part, path[match.end() :])}"
        else:
            path = path.removeprefix("diffusion_model.")
            name = f"unet.{names.from_sgm(path) or path}"
        found.add(key, name if names.known(name) else None, leaf, tensor)
    return found
