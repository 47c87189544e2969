"""bake: adapters written into a full checkpoint, for tools that know no adapters."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from lora_vision import lineage, names
from lora_vision.adapter import Adapter
from lora_vision.base import Base, fingerprint_of
from lora_vision.blend import Blend
from lora_vision.errors import LoraVisionError
from lora_vision.formats import container
from lora_vision.tools import ldm

PROVENANCE = "lora_vision.json"
"""The file of a baked folder that tells what it was made of; a single file tells it in its header."""
FINGERPRINT = "lora_vision.fingerprint"
"""The header string with the fingerprint of the baked weights."""

_ARCHITECTURE = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-768-v",
    "sdxl": "stable-diffusion-xl-v1-base",
}


def bake(base: Base, adapters: Iterable[tuple[Adapter, float]]) -> None:
    """Writes adapters into the weights of a base, for good: summed in float32 and rounded once.

    Raises:
        AdapterError: One does not fit; nothing was changed.
    """
    blend = Blend(base.parts)
    scales = {}
    for number, (adapter, scale) in enumerate(adapters):
        blend.load(adapter, f"adapter {number}", scale=0.0)
        scales[f"adapter {number}"] = scale
    blend.set(scales)
    blend.merge(keep="nowhere")
    blend.detach()  # the weights stay: the untouched ones were not kept


def provenance(base: Base, parents: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The header strings that tell what a baked model was made of; call it after baking.

    Args:
        base: The baked base: its own fingerprint before baking is kept as the parent's.
        parents: File name, sha256 and scale of each adapter.
    """
    fingerprint = fingerprint_of({**base.parts, "vae": base.vae})
    stated = {"base": Path(base.source).name, "base_fingerprint": base.fingerprint}
    told = lineage.record({}, "bake", parents, stated)
    prediction = "v" if base.prediction == "v_prediction" else base.prediction
    return {
        **told,
        FINGERPRINT: fingerprint,
        "modelspec.architecture": _ARCHITECTURE[base.family],
        "modelspec.prediction_type": prediction,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": " + ".join([stated["base"], *(f"{p['file']}:{p.get('scale', 1)}" for p in parents)]),
    }


def made_of(place: str | Path) -> str | None:
    """The fingerprint of the base that a baked folder or file was made of, where it tells one."""
    path = Path(place)
    try:
        if path.is_dir():
            told = dict(json.loads((path / PROVENANCE).read_text()))
        else:
            with safe_open(path, framework="pt") as file:
                told = file.metadata() or {}
    except (OSError, ValueError, SafetensorError):
        return None
    found = lineage.read(told)
    return None if found is None else found.settings.get("base_fingerprint")


def write_file(base: Base, path: str | Path, metadata: Mapping[str, str]) -> Path:
    """The path of a single checkpoint with the original keys, complete or not written at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        header, pieces = container.serialise(ldm.checkpoint(base), metadata)  # the same bytes every time
        with unfinished.open("wb") as file:
            file.write(header)
            file.writelines(pieces)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def write_folder(base: Base, folder: str | Path, metadata: Mapping[str, str]) -> Path:
    """The folder in the diffusers layout, complete or not written at all.

    Raises:
        LoraVisionError: There is something of that name already.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LoraVisionError(f"{folder} is there already; choose another name, or remove it first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for part in (base.unet, base.vae):
            part.register_to_config(_name_or_path="")  # no path of this machine in what is passed on
        base.pipeline().save_pretrained(unfinished, safe_serialization=True)
        for part in base.parts:
            if part != "unet":
                _spell_classically(unfinished / part / "model.safetensors", part)
        (unfinished / PROVENANCE).write_text(json.dumps(dict(metadata), indent=1, sort_keys=True) + "\n")
        unfinished.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _spell_classically(file: Path, part: str) -> None:
    """Gives a text encoder's weights the names of checkpoints, which every version of transformers finds."""
    save_file({names.classic(part, key): weight for key, weight in load_file(file).items()}, file, {"format": "pt"})
