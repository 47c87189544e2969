"""What the tools' commands do: settings in, (what to tell a person, what to tell a program) out.

Torch sleeps until a command runs: everything heavy is imported by its function.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_vision import lineage
from lora_vision.errors import LoraVisionError
from lora_vision.tools import settings as s
from lora_vision.whole import check_place, write_whole

if TYPE_CHECKING:
    from lora_vision.base import Base

PLAIN = "fox house tree cat guitar bicycle castle rocket rose car horse lion"
"""What is drawn with adapters that do not say what they were trained on."""


def _dtype(name: str | None) -> Any:
    import torch

    return None if name is None else {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def _weights(base: Base) -> dict[str, Any]:
    """True layer name to untouched weight."""
    from lora_vision import names

    return {name: layer.weight for name, layer in names.index(base.parts).items()}


def _to_gpu(base: Base) -> Base:
    """The base, on the GPU if there is one."""
    import torch

    if torch.cuda.is_available():
        base.to("cuda", torch.float16).vae.float()  # SDXL's overflows in fp16
    return base


def extract(config: s.ExtractConfig) -> tuple[str, Any]:
    """The adapter file that was written, and the error of each layer."""
    from lora_vision.base import load_base
    from lora_vision.files import save_adapter
    from lora_vision.tools import bake as b
    from lora_vision.tools.extract import extract

    check_place(Path(config.output))
    folders = (name for name in (config.base, config.tuned) if not name.endswith(".safetensors"))
    like = config.base_config or next(folders, None)  # the two are built alike, or there is nothing to extract
    tuned, base = (load_base(name, config=like) for name in (config.tuned, config.base))
    if b.made_of(base.source) == tuned.fingerprint:
        raise LoraVisionError(
            f"{config.base} was baked out of {config.tuned}: name the tuned model first ({config.base}), then its base"
        )
    rank = config.rank if config.rank == "auto" else int(config.rank)
    options: dict[str, Any] = {"clamp": config.clamp, "vectors": config.vectors, "dtype": _dtype(config.precision)}
    found = extract(tuned.parts, base.parts, rank, **options)
    parents = [{"file": Path(b.source).name, "fingerprint": b.fingerprint} for b in (tuned, base)]
    own = {"lora_vision.base": Path(base.source).name, "lora_vision.base_fingerprint": base.fingerprint}
    made = lineage.record(own, "extract", parents, {"rank": config.rank, "clamp": config.clamp})
    file = save_adapter(replace(found.adapter, metadata=made), config.output, config.format)
    return f"{found}\nwrote {file}", {"file": file, **found.to_dict()}


def resize(config: s.ResizeConfig) -> tuple[str, Any]:
    """The adapter file that was written, and what each layer lost."""
    from lora_vision.files import load_adapter, member, save_adapter
    from lora_vision.tools import resize as r
    from lora_vision.voices import refuse_overwriting

    refuse_overwriting(config.output, config.file)
    check_place(Path(config.output))
    fields = ("rank", "energy", "dynamic_method", "dynamic_param")
    chosen = {name: getattr(config, name) for name in fields if getattr(config, name) is not None}
    told = chosen | ({"size": config.size} if config.size else {})
    bytes_ = r.parse_size(config.size) if config.size else None
    size = r.Size(**chosen, size=bytes_, dtype=_dtype(config.precision), format=config.format)
    adapter = load_adapter(config.file)
    made = lineage.record(adapter.metadata, "resize", [member(config.file)], told)
    found = r.resize(replace(adapter, metadata=made), size)
    file = save_adapter(found.adapter, config.output, config.format)
    sizes = [member(path).stat().st_size for path in (config.file, file)]
    text = f"{found}\nwrote {file}: {sizes[0] / 1e6:.2f} MB -> {sizes[1] / 1e6:.2f} MB"
    return text, {"file": file, "bytes": sizes[1], "bytes_before": sizes[0], **found.to_dict()}


def bake(config: s.BakeConfig) -> tuple[str, Any]:
    """The checkpoint that was written."""
    from lora_vision.base import load_base
    from lora_vision.files import load_adapter
    from lora_vision.tools import bake as b
    from lora_vision.voices import read_voices

    check_place(Path(config.output), folder=not config.output.endswith(".safetensors"))
    voices = read_voices(config.adapter)
    adapters = [(load_adapter(voice.file), voice.scale) for voice in voices]
    if Path(config.output).is_file():
        raise LoraVisionError(f"{config.output} is there already; choose another name, or remove it first")
    base = load_base(config.base, config=config.base_config)
    b.bake(base, adapters)
    base.to("cpu", _dtype(config.precision))
    parents = [{"file": Path(v.file).name, "sha256": v.sha256, "scale": v.scale} for v in voices]
    told = b.provenance(base, parents)
    write = b.write_file if config.output.endswith(".safetensors") else b.write_folder
    path = write(base, config.output, told)
    data = {"output": path, "fingerprint": told[b.FINGERPRINT], "base": base.source, "adapters": parents}
    return f"wrote {path}: {base.source} with {', '.join(config.adapter)}", data


def compare(config: s.CompareConfig) -> tuple[str, Any]:
    """How two adapters agree, and how much they will fight."""
    from lora_vision.files import load_adapter
    from lora_vision.samples import png
    from lora_vision.tools.compare import compare

    if config.picture is not None:
        check_place(Path(config.picture))
    pair = {"a": load_adapter(config.a), "b": load_adapter(config.b)}
    if config.base is None:
        found = compare(pair["a"], pair["b"])
    else:
        from lora_vision.base import load_base
        from lora_vision.tools.clash import LEAST, lost
        from lora_vision.words import teach

        base = load_base(config.base, config=config.base_config)
        found = compare(pair["a"], pair["b"], _weights(base))
        teach(base.parts, base.tokenizers, pair.values())
        prompts = {name: prompts_of(adapter.metadata, LEAST) for name, adapter in pair.items()}
        first, second = lost(_to_gpu(base), pair, prompts)
        found = replace(found, lost=(first, second))
    data = {"a": config.a, "b": config.b, **found.to_dict()}
    if config.picture is None or not found.layers:
        return str(found), data
    picture = found.picture([Path(config.a).stem, Path(config.b).stem])
    Path(config.picture).parent.mkdir(parents=True, exist_ok=True)
    write_whole(Path(config.picture), png(picture))
    return f"{found}\nwrote {config.picture}", {**data, "picture": config.picture}


def report(config: s.ReportConfig) -> tuple[str, Any]:
    """The page that was written."""
    from lora_vision.base import load_base
    from lora_vision.files import load_adapter
    from lora_vision.report import inspect
    from lora_vision.tools import page
    from lora_vision.tools.account import account

    adapter, inspection = load_adapter(config.file), inspect(config.file)
    folder = Path(config.output or f"{Path(config.file).stem}-report")
    check_place(folder, folder=True)
    found, base = None, None
    if config.base is not None:
        base = load_base(config.base, config=config.base_config)
    counted = account(adapter, None if base is None else _weights(base))
    if base is not None:
        from lora_vision.tools.trials import trials
        from lora_vision.words import teach

        teach(base.parts, base.tokenizers, [adapter])
        found = trials(_to_gpu(base), adapter, config.prompts or prompts_of(adapter.metadata), config.seed)
    file = page.write(folder, inspection, counted, found, config.base)
    data = {"page": file, "account": counted.to_dict(), **({} if found is None else {"trials": found.to_dict()})}
    return "\n".join([*page.summary(counted, found), f"wrote {file}"]), data


def prompts_of(metadata: Mapping[str, str], count: int = 4) -> tuple[str, ...]:
    """Captions an adapter was trained on, spread over them all, or a few plain prompts."""
    try:
        captions = [str(text) for tags in json.loads(metadata["ss_tag_frequency"]).values() for text in tags]
    except (KeyError, ValueError, AttributeError, TypeError):
        captions = []
    captions = captions or [f"a {noun}" for noun in PLAIN.split()]
    return tuple(dict.fromkeys(captions[at * len(captions) // count] for at in range(count)))


def verify(config: s.VerifyConfig) -> tuple[str, Any]:
    """What was checked; afterwards the file is signed off, if that was asked and all is well."""
    from lora_vision.tools import verify as v

    base = None
    if config.base is not None:
        from lora_vision.base import load_base

        base = load_base(config.base, config=config.base_config)
    key = Path(config.key).read_bytes().strip() if config.key else None
    if config.key and not key:
        raise LoraVisionError(f"--key {config.key}: the file is empty; a secret is needed")
    found = v.verify(config.file, base, None if config.sign_off else key)
    if config.sign_off and all(check.ok is not False or check.name == "sign-off" for check in found.checks):
        v.sign_off(config.file, config.sign_off, key)
        found = v.verify(config.file, base, key)
    return str(found), found.to_dict()


def history(config: s.HistoryConfig) -> tuple[str, Any]:
    """The adapters of a folder, or the settings in which two of them differ."""
    from lora_vision.tools import history as h

    if not config.diff:
        entries = h.history(config.folder)
        nothing = f"{config.folder}: no adapters (.safetensors) here or in folders below"
        return h.table(entries) or nothing, h.to_dict(entries)
    folder = Path(config.folder)
    paths = [folder / name if (folder / name).exists() else Path(name) for name in config.diff]
    found = h.differences(*(h.settings_of(path) for path in paths))
    text = "\n".join(f"{key}: {one} | {other}" for key, (one, other) in found.items()) or "the same settings"
    return text, {"files": list(config.diff), "settings": {key: list(pair) for key, pair in found.items()}}


def card(config: s.CardConfig) -> tuple[str, Any]:
    """The model card that was written."""
    from lora_vision.tools.card import write_card

    path = write_card(config.file, config.licence, config.output)
    return f"wrote {path}", {"card": path}


def push(config: s.PushConfig) -> tuple[str, Any]:
    """Where an adapter was uploaded to, or what would be."""
    from lora_vision.tools import card as c

    c.check_repo(config.repo)
    names = list(c.bundle(config.file, config.licence))
    if config.dry_run:
        return f"would upload to {config.repo}: {', '.join(names)}", {"repo": config.repo, "files": names}
    address = c.push(config.file, config.repo, licence=config.licence, private=config.private)
    return f"uploaded {', '.join(names)}: {address}", {"repo": config.repo, "files": names, "commit": address}
