"""Several adapters on one pipeline, at weights that change in microseconds, and the base back bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lora_vision import names
from lora_vision.adapter import Adapter
from lora_vision.conduct import Conductor
from lora_vision.errors import AdapterError, BaseModelError
from lora_vision.files import load_adapter
from lora_vision.inject import LoadReport, compare, refuse_adapted, refuse_unfit
from lora_vision.layers import check_exact, check_wrappable
from lora_vision.originals import Keep
from lora_vision.regions import Region, check_masks
from lora_vision.schedules import Schedule
from lora_vision.stack import Stack
from lora_vision.targets import match, select

Weight = float | Mapping[str, float]
"""One number for all layers of an adapter, or globs over layer names with a number each: later globs win, layers that
no glob covers stay at 1. ``{"*": 0.8, "text_encoder": 0, "unet.up_blocks.*": 0.5}``"""

_Held = TypeVar("_Held")

Rows = Weight | Sequence[Weight]
"""A weight for the whole batch, or a list with one for each picture (or each prompt) of it."""


@dataclass(frozen=True)
class Scene:
    """What a blend was asked to be: the arguments of ``Blend.set``."""

    scales: Mapping[str, Rows] = field(default_factory=dict)
    schedules: Mapping[str, Schedule] = field(default_factory=dict)
    regions: tuple[Region, ...] = ()


class Blend:
    """Adapters hooked onto a stock diffusers pipeline, or onto plain models.

    The weights of the base are never touched unless ``merge`` is called, and ``detach`` gives back what was there.

    Attributes:
        pipe: The pipeline that is called, or None. It knows the scheduler and whether guidance doubles the batch; set
            it when another pipeline (``from_pipe``) takes over the same models.
        parts: Part name to model.
        scene: What was last set.
    """

    def __init__(
        self,
        target: Any,
        *,
        capacity: int = 0,
        targets: str | Sequence[str] = "attention+ff",
        budget: int | None = None,
    ) -> None:
        """A blend without adapters; the models compute what they did.

        Args:
            target: A diffusers pipeline, or its parts: ``{"unet": unet, "text_encoder": encoder}``, ``{"vit": model}``.
            capacity: For ``torch.compile``: room for this many ranks, all sounding adapters together, is made at once
                in each layer of ``targets``. While adapters stay inside it, nothing recompiles. 0 makes none; a model
                on a CPU should then be called once before it is compiled, for its layers to stack their factors.
            targets: Where the room is made: named sets and globs, as in LoraConfig.
            budget: Bytes that adapters loaded through ``register`` may take; beyond it silent ones are dropped, the
                least recently used first, and read again when wanted. None drops nothing.

        Raises:
            BaseModelError: There is no part to adapt, or one carries adapters of PEFT or of another blend.
            AdapterError: ``targets`` matches nothing.
        """
        self.pipe = None if isinstance(target, Mapping) else target
        self.parts = _parts(target)
        refuse_unfit(self.parts)
        self._layers = names.index(self.parts)
        refuse_adapted(self._layers)
        roomy = set(select(targets, self._layers)) if capacity else set()
        self._voices: dict[str, Conductor] = {}
        for part, model in self.parts.items():
            layers = {name: layer for name, layer in self._layers.items() if name.startswith(f"{part}.")}
            self._voices[part] = Conductor(
                part, model, Stack(layers, {name: capacity for name in layers if name in roomy})
            )
        self._loaded: dict[str, dict[str, list[str]]] = {}
        self._merged: dict[str, Keep] = {}
        self._registered: dict[str, Path] = {}
        self._bytes: dict[str, int] = {}
        self._budget = budget
        self.scene = Scene()

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of all loaded adapters, sounding or silent."""
        return tuple(self._loaded)

    @property
    def nbytes(self) -> int:
        """Bytes that the loaded adapters' own tensors take, sounding or silent."""
        return sum(self._bytes.values())

    @property
    def scales(self) -> dict[str, Rows]:
        """The weights as they were set, without the adapters left out."""
        return dict(self.scene.scales)

    def load(
        self, source: str | Path | Adapter, name: str | None = None, *, scale: Weight = 1.0, strict: bool = True
    ) -> LoadReport:
        """The load report; the adapter sounds at once, added to what sounds already.

        Its tensors stay in the file until they are used: put another file in its place by renaming, as ``save_adapter``
        does, instead of writing into it.

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
        if name in self._loaded:
            raise AdapterError(f"an adapter called {name!r} is loaded already; choose another name or remove it first")
        report = compare(adapter, self._layers, strict)
        layers = {part: [n for n in report.matched if n.startswith(f"{part}.")] for part in self.parts}
        layers = {part: found for part, found in layers.items() if found}
        _weights(name, scale, list(report.matched))
        for layer in report.matched:
            check_wrappable(layer, self._layers[layer])
            check_exact(layer, self._layers[layer], adapter.layers[layer])
        for part, found in layers.items():
            self._voices[part].stack.add(name, {layer: adapter.layers[layer] for layer in found})
        self._loaded[name], self._bytes[name] = layers, adapter.nbytes
        self._show(Scene({**self.scene.scales, name: scale}, self.scene.schedules, self.scene.regions))
        return report

    def register(self, files: Mapping[str, str | Path]) -> None:
        """Gives names to adapter files, thousands if need be; each is read when a blend first wants it.

        Args:
            files: Name to adapter file or folder.

        Raises:
            AdapterError: A name is taken or a file does not exist; nothing was changed.
        """
        paths = {name: Path(path) for name, path in files.items()}
        for name, path in paths.items():
            if name in self._loaded or name in self._registered:
                raise AdapterError(
                    f"an adapter called {name!r} is there already; choose another name or remove it first"
                )
            if not path.exists():
                raise AdapterError(f"no adapter file at {path} for {name!r}; check the path")
        self._registered.update(paths)

    def set(
        self,
        scales: Mapping[str, Rows],
        *,
        schedule: Schedule | Mapping[str, Schedule] | None = None,
        regions: Sequence[Region] = (),
    ) -> None:
        """Lets exactly these adapters sound at these weights; all others are silent, and cost nothing.

        Args:
            scales: Adapter name to a number (negative ones too), to numbers by glob (see Weight), or to a list with
                one of those for each picture of the batch.
            schedule: What the weights of UNet layers are multiplied by at each denoising step: one for all adapters,
                or one for each name. Needs a pipeline.
            regions: Places of the picture with blends of their own; ``scales`` then holds in the text encoders, and
                wherever no region is.

        Raises:
            AdapterError: An adapter is not loaded, a glob matches none of its layers, a weight is not finite, or lists
                differ in length; nothing was changed.
        """
        schedules = schedule if isinstance(schedule, Mapping) else dict.fromkeys(scales, schedule) if schedule else {}
        wanted = dict.fromkeys([*scales, *(name for region in regions for name in region.adapters)])
        before = self.scene
        for name in wanted:
            if name in self._registered and name not in self._loaded:
                self.load(self._registered[name], name, scale=0.0)
        self.scene = before
        self._show(Scene(dict(scales), dict(schedules), tuple(regions)))
        self._drop_unused(list(wanted))

    def _drop_unused(self, wanted: Sequence[str]) -> None:
        """Drops registered adapters beyond the budget; ``_bytes`` is in the order of last use."""
        self._bytes.update({name: self._bytes.pop(name) for name in wanted if name in self._bytes})
        if self._budget is None:
            return
        for name in [n for n in self._bytes if n in self._registered and n not in wanted and n not in self._merged]:
            if sum(size for other, size in self._bytes.items() if other in self._registered) > self._budget:
                path = self._registered[name]
                self.remove(name)
                self._registered[name] = path

    @contextmanager
    def using(self, scales: Mapping[str, Rows] | None = None, /, **more: Rows) -> Iterator[Blend]:
        """The blend, set to exactly these weights inside the ``with`` and as it was before afterwards."""
        before = self.scene
        self.set({**(scales or {}), **more})
        try:
            yield self
        finally:
            known = {*self._loaded, *self._registered}
            scales = {name: weight for name, weight in before.scales.items() if name in known}
            schedules = {name: schedule for name, schedule in before.schedules.items() if name in known}
            self.set(scales, schedule=schedules, regions=before.regions)

    def merge(self, only: Iterable[str] | None = None, *, keep: Keep = "device") -> None:
        """Writes sounding adapters into the model's weights: no cost per step any more. Others stay live.

        ``set`` still works and rewrites the weights, from the untouched ones each time. They are written in place: what
        shares their memory, such as a ``state_dict()`` taken before, changes with them, and ``save_pretrained`` saves
        what is merged. Untouched weights kept in CPU memory stay there after ``restore``, for the next merge, until an
        adapter is removed.

        Args:
            only: Names of the adapters to merge; by default all that sound.
            keep: Where the untouched weights wait for ``restore``: ``"device"``, ``"cpu"`` or ``"nowhere"``.

        Raises:
            AdapterError: A name does not sound, or its weight varies between rows or steps.
            BaseModelError: The weights are parked by CPU offload.
        """
        chosen = list(self.scene.scales if only is None else only)
        for name in chosen:
            if name not in self.scene.scales:
                sounding = ", ".join(self.scene.scales) or "nothing"
                raise AdapterError(f"{name!r} does not sound; sounding: {sounding}")
        before = dict(self._merged)
        self._merged.update(dict.fromkeys(chosen, keep))
        try:
            self._show(self.scene)
        except Exception:
            self._merged = before
            raise

    def restore(self) -> None:
        """Puts the untouched weights back, bit for bit; merged adapters are live again at their weights.

        Raises:
            BaseModelError: They were merged with ``keep="nowhere"``.
        """
        if "nowhere" in self._merged.values():
            raise BaseModelError("merged with keep='nowhere': the untouched weights are gone; load the base again")
        self._merged = {}
        self._show(self.scene)

    def remove(self, name: str) -> None:
        """Takes one adapter out and frees its memory.

        Raises:
            AdapterError: No such adapter is loaded.
            BaseModelError: It was merged with ``keep="nowhere"``.
        """
        if self._registered.pop(name, None) is not None and name not in self._loaded:
            return
        self._check_loaded([name])
        if self._merged.get(name) == "nowhere":
            raise BaseModelError(f"{name!r} was merged with keep='nowhere' and cannot be taken out of the weights")
        self._merged.pop(name, None)
        regions = tuple(replace(region, adapters=_without(region.adapters, name)) for region in self.scene.regions)
        self._show(Scene(_without(self.scene.scales, name), _without(self.scene.schedules, name), regions))
        del self._bytes[name]
        for part in self._loaded.pop(name):
            self._voices[part].stack.remove(name)

    def detach(self) -> None:
        """Takes everything out: the pipeline is what it was, ``state_dict()`` keys too."""
        for voice in self._voices.values():
            voice.quiet()
            voice.stack.clear()
        self._loaded, self._merged, self._registered, self._bytes, self.scene = {}, {}, {}, {}, Scene()

    def _show(self, scene: Scene) -> None:
        """Checks a scene, then brings every part to it: merged adapters first, live ones on top."""
        everywhere = self._resolved(scene)
        regions = _with_background(scene)
        local = self._by_region(regions)
        stacks = {part: voice.stack for part, voice in self._voices.items()}
        merged = {part: self._to_merge(part, weights) for part, weights in everywhere.items()}
        moved = [part for part, weights in merged.items() if not _same(weights, stacks[part].merged)]
        for part in moved:
            stacks[part].check_merge(merged[part])
        for part in moved:
            stacks[part].merge(merged[part], next(reversed(self._merged.values()), "device"))
        texts = self._retold(regions)
        for part, voice in self._voices.items():
            weights = local if regions and part == "unet" else everywhere[part]
            live = {name: value for name, value in weights.items() if name not in self._merged}
            if part == "unet":
                voice.play(live, scene.schedules, regions, texts, self.pipe)
            else:
                voice.play(live, {}, pipe=self.pipe)
        self.scene = scene

    def _resolved(self, scene: Scene) -> dict[str, dict[str, Tensor]]:
        """Part to adapter name to weights [G, L], after everything about the scene has been checked."""
        inside = {name for region in scene.regions for name in region.adapters}
        self._check_loaded([*scene.scales, *scene.schedules, *inside])
        rows = {name: list(w) if isinstance(w, list | tuple) else [w] for name, w in scene.scales.items()}
        lengths = {len(values) for values in rows.values()} - {1}
        if len(lengths) > 1 or 0 in lengths or (lengths and scene.regions):
            raise AdapterError(
                f"lists of {sorted(lengths)} weights{' beside regions' if scene.regions else ''}; expected one length, "
                "a weight for each picture of the batch, and no regions beside them"
            )
        if scene.schedules and not hasattr(self.pipe, "scheduler"):
            raise AdapterError("a schedule needs a scheduler to know the step: make the Blend on a pipeline")
        if scene.regions and "unet" not in self.parts:
            raise AdapterError(f"regions need a UNet; this blend has {', '.join(self.parts)}")
        check_masks(scene.regions)
        varying = {name for name, values in rows.items() if len(values) > 1} | scene.schedules.keys() | inside
        if stuck := sorted(varying & self._merged.keys()):
            raise AdapterError(
                f"{', '.join(stuck)} cannot be merged and vary by row, step or region; set one weight, or restore first"
            )
        full = {name: torch.cat([self._weights(name, weight) for weight in values]) for name, values in rows.items()}
        return self._by_part(full)

    def _by_region(self, regions: Sequence[Region]) -> dict[str, Tensor]:
        """Adapter name to weights in the UNet [regions, L]; adapters absent from a region have zeros there."""
        found: dict[str, Tensor] = {}
        for number, region in enumerate(regions):
            full = {name: self._weights(name, weight) for name, weight in region.adapters.items()}
            for name, weights in self._by_part(full)["unet"].items():
                found.setdefault(name, torch.zeros(len(regions), weights.shape[1]))[number] = weights[0]
        return found

    def _weights(self, name: str, weight: Any) -> Tensor:
        return _weights(name, weight, [layer for layers in self._loaded[name].values() for layer in layers])

    def _by_part(self, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        found: dict[str, dict[str, Tensor]] = {part: {} for part in self.parts}
        for name, full in weights.items():
            layers = self._loaded[name]
            for part, piece in zip(layers, full.split([len(each) for each in layers.values()], dim=1), strict=True):
                found[part][name] = piece
        return found

    def _to_merge(self, part: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        layers = {name: self._loaded[name].get(part, ()) for name in self._merged}
        return {name: weights.get(name, torch.zeros(1, len(found))) for name, found in layers.items() if found}

    @torch.no_grad()
    def _retold(self, regions: Sequence[Region]) -> list[dict[str, Tensor]]:
        """The text states of each region's own prompt, read by the text encoders with that region's adapters."""
        told: list[dict[str, Tensor]] = []
        for region in regions:
            told.append({})
            if region.prompt is None:
                continue
            if self.pipe is None:
                raise AdapterError("a region with its own prompt needs a pipeline to read it: make the Blend on one")
            full = {name: self._weights(name, weight) for name, weight in region.adapters.items()}
            for part, weights in self._by_part(full).items():
                if part != "unet":
                    self._voices[part].play({n: w for n, w in weights.items() if n not in self._merged}, {})
            device = self.pipe._execution_device
            states = self.pipe.encode_prompt(
                prompt=region.prompt, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
            told[-1]["encoder_hidden_states"] = states[0]
            if len(states) == 4:  # SDXL: states, negative, pooled, negative pooled
                told[-1]["text_embeds"] = states[2]
        return told

    def _check_loaded(self, wanted: Iterable[str]) -> None:
        for name in wanted:
            if name not in self._loaded:
                near = get_close_matches(name, self._loaded, 1)
                meant = f"did you mean {near[0]!r}? " if near else ""
                have = ", ".join(self._loaded) or "none"
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


def _weights(name: str, weight: Any, layers: list[str]) -> Tensor:
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


def _without(held: Mapping[str, _Held], name: str) -> dict[str, _Held]:
    return {other: value for other, value in held.items() if other != name}


def _with_background(scene: Scene) -> tuple[Region, ...]:
    """The regions, and where they leave something open one more with the scene's own weights."""
    masks = [region.mask for region in scene.regions]
    closed = not masks or any(mask is None or bool((mask > 0).all()) for mask in masks)
    return scene.regions if closed else (*scene.regions, Region(scene.scales))
