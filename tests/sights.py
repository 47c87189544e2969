"""Small random vision transformers of the real classes, and labelled pictures that are easy to tell apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as t
from PIL import Image

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}


def config(kind: str) -> Any:
    """The configuration of a tiny model of this kind."""
    swin = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "image_size": 16, "patch_size": 2}
    made = {
        "vit": lambda: t.ViTConfig(**SMALL, intermediate_size=32),
        "deit": lambda: t.DeiTConfig(**SMALL, intermediate_size=32),
        "dinov2": lambda: t.Dinov2Config(**SMALL),
        "beit": lambda: t.BeitConfig(**SMALL, intermediate_size=32, use_mean_pooling=True),
        "swin": lambda: t.SwinConfig(**swin),
        "clip": lambda: t.CLIPConfig(vision_config={**SMALL, "intermediate_size": 32}),
        "siglip": lambda: t.SiglipConfig(vision_config={**SMALL, "intermediate_size": 32}),
    }
    return made[kind]()


KINDS = ("vit", "deit", "dinov2", "beit", "swin", "clip", "siglip")


def write_model(folder: Path, kind: str = "vit", seed: int = 0) -> Path:
    """A seeded random checkpoint folder, as transformers writes it."""
    torch.manual_seed(seed)
    chosen = config(kind)
    chosen.architectures = ["DeiTForImageClassification"] if kind == "deit" else None
    made: Any = t.AutoModelForImageClassification.from_config(chosen)
    made.save_pretrained(folder)
    return folder


def picture(label: int, seed: int, side: int = 16) -> Image.Image:
    """Noise with a bright bar whose place tells the label."""
    generator = np.random.default_rng(seed)
    values = generator.integers(0, 90, (side, side, 3))
    values[label * side // 3 : label * side // 3 + side // 4] += 150
    return Image.fromarray(values.astype(np.uint8))


def write_classes(folder: Path, count: int = 6, classes: int = 3, first: int = 0) -> Path:
    """A folder of class folders: low, mid, top."""
    for label, name in enumerate(("low", "mid", "top")[:classes]):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(first, first + count):
            picture(label, 100 * label + number).save(folder / name / f"{number}.png")
    return folder
