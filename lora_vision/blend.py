"""Several adapters on one pipeline, at weights that change in microseconds, and the base back bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_vision import names
from lora_vision.adapter import Adapter
from lora_vision.errors import AdapterError, BaseModelError
from lora_vision.files import load_adapter
from lora_vision.inject import LoadReport, compare, refuse_adapted, refuse_peft
from lora_vision.stack import Keep, Stack
from lora_vision.targets import match

Weight = float | Mapping[str, float]
"""One number for all layers of an adapter, or globs over layer names with a number each: later globs win, layers that
no glob covers stay at 1. ``{"*": 0.8, "text_encoder": 0, "unet.up_blocks.*": 0.5}``"""


class Blend:
    """Adapters hooked onto a stock diffusers pipeline, or onto plain models.

    The weights of the base are never touched unless ``merge`` is called, and ``detach`` gives back what was there.
    """

    def __init__(self, target: Any) -> None:
        """A blend without adapters; the models compute what they did.

        Args:
            target: A diffusers pipeline, or its parts: ``{"unet": unet, "text_encoder": encoder}``, ``{"vit": model}``.

        Raises:
            BaseModelError: There is no part to adapt, or one carries adapters of PEFT or of another blend.
        """
        self.parts = _parts(target)
        refuse_peft(self.parts)
        self._layers = names.index(self.parts)
        refuse_adapted(self._layers)
        self._stack = Stack(self._layers)
        self._scales: dict[str, Weight] = {}
        self._merged: dict[str, Keep] = {}

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of all loaded adapters, sounding or silent."""
        return tuple(self._stack.loaded)

    @property
    def scales(self) -> dict[str, Weight]:
        """The blend as it was set: adapter name to weight, without the silent ones."""
        return dict(self._scales)

    def load(
        self, source: str | Path | Adapter, name: str | None = None, *, scale: Weight = 1.0, strict: bool = True
    ) -> LoadReport:
        """The load report; the adapter sounds at once, added to what sounds already.

        Args:
            source: An adapter file or folder of any known format, or an Adapter.
            name: What to call it; by default the file's name without its ending.
            scale: Its weight; 0 loads it silently.
            strict: Refuse unless every layer of the adapter fits; otherwise take what fits and report the rest.

        Raises:
            AdapterError: It cannot be read or does not fit, or the name is taken; nothing was changed.
        """
        adapter = source if isinstance(source, Adapter) else load_adapter(source)
        name = name or ("adapter" if isinstance(source, Adapter) else Path(source).stem)
        if name in self._stack.loaded:
            raise AdapterError(f"an adapter called {name!r} is loaded already; choose another name or remove it first")
        report = compare(adapter, self._layers, strict)
        changes = {layer: adapter.layers[layer] for layer in report.matched}
        _weights(name, scale, list(changes))
        self._stack.add(name, changes)
        self._show({**self._scales, name: scale})
        return report

    def set(self, scales: Mapping[str, Weight]) -> None:
        """Lets exactly these adapters sound at these weights; all others are silent, and cost nothing.

        Args:
            scales: Adapter name to a number (negative ones too), or to numbers by glob: see Weight.

        Raises:
            AdapterError: An adapter is not loaded, a glob matches none of its layers, or a weight is not finite;
                nothing was changed.
        """
        self._show(scales)

    @contextmanager
    def using(self, scales: Mapping[str, Weight] | None = None, /, **more: Weight) -> Iterator[Blend]:
        """The blend, set to these weights inside the ``with`` and as it was before afterwards."""
        before = self.scales
        self.set({**(scales or {}), **more})
        try:
            yield self
        finally:
            self._show({name: weight for name, weight in before.items() if name in self._stack.loaded})

    def merge(self, only: Iterable[str] | None = None, *, keep: Keep = "device") -> None:
        """Writes sounding adapters into the model's weights: no cost per step any more. Others stay live.

        ``set`` still works and rewrites the weights, from the untouched ones each time.

        Args:
            only: Names of the adapters to merge; by default all that sound.
            keep: Where the untouched weights wait for ``restore``: ``"device"``, ``"cpu"`` or ``"nowhere"``.

        Raises:
            AdapterError: A name does not sound.
            BaseModelError: The weights are parked by CPU offload.
        """
        chosen = list(self._scales if only is None else only)
        for name in chosen:
            if name not in self._scales:
                raise AdapterError(f"{name!r} does not sound; sounding: {', '.join(self._scales) or 'nothing'}")
        before = dict(self._merged)
        self._merged.update(dict.fromkeys(chosen, keep))
        try:
            self._show(self._scales)
        except Exception:
            self._merged = before
            raise

    def restore(self) -> None:
        """Puts the untouched weights back, bit for bit; merged adapters are live again at their weights.

        Raises:
            BaseModelError: They were merged with ``keep="nowhere"``.
        """
        self._stack.restore()
        self._merged = {}
        self._show(self._scales)

    def remove(self, name: str) -> None:
        """Takes one adapter out and frees its memory."""
        self._check_loaded([name])
        if self._merged.pop(name, None) == "nowhere":
            raise BaseModelError(f"{name!r} was merged with keep='nowhere' and cannot be taken out of the weights")
        self._show({other: weight for other, weight in self._scales.items() if other != name})
        self._stack.remove(name)

    def detach(self) -> None:
        """Takes everything out: the pipeline is what it was, ``state_dict()`` keys too."""
        self._stack.clear()
        self._scales, self._merged = {}, {}

    def _show(self, scales: Mapping[str, Weight]) -> None:
        """Checks a blend, then brings the model to it: merged adapters first, live ones on top."""
        self._check_loaded(scales)
        loaded = self._stack.loaded
        weights = {name: _weights(name, weight, list(loaded[name].columns)) for name, weight in scales.items()}
        merged = {n: weights.get(n, torch.zeros(1, len(loaded[n].columns))) for n in self._merged}
        live = {name: weight for name, weight in weights.items() if name not in self._merged}
        if not _same(merged, self._stack.merged):
            self._stack.merge(merged, next(reversed(self._merged.values()), "device"))
        self._stack.apply(live)
        self._scales = dict(scales)

    def _check_loaded(self, wanted: Iterable[str]) -> None:
        for name in wanted:
            if name not in self._stack.loaded:
                near = get_close_matches(name, self._stack.loaded, 1)
                meant = f"did you mean {near[0]!r}? " if near else ""
                have = ", ".join(self._stack.loaded) or "none"
                raise AdapterError(f"no adapter called {name!r} is loaded; {meant}loaded: {have}; call load first")


