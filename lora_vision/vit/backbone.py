"""A vision transformer without its head: loaded from transformers or timm, told apart by its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_vision import names
from lora_vision.errors import BaseModelError
from lora_vision.vit.preprocessing import Preprocessing

EMBEDDED = {"tiny-vit": Path(__file__).parent.parent / "tiny" / "vit"}
KINDS = "ViT, DeiT, DINOv2, BEiT, Swin, CLIP or SigLIP"
EXPECTED = f"{', '.join(EMBEDDED)}, a transformers folder or Hub id of a {KINDS}, timm:NAME"
HEADS = ("classifier", "head")
"""What transformers and timm call the head."""


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen vision transformer; calling its model gives features where logits were.

    Attributes:
        model: The module, with nothing in the head's place.
        width: How many features it gives.
        preprocessing: How it wants its pictures.
        source: What it was loaded from.
        fingerprint: Hash of its weights, the same in fp32 and fp16, whatever its head.
        old_head: The head it came with, or None; its labels.
        old_labels: What that head tells apart, by number; empty without a head.
    """

    model: nn.Module
    width: int
    preprocessing: Preprocessing
    source: str
    fingerprint: str
    old_head: nn.Linear | None = None
    old_labels: tuple[str, ...] = ()

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The part that adapters act on."""
        return {"vit": self.model}

    def features(self, pixels: Tensor) -> Tensor:
        """Features [B, width] of pixels [B, 3, H, W] in [0, 1], cut to the model's size."""
        found = self.model(self.preprocessing.normalised(pixels))
        return found if isinstance(found, Tensor) else cast(Tensor, found.logits)


class Qkv(nn.Module):
    """A fused projection to queries, keys and values as three layers, so that each can be adapted alone.

    They share the memory of the fused weight. Input [B, T, I], output [B, T, 3·I].
    """

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        for name, weight in zip("qkv", fused.weight.detach().chunk(3), strict=True):
            layer = nn.Linear(fused.in_features, len(weight), bias=fused.bias is not None, device="meta")
            layer.weight = nn.Parameter(weight, requires_grad=False)
            self.add_module(name, layer)
        if fused.bias is not None:
            for part, bias in zip(self.children(), fused.bias.detach().chunk(3), strict=True):
                part.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.children()], -1)

    def fused(self) -> nn.Linear:
        """One layer again, with the three weights as they are now."""
        layers = [cast(nn.Linear, layer) for layer in self.children()]
        first = layers[0]
        whole = nn.Linear(first.in_features, sum(layer.out_features for layer in layers), first.bias is not None)
        with torch.no_grad():
            whole.weight.copy_(torch.cat([layer.weight for layer in layers]))
            if first.bias is not None:
                whole.bias.copy_(torch.cat([layer.bias for layer in layers]))
        return whole.requires_grad_(False)


def split_qkv(model: nn.Module) -> int:
    """How many fused projections (``attn.qkv``, as timm has them) were turned into three layers each.

    Raises:
        BaseModelError: They are no plain layers: timm's BEiT and EVA add biases of their own to the bare weight.
    """
    found = [(n, m) for n, m in model.named_modules() if n.endswith("attn.qkv") and isinstance(m, nn.Linear)]
    for name, _ in found:
        attention = model.get_submodule(name.rpartition(".")[0])
        if getattr(attention, "q_bias", None) is not None:
            raise BaseModelError(f"{name} is used without its layer; expected a ViT whose attention calls qkv(x)")
    for name, module in found:
        model.set_submodule(name, Qkv(module))
    return len(found)


