"""Reading: a file sorted by layer and leaf, before any factors are built."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lora_vision.errors import AdapterError
from lora_vision.formats.leaves import Layers


@dataclass
class Reading:
    """What a codec understood of a file.

    Attributes:
        layers: true layer name -> leaf -> tensor or header entry.
        extras: tensors of no layer: embeddings (`embedding.<token>.<part>`) and heads (`vit.classifier.weight`).
        unknown: keys that name no known layer or no known leaf.
    """

    layers: Layers = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def add(self, key: str, name: str | None, leaf: str | None, value: Any) -> None:
        """Files a tensor under its layer and leaf, or among the unknown when either is None.

        Raises:
            AdapterError: two keys of the file mean the same leaf of the same layer.
        """
        if name is None or leaf is None:
            self.unknown.append(key)
        elif leaf in (leaves := self.layers.setdefault(name, {})):
            raise AdapterError(f"{key!a} is the second {leaf} of layer {name}; expected one spelling of each layer")
        else:
            leaves[leaf] = value

    def merge(self, other: Reading) -> None:
        """Adds what another codec understood of the same file."""
        for name, leaves in other.layers.items():
            for leaf, value in leaves.items():
                self.add(f"{name} ({leaf})", name, leaf, value)
        self.extras.update(other.extras)
        self.unknown += other.unknown