def _parts(target: Any) -> dict[str, nn.Module]:
    """Part name to model, out of a pipeline or a mapping; compiled models are looked through."""
    components = target if isinstance(target, Mapping) else getattr(target, "components", None)
    if not isinstance(components, Mapping):
        kind = type(target).__name__
        raise BaseModelError(f"found a {kind}; expected a diffusers pipeline or parts such as {{'unet': model}}")
    models = {part: components[part] for part in names.PARTS if isinstance(components.get(part), nn.Module)}
    strange = set(components) - set(names.PARTS) if target is components else set()
    if strange or not models:
        found = ", ".join(map(str, strange or components)) or "nothing"
        raise BaseModelError(f"found parts {found}; expected one or more of {', '.join(names.PARTS)}")
    return {part: getattr(model, "_orig_mod", model) for part, model in models.items()}


def _weights(name: str, weight: Weight, layers: list[str]) -> Tensor:
    """One weight for each layer of an adapter [1, L], float32."""
    if isinstance(weight, Mapping):
        column = {layer: at for at, layer in enumerate(layers)}
        values = torch.ones(1, len(layers))
        for pattern, value in weight.items():
            values[0, [column[layer] for layer in match(pattern, layers)]] = _number(f"{name}@{pattern}", value)
        return values
    return torch.full((1, len(layers)), _number(name, weight))


def _number(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise AdapterError(f"the weight of {name} is {value!r}; expected a finite number, or a number for each glob")
    return float(value)


def _same(some: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return some.keys() == other.keys() and all(torch.equal(some[name], other[name]) for name in some)
