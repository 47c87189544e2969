"""``lora-vision merge``: adapter files in, one adapter file out, and what that cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_vision import lineage
from lora_vision.adapter import Adapter
from lora_vision.combine import Combined, Recipe, combine
from lora_vision.config import MergeConfig
from lora_vision.errors import AdapterError
from lora_vision.files import load_adapter, save_adapter
from lora_vision.targets import match
from lora_vision.voices import Voice, read_voices, refuse_overwriting
from lora_vision.whole import check_place


@dataclass(frozen=True)
class Merged:
    """What was merged.

    Attributes:
        output: The file written.
        how: The way it was made.
        sources: What went in.
        errors: Relative error against the true weighted sum, by group of layers.
        layers: How many layers the result changes.
        ranks: Smallest and largest rank among its low-rank layers; None if there is none.
    """

    output: str
    how: str
    sources: tuple[Voice, ...]
    errors: Mapping[str, float]
    layers: int
    ranks: tuple[int, int] | None

    def to_dict(self) -> dict[str, Any]:
        """The same for programs."""
        sources = [
            {"file": s.file, "scale": s.scale, "layers": dict(s.layers), "sha256": s.sha256} for s in self.sources
        ]
        return {**vars(self), "sources": sources, "errors": dict(self.errors)}

    def __str__(self) -> str:
        rank = "dense" if self.ranks is None else f"rank {'-'.join(str(rank) for rank in sorted(set(self.ranks)))}"
        lines = [f"wrote {self.output}: {self.layers} layers, {rank}, by {self.how}"]
        lines += ["relative error against the true weighted sum:"]
        width = max(map(len, self.errors), default=0)
        return "\n".join([*lines, *(f"  {group:{width}}  {error:.2g}" for group, error in self.errors.items())])


def merge(settings: MergeConfig) -> Merged:
    """What was merged; the file is written.

    Raises:
        AdapterError: A file cannot be read, or the adapters cannot be combined in this way.
        BaseModelError: The base cannot be loaded.
    """
    check_place(Path(settings.output))
    if settings.rank is not None and settings.rank < 1:
        raise AdapterError(f"--rank {settings.rank}; expected at least 1")
    voices = read_voices(settings.adapters)
    for voice in voices:
        refuse_overwriting(settings.output, voice.file)
    adapters = {voice.name: load_adapter(voice.file) for voice in voices}
    pairs = settings.how in ("klora", "ziplora")
    if pairs and (len(voices) != 2 or any(voice.layers for voice in voices)):
        raise AdapterError(f"{settings.how} is for two adapters, the subject and then the style, without @GLOB=SCALE")
    if settings.how == "ziplora":
        done = _zipped([(adapters[voice.name], voice.scale) for voice in voices], settings)
    else:
        terms = [term for voice in voices for term in _terms(voice, adapters[voice.name])]
        recipe = Recipe(rank=settings.rank, density=settings.density, seed=settings.seed)
        done = combine(terms, settings.how, recipe, _weights(settings.base))
    parents = [{"file": Path(v.file).name, "sha256": v.sha256, "scale": v.scale, **_some(v)} for v in voices]
    metadata = lineage.record(done.adapter.metadata, "merge", parents, _settings(settings))
    save_adapter(replace(done.adapter, metadata=metadata), Path(settings.output), format=settings.format)
    found = [factors.low_rank() for factors in done.adapter.layers.values()]
    ranks = [pair.rank for pair in found if pair is not None]
    span = (min(ranks), max(ranks)) if ranks else None
    return Merged(settings.output, settings.how, tuple(voices), done.errors, len(found), span)


def _settings(settings: MergeConfig) -> dict[str, Any]:
    """What of the settings the method looks at."""
    read: dict[str, tuple[str, ...]] = {
        "svd": ("rank",),
        **dict.fromkeys(("ties", "magnitude"), ("rank", "density")),
        "dare": ("rank", "density", "seed"),
        "ziplora": ("base", "prompts", "steps", "seed"),
    }
    return {"how": settings.how, **{name: getattr(settings, name) for name in read.get(settings.how, ())}}


def _some(voice: Voice) -> dict[str, Any]:
    return {"layers": dict(voice.layers)} if voice.layers else {}


def _terms(voice: Voice, adapter: Adapter) -> list[tuple[Adapter, float]]:
    """The adapter once for each scale among its layers."""
    scales = dict.fromkeys(adapter.layers, voice.scale)
    for glob, scale in voice.layers.items():
        scales |= dict.fromkeys(match(glob, adapter.layers), scale)
    some = [
        (Adapter({name: adapter.layers[name] for name in scales if scales[name] == scale}), scale)
        for scale in dict.fromkeys(scales.values())
    ]
    first, *others = some or [(adapter, voice.scale)]
    return [(replace(first[0], extras=adapter.extras), first[1]), *others]


def _weights(base: str | None) -> dict[str, Tensor] | None:
    """True layer name to weight of a base."""
    if base is None:
        return None
    from lora_vision import names
    from lora_vision.base import load_base

    layers: Mapping[str, Any] = names.index(load_base(base).parts)
    return {name: layer.weight for name, layer in layers.items()}


def _zipped(pair: list[tuple[Adapter, float]], settings: MergeConfig) -> Combined:
    import torch

    from lora_vision.base import load_base
    from lora_vision.ziplora import Zip, ziplora

    assert settings.base is not None
    base = load_base(settings.base).to("cuda" if torch.cuda.is_available() else "cpu", torch.float32)
    subject, style = settings.prompts
    return ziplora(base, pair[0], pair[1], (subject, style), Zip(steps=settings.steps, seed=settings.seed))[0]
