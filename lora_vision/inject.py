"""The only ways into and out of a model: inject and collect for training, attach and detach for a finished adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from lora_vision import names
from lora_vision.adapter import Adapter
from lora_vision.config import LoraConfig
from lora_vision.errors import AdapterError, BaseModelError
from lora_vision.factors import Factors, LowRank
from lora_vision.layers import LoraLayer, check_wrappable, put, unwrap, wrap
from lora_vision.stack import Stack
from lora_vision.trained import UPS, Trained, factors_of, fresh, is_trained, mapped, plans


@dataclass(frozen=True)
class LoadReport:
    """What became of each layer of an adapter when it met a model.

    Attributes:
        matched: Layers that fit and are adapted.
        unmatched: Layers the model does not have.
        misshapen: Layers of another shape, each with what was found and expected.
        ignored: Things that change no layer here: heads, embeddings, and with ``strict=False`` parts not given.
        family: The base the adapter was made for (``sd1``, ``sd2``, ``sdxl``, ``vit``), as far as its layers tell.
    """

    matched: tuple[str, ...]
    unmatched: tuple[str, ...]
    misshapen: tuple[str, ...]
    ignored: tuple[str, ...]
    family: str | None

    @property
    def complete(self) -> bool:
        """Whether every layer of the adapter found its place."""
        return bool(self.matched) and not self.unmatched and not self.misshapen

    def to_dict(self) -> dict[str, Any]:
        """The report as plain lists, for JSON."""
        return {"complete": self.complete, **asdict(self)}

    def __str__(self) -> str:
        counts = ((len(getattr(self, kind)), kind) for kind in ("matched", "unmatched", "misshapen", "ignored"))
        lines = [f"{', '.join(f'{n} {kind}' for n, kind in counts)}; made for {self.family or 'an unknown base'}"]
        for kind in ("unmatched", "misshapen"):
            some = getattr(self, kind)[:5]
            more = len(getattr(self, kind)) - len(some)
            lines += [f"  {kind}: {name}" for name in some] + ([f"  {kind}: {more} more"] if more else [])
        return "\n".join(lines)


def compare(adapter: Adapter, layers: Mapping[str, nn.Module], strict: bool = True) -> LoadReport:
    """The report of what would fit, touching nothing.

    Args:
        adapter: The adapter.
        layers: True name to module, as ``names.index`` gives them.
        strict: Refuse unless every layer fits.

    Raises:
        AdapterError: With ``strict``, some layer is unmatched or misshapen; always, when nothing at all fits.
    """
    adapter.check_layers()
    parts = {name.partition(".")[0] for name in layers}
    matched, unmatched, misshapen, ignored = [], [], [], list(adapter.extras)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, factors in adapter.layers.items():
        weight = getattr(layers.get(name), "weight", None)
        if weight is None and not strict and name.partition(".")[0] not in parts:
            ignored.append(name)
        elif weight is None:
            unmatched.append(name)
        elif not factors.fits(weight.shape):
            found = factors.size or [tuple(t.shape) for t in factors.tensors().values()]
            misshapen.append(f"{name} (found {found}, expected {tuple(weight.shape)})")
        else:
            matched.append(name)
            shapes[name] = tuple(weight.shape)
    family = names.family({name: shapes.get(name) for name in adapter.layers})
    report = LoadReport(tuple(matched), tuple(unmatched), tuple(misshapen), tuple(ignored), family)
    if not matched or (strict and not report.complete):
        advice = "use another base, or strict=False to take what fits" if matched else "it was made for another base"
        raise AdapterError(f"the adapter does not fit this model ({', '.join(sorted(parts))}): {report}\n{advice}")
    return report


def refuse_unfit(parts: Mapping[str, nn.Module]) -> None:
    """Nothing, unless the parts were changed in a way that adapters would clash with or be bypassed by.

    Raises:
        BaseModelError: PEFT has put its layers in, or diffusers has fused the attention projections.
    """
    for part, model in parts.items():
        for module in model.modules():
            if type(module).__module__.startswith("peft."):
                raise BaseModelError(
                    f"{part} already carries PEFT adapters; remove them first (pipe.unload_lora_weights(), or "
                    "model.unload() for a PeftModel), then load the adapter here instead"
                )
            if "Fused" in type(getattr(module, "processor", None)).__name__:
                raise BaseModelError(
                    f"{part} has fused attention projections, which would bypass adapters on to_q, to_k and to_v; "
                    "call unfuse_qkv_projections() first"
                )


def inject(parts: Mapping[str, nn.Module], config: LoraConfig) -> list[nn.Parameter]:
    """The new trainable parameters, float32, in the model's order; the base is frozen and computes as before.

    A plain pair has ``down`` from U(-1/sqrt(fan_in), 1/sqrt(fan_in)) (Kaiming, as kohya and PEFT do), drawn on the CPU
    from ``config.seed``, and ``up`` zero, so that the model's output does not change by a bit. The other variants begin
    at zero too (``trained.fresh``); PiSSA's zero is a difference, and so holds up to rounding.

    Args:
        parts: Part name to model, for example ``{"unet": unet, "text_encoder": text_encoder}``.
        config: Targets, variant, rank, alpha and seed.

    Raises:
        AdapterError: Numbers or targets make no sense, or a chosen layer cannot be adapted; nothing was changed.
        BaseModelError: The model already carries adapters.
    """
    refuse_unfit(parts)
    layers = names.index(parts)
    refuse_adapted(layers)
    planned = plans(config, layers)
    plain = config.variant in ("lora", "rslora") and not (config.rank_dropout or config.module_dropout)
    for name in planned:
        check_wrappable(name, layers[name])
        if layers[name].weight.device.type == "meta":
            raise BaseModelError(f"{name} has no weights here (offloaded, on the meta device); train without offload")
        if not plain and isinstance(layers[name], nn.Embedding):
            raise AdapterError(f"{name} is an embedding, which only a plain LoRA without dropout can train")
    for model in parts.values():
        model.requires_grad_(False)
    generator = torch.Generator().manual_seed(config.seed)
    found: list[Any] = []  # parameters, all of them
    for name, plan in planned.items():
        layer = wrap(layers[name])
        factors = fresh(config.variant, layer.weight, plan, generator)
        if plain and isinstance(factors, LowRank):
            layer.lora_alpha = factors.alpha
            put(layer, lora_down=nn.Parameter(factors.down), lora_up=nn.Parameter(factors.up.flatten(1)))
        else:
            layer.lora_trained = Trained(factors, config)
        found += factors_of(layer).tensors().values()
    return found


def rates(parts: Mapping[str, nn.Module], config: LoraConfig) -> list[float]:
    """What the learning rate of each of ``inject``'s parameters is multiplied by, in the same order."""
    layers = names.index(parts)
    return [
        plan.rate * (config.up_rate if field in UPS else 1.0)
        for name, plan in plans(config, layers).items()
        for field in factors_of(cast(LoraLayer, layers[name])).tensors()
    ]


