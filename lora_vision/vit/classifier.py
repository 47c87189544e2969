"""The whole that tells pictures apart: a backbone, an adapter on it, a head, and what its answers mean."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor, nn

from lora_vision.adapter import Adapter
from lora_vision.errors import AdapterError, BaseModelError
from lora_vision.files import load_adapter, save_adapter
from lora_vision.inject import attach
from lora_vision.replacement import Replacement
from lora_vision.vit.backbone import Backbone, load_backbone
from lora_vision.vit.preprocessing import Preprocessing

HEAD = "vit.classifier"
CARD = "lora_vision.vit"
"""Where an adapter's header keeps the domain, as JSON."""


@dataclass(frozen=True)
class Domain:
    """What an adapter's head tells apart, and on which backbone.

    Attributes:
        labels: The classes, by number.
        base: What the backbone was loaded from.
        fingerprint: The backbone's.
        preprocessing: How it wants its pictures.
        temperature: What logits are divided by before they are read as probabilities (Guo et al. 2017).
        numbers: How it did on validation pictures, by name.
    """

    labels: tuple[str, ...]
    base: str
    fingerprint: str
    preprocessing: Preprocessing
    temperature: float = 1.0
    numbers: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        """The text that stands in the adapter's header."""
        values = {name: getattr(self, name) for name in ("labels", "base", "fingerprint", "temperature", "numbers")}
        return json.dumps(values | {"preprocessing": self.preprocessing.to_dict()}, sort_keys=True)

    @classmethod
    def from_adapter(cls, adapter: Adapter) -> Self:
        """The domain in an adapter's header.

        Raises:
            AdapterError: There is none: it is not from `lora-vision train vit`.
        """
        try:
            values: dict[str, Any] = json.loads(adapter.metadata[CARD])
            values["preprocessing"] = Preprocessing.from_dict(values["preprocessing"])
            return cls(**(values | {"labels": tuple(values["labels"])}))
        except (KeyError, ValueError, TypeError) as error:
            raise AdapterError(
                f"no labels and preprocessing in this adapter ({error!r}); expected a file of `lora-vision train vit`"
            ) from error


class Classifier(nn.Module):
    """A backbone with a head.

    Attributes:
        backbone: The frozen transformer, wrapped by whatever adapter acts on it.
        body: Its module.
        head: Features to logits.
    """

    def __init__(self, backbone: Backbone, classes: int, seed: int = 0) -> None:
        """The backbone with a fresh head, drawn from the seed."""
        super().__init__()
        self.backbone = backbone
        self.body = backbone.model
        self.head = nn.Linear(backbone.width, classes)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            self.head.weight.copy_(0.02 * torch.randn(self.head.weight.shape, generator=generator))
            self.head.bias.zero_()

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits [B, C] of pixels [B, 3, H, W] in [0, 1], cut to the model's size."""
        logits: Tensor = self.head(self.backbone.features(pixels))
        return logits

    @torch.no_grad()
    def answers(self, pictures: Iterable[Image.Image], batch_size: int = 32) -> Tensor:
        """Logits [N, C], float32 on the CPU, of pictures; weights and mode stay as they are."""
        training, device = self.training, self.head.weight.device
        self.eval()
        found: list[Tensor] = []
        for batch in batches(pictures, self.backbone.preprocessing, batch_size):
            found.append(self(batch.to(device)).float().cpu())
        self.train(training)
        return torch.cat(found) if found else torch.zeros(0, self.head.out_features)


def batches(pictures: Iterable[Image.Image], how: Preprocessing, size: int) -> Iterable[Tensor]:
    """Pixels [B, 3, H, W] in [0, 1] of up to ``size`` pictures at a time."""
    waiting: list[Tensor] = []
    for picture in pictures:
        waiting.append(how.cut(picture))
        if len(waiting) == size:
            yield torch.stack(waiting).float() / 255
            waiting = []
    if waiting:
        yield torch.stack(waiting).float() / 255


def with_head(adapter: Adapter, head: nn.Linear, domain: Domain, metadata: Mapping[str, str]) -> Adapter:
    """The adapter together with its head and what that means."""
    weight, bias = (t.detach().to("cpu", torch.float32, copy=True) for t in (head.weight, head.bias))
    extras = {f"{HEAD}.weight": weight, f"{HEAD}.bias": bias}
    return replace(adapter, extras=extras, metadata={**metadata, CARD: domain.to_json()})


