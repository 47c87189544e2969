"""Settings of the commands for vision transformers: the text below a field is its help line, as in config.py."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from lora_vision.config import FitConfig, Precision

Augmentation = Literal["auto", "none", "light", "medium", "strong"]
SEEN = 9000
"""Pictures a run looks at by default, as often as they come round; large sets are still seen three times."""


@dataclass(frozen=True, kw_only=True)
class LearningConfig:
    """How a classifier learns from pictures."""

    data: str
    """Folder with one folder of pictures for each class (inside train, val and test where splits are given), or a .csv
    or metadata.jsonl with file_name, label and perhaps split."""
    base: str = "tiny-vit"
    """Vision transformer to adapt: tiny-vit, a transformers folder, a Hub id, or timm:NAME."""
    targets: str = "attention"
    """Layers to adapt: named sets joined by + (attention, qv, attention+ff) or globs."""
    head_learning_rate: float | None = None
    """Highest learning rate of the head (default: that of the adapter)."""
    label_smoothing: float = 0.1
    """Share of certainty that is taken from the right label and spread over all."""
    class_weights: bool = True
    """Weigh classes so that each counts the same, however many pictures it has."""
    augment: Augmentation = "auto"
    """How much pictures are varied while training (auto: the fewer pictures a class, the more)."""
    mirror: bool = True
    """Also show pictures mirrored left to right; not for digits, text or anything that has a side."""
    holdout: float = 0.2
    """Share of each class kept out of training to validate on, where no split is given."""
    few: int | None = None
    """Train on so many pictures of each class only."""


def _check(config: Any, least: dict[str, float], below: dict[str, float] | None = None) -> None:
    """Nothing, unless a number is too small or too large.

    Raises:
        ValueError: It is.
    """
    for name, lowest in least.items():
        value = getattr(config, name)
        if value is not None and value != "auto" and not lowest <= value < (below or {}).get(name, math.inf):
            limit = f" and below {below[name]:g}" if below and name in below else ""
            raise ValueError(f"--{name.replace('_', '-')} {value}: at least {lowest:g}{limit} is needed")


@dataclass(frozen=True, kw_only=True)
class VitConfig(FitConfig, LearningConfig):
    """Adapt a vision transformer to a domain: pictures in class folders in, one adapter with its head out."""

    output: str
    """The file to write, ending in .safetensors: adapter, head, labels and preprocessing."""
    rank: int | Literal["auto"] = 16
    """Rank of each layer's change; auto: train at 32, then cut each layer to what it needs."""
    energy: float = 0.95
    """For --rank auto: share of each layer's change that is kept, raised where validation says it was too little."""
    alpha: float | None = None
    """The change is multiplied by alpha / rank (default: the rank, hence by 1)."""
    patience: int = 8
    """Looks at the held-out pictures without an improvement after which training stops; 0 never stops."""
    keep: Literal["last", "best"] = "best"
    """Which weights become the adapter: those after the last step, or those best on the held-out pictures."""
    sample_every: int | None = 0
    """Steps between two sheets of the held-out pictures it gets most wrong; 0 draws none."""
    validate_every: int = 20
    """Steps between two looks at the held-out pictures; 0 never looks."""

    def __post_init__(self) -> None:
        least = dict.fromkeys(("steps", "batch_size", "accumulate", "rank", "few"), 1.0)
        least |= dict.fromkeys(("holdout", "warmup", "weight_decay", "clip", "label_smoothing", "energy"), 0.0)
        least |= dict.fromkeys(("ema", "patience", "validate_every", "sample_every", "checkpoint_every"), 0.0)
        _check(self, least, dict.fromkeys(("ema", "holdout", "warmup", "label_smoothing"), 1.0) | {"energy": 1.0001})
        for name in ("learning_rate", "head_learning_rate", "alpha"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} {value}: a number above 0 is needed")
        if not self.output.endswith(".safetensors"):
            raise ValueError(f"--output {self.output}: a name ending in .safetensors is needed")

    def filled(self, pictures: int, width: int) -> Self:
        """This configuration with everything the user left open taken from the size of the data and of the model.

        Args:
            pictures: How many there are to train on.
            width: Of the transformer: wider ones learn at a lower rate.
        """
        batch = self.batch_size or min(32, max(4, pictures // 8))
        seen = max(SEEN, 3 * pictures)
        rate = self.learning_rate or self.rate_of_optimizer(2e-3 if width < 384 else 5e-4)
        return replace(
            self,
            batch_size=batch,
            steps=self.steps or max(1, seen // (batch * self.accumulate)),
            learning_rate=rate,
            head_learning_rate=self.head_learning_rate or rate,
        )


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig:
    """Say what pictures show, with one adapter or, each picture by its own, with several."""

    pictures: tuple[str, ...]
    """Picture files, or folders of them."""
    adapter: tuple[str, ...] = ()
    """Adapter file of `train vit`; with several, all of them answer for every picture in one batch."""
    base: str | None = None
    """The transformer it was made for (default: what the adapter says)."""
    top: int = 3
    """How many labels to tell."""
    batch_size: int = 32
    """Pictures looked at together."""

    def __post_init__(self) -> None:
        if not self.pictures:
            raise ValueError("no picture: name files or folders")
        if not self.adapter:
            raise ValueError("--adapter is missing: name a file of `lora-vision train vit`")
        _check(self, {"top": 1, "batch_size": 1})


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure an adapter on labelled pictures: numbers, plots, predictions and the worst mistakes, in a folder."""

    adapter: str
    """Adapter file of `train vit`."""
    data: str
    """Labelled pictures, as for training: of given splits the test pictures are taken, else all."""
    output: str
    """Folder to write."""
    base: str | None = None
    """The transformer it was made for (default: what the adapter says)."""
    split: Literal["auto", "train", "val", "test", "all"] = "auto"
    """Which pictures to measure on (auto: test where it is given, else all)."""
    batch_size: int = 32
    """Pictures looked at together."""

    def __post_init__(self) -> None:
        _check(self, {"batch_size": 1})


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write the adapted transformer for programs that know nothing of adapters."""

    adapter: str
    """Adapter file of `train vit`."""
    output: str
    """Folder that plain transformers opens or, ending in .onnx, an ONNX file (extra onnx)."""
    base: str | None = None
    """The transformer it was made for (default: what the adapter says)."""


@dataclass(frozen=True, kw_only=True)
class CompareMethodsConfig(LearningConfig):
    """Train a linear probe, LoRA and full fine-tuning on your data under one budget, and say which to take."""

    output: str = "methods"
    """Folder to write: methods.md, methods.png, methods.json."""
    ranks: tuple[int, ...] = (4, 16)
    """Ranks of LoRA to try."""
    seeds: int = 3
    """Runs of each method; where no test pictures are given, each run is tested on another fold."""
    steps: int | None = None
    """Optimizer steps of every run (default: by the number of pictures)."""
    batch_size: int | None = None
    """Pictures in one micro-batch (default: by the number of pictures)."""
    learning_rate: float | None = None
    """Highest learning rate of LoRA and of the heads (default: by the width of the model)."""
    full_learning_rate: float | None = None
    """Highest learning rate of the whole model in full fine-tuning (default: a quarter of LoRA's)."""
    precision: Precision = "auto"
    """Arithmetic of training."""

    def __post_init__(self) -> None:
        _check(self, dict.fromkeys(("seeds", "steps", "batch_size", "few"), 1.0))
        if not self.ranks or min(self.ranks) < 1:
            raise ValueError("--ranks: ranks of at least 1 are needed")