def join_qkv(model: nn.Module) -> None:
    """Turns the three layers of each projection into the fused one that was there before."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Qkv):
            model.set_submodule(name, module.fused())


def load_backbone(name: str | Path) -> Backbone:
    """The vision transformer called `name`, in evaluation mode, frozen, on the CPU, in fp32.

    Raises:
        BaseModelError: There is no such model, it is no vision transformer with room for a head, or lacks weights.
    """
    name = str(name)
    if name.startswith("timm:"):
        return _from_timm(name)
    path = EMBEDDED.get(name, Path(name).expanduser())
    if name in EMBEDDED and not path.is_dir():
        raise BaseModelError(
            f"{name} is not in this package; make it with train_tiny_vit and give its folder as --base, "
            f"or give another {KINDS}"
        )
    if not path.is_dir() and (path.suffix or path.is_absolute() or name.count("/") != 1):
        raise BaseModelError(f"there is no vision transformer {name!r}; expected {EXPECTED}")
    return _from_transformers(str(path) if path.is_dir() else name, name)


def _from_transformers(place: str, source: str) -> Backbone:
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(place)
        vision = getattr(config, "vision_config", config)
        if hasattr(vision, "vision_use_head"):
            vision.vision_use_head = False  # SigLIP's pooling head: a classifier reads the mean of the patches instead
        if config.model_type == "deit":  # a distilled one has two heads; one fresh head reads its first token
            config.architectures = ["DeiTForImageClassification"]
        model, missing = _opened(place, config)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise BaseModelError(f"{source} cannot be loaded: {line}; expected {EXPECTED}") from error
    lacking = sorted(key for key in missing if key.split(".")[0] not in HEADS)
    if lacking:
        raise BaseModelError(f"{source} lacks {len(lacking)} of its weights ({lacking[0]}, ...); expected {EXPECTED}")
    fresh = any(key.split(".")[0] in HEADS for key in missing)
    labels = () if fresh else tuple(str(config.id2label[at]) for at in range(config.num_labels))
    side = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
    preprocessing = Preprocessing.from_transformers(_preprocessor(place), side)
    return _backbone(model, preprocessing, source, labels)


def _opened(place: str, config: Any) -> tuple[Any, set[str]]:
    """The classification model of a folder or Hub id, and the weights it lacks."""
    from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
    from transformers.utils import logging

    whole: Any = AutoModelForImageClassification
    tower_of: Any = AutoModel
    configs: Any = AutoConfig
    options = {"config": config, "dtype": torch.float32, "output_loading_info": True}
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        if not str(config.model_type).endswith("_vision_model"):
            model, found = whole.from_pretrained(place, **options)
            return model, set(found["missing_keys"])
        tower, found = tower_of.from_pretrained(place, **options)  # CLIP's or SigLIP's without the text
        kind = str(config.model_type).removesuffix("_vision_model")
        model = whole.from_config(configs.for_model(kind, vision_config=config.to_dict()))
        model.vision_model = tower
        return model, {*found["missing_keys"], "classifier.weight"}
    finally:
        if bars:
            logging.enable_progress_bar()


def _preprocessor(place: str) -> Mapping[str, Any]:
    """What `preprocessor_config.json` says, or nothing where there is none."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        kind: Any = ImageProcessingMixin
        found: dict[str, Any] = kind.get_image_processor_dict(place)[0]
        return found
    except OSError:
        return {}


def _from_timm(name: str) -> Backbone:
    try:
        import timm
    except ImportError as error:
        raise BaseModelError(f"{name} needs timm ({error}): pip install 'lora-vision[timm]'") from error
    short = name.removeprefix("timm:")
    try:
        model = timm.create_model(short, pretrained=not short.endswith("@random"))
    except (RuntimeError, OSError, ValueError) as error:
        raise BaseModelError(f"{name} cannot be loaded: {str(error).splitlines()[0][:200]}") from error
    return of_timm(model, name)


def of_timm(model: Any, source: str) -> Backbone:
    """The backbone of a timm model, its fused projections split."""
    return _backbone(model, Preprocessing.from_timm(model.pretrained_cfg), source, ())


def _backbone(model: Any, preprocessing: Preprocessing, source: str, labels: tuple[str, ...]) -> Backbone:
    """The backbone of a model whose head is taken off."""
    name = next((name for name in HEADS if isinstance(getattr(model, name, None), nn.Linear)), None)
    if name is None:
        raise BaseModelError(f"{source} is a {type(model).__name__} without a linear head; expected {EXPECTED}")
    head = getattr(model, name)
    setattr(model, name, nn.Identity())
    model.eval().requires_grad_(False)
    mark = fingerprint(model)
    split_qkv(model)
    return Backbone(model, head.in_features, preprocessing, source, mark, head if labels else None, labels)


def fingerprint(model: nn.Module, samples: int = 256) -> str:
    """Hash (hex) of the checkpoint names, shapes and evenly spaced values of a vision transformer, rounded to fp16."""
    rows = {}
    for name, weight in model.state_dict().items():
        path, _, leaf = name.rpartition(".")
        if weight.is_floating_point():
            rows[f"{names.classic('vit', path)}.{leaf}"] = weight
    digest = hashlib.sha256()
    for name, weight in sorted(rows.items()):
        flat = weight.detach().flatten()
        chosen = flat[:: max(1, flat.numel() // samples)].to("cpu", torch.float16)
        digest.update(json.dumps([name, list(weight.shape)]).encode())
        digest.update(chosen.contiguous().numpy().tobytes())
    return digest.hexdigest()
