"""Many domains on one backbone: adapters with heads, answering one mixed batch, each row by its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lora_vision.adapter import Adapter
from lora_vision.blend import Blend
from lora_vision.errors import AdapterError
from lora_vision.vit.backbone import Backbone
from lora_vision.vit.classifier import Domain, batches, check_backbone, open_domain


class Domains:
    """Adapters with their heads on one backbone.

    Attributes:
        backbone: The transformer, untouched.
        domains: What each head means, by name.
    """

    def __init__(self, backbone: Backbone) -> None:
        """No domain yet."""
        self.backbone = backbone
        self.domains: dict[str, Domain] = {}
        self._heads: dict[str, tuple[Tensor, Tensor]] = {}
        self._blend = Blend(backbone.parts)
        config: Any = getattr(backbone.model, "config", None)
        self._windows = getattr(config, "model_type", "") == "swin"  # its layers see windows, not pictures, as rows

    def load(self, source: str | Path | Adapter, name: str) -> Domain:
        """What the head of an adapter means; it answers under this name from now on.

        Raises:
            AdapterError: It cannot be read or does not fit, or the name is taken.
            BaseModelError: It was made for another backbone.
        """
        if name in self.domains:
            raise AdapterError(f"a domain called {name!r} is loaded already; choose another name")
        adapter, domain, weight, bias = open_domain(source)
        check_backbone(self.backbone, domain, weight)
        if adapter.layers:
            self._blend.load(adapter, name, scale=0.0)
        device = next(self.backbone.model.parameters()).device
        self.domains[name], self._heads[name] = domain, (weight.float().to(device), bias.float().to(device))
        return domain

    @torch.no_grad()
    def answers(self, pixels: Tensor, names: Sequence[str]) -> list[Tensor]:
        """For each row its logits [C of its domain], float32 on the CPU.

        Args:
            pixels: Pictures [B, 3, H, W] in [0, 1], cut to the model's size.
            names: The domain that answers for each row, B of them.

        Raises:
            AdapterError: A name is not loaded, or there are more or fewer than rows.
        """
        if strange := set(names) - set(self.domains):
            raise AdapterError(f"no domain called {sorted(strange)[0]!r}; loaded: {', '.join(self.domains) or 'none'}")
        if len(names) != len(pixels):
            raise AdapterError(f"{len(names)} names for {len(pixels)} pictures; expected one for each")
        adapted = [name for name in dict.fromkeys(names) if name in self._blend.adapters]
        if self._windows and len(set(names)) > 1:
            found: list[Tensor] = [torch.empty(0)] * len(names)
            for name in dict.fromkeys(names):
                rows = [row for row, each in enumerate(names) if each == name]
                for row, logits in zip(rows, self.answers(pixels[rows], [name] * len(rows)), strict=True):
                    found[row] = logits
            return found
        alone = len(set(names)) == 1
        weights: dict[str, Any] = {n: 1.0 if alone else [float(each == n) for each in names] for n in adapted}
        with self._blend.using(weights):
            features = self.backbone.features(pixels).float()
        pairs = zip(features, names, strict=True)
        return [torch.addmv(self._heads[name][1], self._heads[name][0], row).cpu() for row, name in pairs]

    def answer_all(self, pictures: Iterable[Image.Image], batch_size: int = 32) -> dict[str, Tensor]:
        """Logits [N, C] of every domain for every picture, all domains in one batch."""
        found: dict[str, list[Tensor]] = {name: [] for name in self.domains}
        names = list(self.domains)
        device = next(self.backbone.model.parameters()).device
        for batch in batches(pictures, self.backbone.preprocessing, max(1, batch_size // len(names))):
            rows = [name for name in names for _ in batch]
            logits = self.answers(batch.repeat(len(names), 1, 1, 1).to(device), rows)
            for name, each in zip(rows, logits, strict=True):
                found[name].append(each)
        return {name: torch.stack(rows) for name, rows in found.items()}

    def detach(self) -> None:
        """Takes every adapter out; the backbone is what it was."""
        self._blend.detach()
        self.domains, self._heads = {}, {}