def collect(parts: Mapping[str, nn.Module]) -> Adapter:
    """The trained adapter: float32 copies on the CPU of every injected change; the model stays as it is.

    Raises:
        AdapterError: Nothing was injected into these parts.
    """
    found: dict[str, Factors] = {}
    for name, layer in names.index(parts).items():
        if isinstance(layer, LoraLayer) and is_trained(layer):
            change = factors_of(layer) if layer.lora_trained is None else layer.lora_trained.change()
            change = mapped(change, lambda t: t.detach().to("cpu", torch.float32, copy=True))
            if isinstance(change, LowRank):
                change = replace(change, up=change.up.reshape(*change.up.shape[:2], *(1,) * (change.down.dim() - 2)))
            found[name] = change
    if not found:
        raise AdapterError(f"no trained layer in {', '.join(parts)}; call inject before collect")
    return Adapter(found)


def attach(parts: Mapping[str, nn.Module], adapter: Adapter, scale: float = 1.0, *, strict: bool = True) -> LoadReport:
    """The load report; afterwards the model computes with the adapter until ``detach``. For several, see Blend.

    Args:
        parts: Part name to model.
        adapter: What to attach.
        scale: The user's multiplier; 0 is the base, exactly.
        strict: Refuse unless every layer fits.

    Raises:
        AdapterError: It does not fit; nothing was changed.
        BaseModelError: The model already carries adapters.
    """
    refuse_unfit(parts)
    layers = names.index(parts)
    refuse_adapted(layers)
    report = compare(adapter, layers, strict)
    stack = Stack(layers)
    stack.add("adapter", {name: adapter.layers[name] for name in report.matched})
    stack.apply({"adapter": torch.full((1, len(report.matched)), float(scale))})
    return report


def detach(parts: Mapping[str, nn.Module]) -> None:
    """Takes every adapter out: classes, parameters and ``state_dict()`` are what they were before."""
    for model in parts.values():
        for module in model.modules():
            if isinstance(module, LoraLayer):
                unwrap(module)


def refuse_adapted(layers: Mapping[str, nn.Module]) -> None:
    """Nothing, unless one of these layers is wrapped already.

    Raises:
        BaseModelError: It is.
    """
    for name, layer in layers.items():
        if isinstance(layer, LoraLayer):
            raise BaseModelError(f"{name} already carries an adapter; call detach first, or use one Blend for several")