def without_head(adapter: Adapter) -> tuple[Adapter, Tensor, Tensor]:
    """The adapter alone, and its head: weight [C, width] and bias [C].

    Raises:
        AdapterError: It has none.
    """
    held = adapter.layers.get(HEAD)
    extras = adapter.extras
    if isinstance(held, Replacement) and held.weight is not None and held.new_bias is not None:
        weight, bias = held.weight, held.new_bias
    elif f"{HEAD}.weight" in extras and f"{HEAD}.bias" in extras:
        weight, bias = extras[f"{HEAD}.weight"], extras[f"{HEAD}.bias"]
    else:
        raise AdapterError(f"no head in this adapter ({HEAD}); expected a file of `lora-vision train vit`")
    layers = {name: factors for name, factors in adapter.layers.items() if name != HEAD}
    rest = {name: tensor for name, tensor in extras.items() if not name.startswith(HEAD)}
    return replace(adapter, layers=layers, extras=rest), weight, bias


def save(adapter: Adapter, path: Path) -> Path:
    """The one file written, in PEFT's spelling, with PEFT's settings in its header instead of beside it."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        os.replace(save_adapter(adapter, Path(folder) / "adapter_model.safetensors", "peft"), path)
    return path


def open_domain(source: str | Path | Adapter) -> tuple[Adapter, Domain, Tensor, Tensor]:
    """An adapter without its head, what that head means, and the head's weight [C, width] and bias [C].

    Raises:
        AdapterError: It cannot be read, has no head, or head and labels differ in number.
    """
    whole = source if isinstance(source, Adapter) else load_adapter(source)
    domain = Domain.from_adapter(whole)
    adapter, weight, bias = without_head(whole)
    if not len(domain.labels) == len(weight) == len(bias):
        raise AdapterError(
            f"{len(domain.labels)} labels for a head of {len(weight)} outputs and {len(bias)} biases; "
            "the file was changed after training: train it again"
        )
    return adapter, domain, weight, bias


def check_backbone(backbone: Backbone, domain: Domain, weight: Tensor) -> None:
    """Nothing, if a head and its adapter were made for this backbone.

    Raises:
        BaseModelError: They were not.
    """
    if weight.shape[1] != backbone.width:
        raise BaseModelError(
            f"a head for {weight.shape[1]} features, but {backbone.source} gives {backbone.width}; "
            f"use the backbone it was made for: --base {domain.base}"
        )
    if backbone.fingerprint != domain.fingerprint:
        raise BaseModelError(
            f"the adapter was made for {domain.base} ({domain.fingerprint[:12]}), not for {backbone.source} "
            f"({backbone.fingerprint[:12]}): the weights differ; give the right --base, or train for this one"
        )


def load_classifier(
    source: str | Path | Adapter, base: str | None = None, backbone: Backbone | None = None
) -> tuple[Classifier, Domain]:
    """The classifier as it was trained, and what its answers mean.

    Args:
        source: A file of `lora-vision train vit`, or its Adapter.
        base: What to load the backbone from; by default what the adapter says.
        backbone: One that is loaded already; it must not carry adapters.

    Raises:
        AdapterError: The file cannot be read or does not fit.
        BaseModelError: The backbone cannot be loaded or is another one.
    """
    adapter, domain, weight, bias = open_domain(source)
    backbone = backbone or load_backbone(base or domain.base)
    check_backbone(backbone, domain, weight)
    classifier = Classifier(backbone, len(domain.labels))
    if adapter.layers:
        attach(backbone.parts, adapter)
    with torch.no_grad():
        classifier.head.weight.copy_(weight)
        classifier.head.bias.copy_(bias)
    return classifier.eval(), domain


def probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Calibrated probabilities [N, C] of logits [N, C]."""
    return (logits / temperature).softmax(-1)


def ranked(logits: Tensor, domain: Domain, top: int) -> list[list[dict[str, Any]]]:
    """For each row the most probable labels with their probabilities, best first."""
    found = probabilities(logits, domain.temperature).topk(min(top, len(domain.labels)))
    return [
        [
            {"label": domain.labels[at], "probability": round(p, 4)}
            for p, at in zip(row.tolist(), ats.tolist(), strict=True)
        ]
        for row, ats in zip(found.values, found.indices, strict=True)
    ]


def label_names(labels: Sequence[str]) -> dict[str, Any]:
    """The labels as a transformers configuration keeps them."""
    return {"id2label": dict(enumerate(labels)), "label2id": {name: at for at, name in enumerate(labels)}}
