"""File dialects: each file here spells layer names and factors as one family of tools does, and knows no file system.

Every codec is up to three functions: `matches` (is this key mine?), `read` and, where we write it, `write`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from lora_vision.errors import AdapterError
from lora_vision.formats import cloneofsimo, diffusers, kohya, native, peft
from lora_vision.formats.reading import Reading

CODECS: dict[str, ModuleType] = {
    "kohya": kohya,
    "diffusers": diffusers,
    "peft": peft,
    "native": native,
    "cloneofsimo": cloneofsimo,
}
WRITERS = tuple(name for name, codec in CODECS.items() if hasattr(codec, "write"))


def read(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> tuple[str | None, Reading]:
    """Returns (name of the format, what was understood); keys decide one by one, since files mix dialects.

    Args:
        tensors: key -> tensor or header entry (anything with a shape).
        metadata: the file's header strings; PEFT's configuration under `adapter_config`.

    Raises:
        AdapterError: the keys of one dialect contradict each other or its settings.
    """
    shares: dict[str, dict[str, Any]] = {}
    found = Reading()
    for key, tensor in _uncompiled(tensors).items():
        for name, codec in CODECS.items():
            if codec.matches(key) or (codec is cloneofsimo and metadata.get(key) == cloneofsimo.EMBEDDING):
                shares.setdefault(name, {})[key] = tensor
                break
        else:
            found.unknown.append(key)
    for name, share in shares.items():
        reading: Reading = CODECS[name].read(share, metadata)
        found = reading if len(shares) == 1 and not found.unknown else _merged(found, reading)
    counts = Counter({name: len(share) for name, share in shares.items()})
    return (counts.most_common(1)[0][0] if counts else None), found


def _uncompiled(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the tensors by the keys they have without the wrapper of `torch.compile`, `_orig_mod`."""
    if "_orig_mod" not in "\n".join(tensors):
        return tensors
    plain = {key.replace("_orig_mod.", "").replace("_orig_mod_", ""): tensor for key, tensor in tensors.items()}
    if len(plain) != len(tensors):
        raise AdapterError("keys of a compiled and of a plain model name the same tensors; expected one of them")
    return plain


def _merged(found: Reading, reading: Reading) -> Reading:
    found.merge(reading)
    return found
