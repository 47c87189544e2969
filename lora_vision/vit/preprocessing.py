"""How a vision transformer wants its pictures: read from its own configuration, kept in the adapter's file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lora_vision.errors import BaseModelError

TIMM_FILTERS = {"nearest": 0, "bilinear": 2, "bicubic": 3}


@dataclass(frozen=True)
class Preprocessing:
    """From a picture to what the model sees.

    Attributes:
        size: Height and width the model sees (pixels).
        resize: What pictures are scaled to first: height and width, or one number, the shorter side. Then the middle
            is cut out.
        resample: Pillow's number of the filter.
        mean, std: What is subtracted from, and then divides, each colour in [0, 1].
    """

    size: tuple[int, int]
    resize: tuple[int, int] | int
    resample: int = 3
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @classmethod
    def from_transformers(cls, config: Mapping[str, Any], side: int) -> Self:
        """The preprocessing a ``preprocessor_config.json`` describes.

        Args:
            config: Its content; empty where the model has none.
            side: The side of the model's pictures, for what the file leaves open.

        Raises:
            BaseModelError: It scales pictures in a way that is not known here.
        """
        cropped = config.get("do_center_crop", False)
        wanted: tuple[int, int] | int = (side, side)
        if config.get("do_resize", True) and config.get("size") is not None:
            wanted = _sides(config["size"], square=not cropped)
        size = _sides(config["crop_size"]) if cropped and config.get("crop_size") else wanted
        if isinstance(size, int):
            size = (size, size)
        normalised = config.get("do_normalize", True)
        mean, std = (config.get(f"image_{name}") if normalised else None for name in ("mean", "std"))
        return cls(
            size=size,
            resize=wanted,
            resample=int(config.get("resample", 3)),
            mean=tuple(mean or ((0.5,) * 3 if normalised else (0.0,) * 3)),
            std=tuple(std or ((0.5,) * 3 if normalised else (1.0,) * 3)),
        )

    @classmethod
    def from_timm(cls, config: Mapping[str, Any]) -> Self:
        """The preprocessing of a timm model's ``pretrained_cfg``."""
        _, height, width = config["input_size"]
        shorter = round(min(height, width) / (config.get("crop_pct") or 1.0))
        return cls(
            size=(height, width),
            resize=(height, width) if config.get("crop_mode") == "squash" else shorter,
            resample=TIMM_FILTERS.get(config.get("interpolation", "bicubic"), 3),
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The preprocessing that ``to_dict`` described."""
        plain: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**plain)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the adapter's header."""
        return asdict(self)

    def cut(self, picture: Image.Image) -> Tensor:
        """The bytes [3, H, W] of an RGB picture, scaled and cut to the model's size."""
        width, height = picture.size
        if isinstance(self.resize, int):
            short = min(width, height)
            to = tuple(self.resize if side == short else int(self.resize * side / short) for side in (width, height))
        else:
            to = self.resize[::-1]
        scaled = picture.resize((to[0], to[1]), Image.Resampling(self.resample))
        height, width = self.size
        left, top = (to[0] - width) // 2, (to[1] - height) // 2
        if (to[1], to[0]) != self.size:
            scaled = scaled.crop((left, top, left + width, top + height))
        return torch.from_numpy(np.array(scaled, dtype=np.uint8)).permute(2, 0, 1)

    def normalised(self, pixels: Tensor) -> Tensor:
        """What the model sees [B, 3, H, W] of pixels [B, 3, H, W] in [0, 1]."""
        mean, std = (torch.tensor(v, device=pixels.device).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (pixels - mean) / std


def _sides(value: Any, square: bool = True) -> tuple[int, int] | int:
    """Height and width, or the shorter side, as transformers' configurations say it in many ways."""
    match value:
        case int():
            return (value, value) if square else value
        case {"height": int(height), "width": int(width)}:
            return height, width
        case {"shortest_edge": int(side)}:
            return side
        case [int(height), int(width)]:
            return height, width
    raise BaseModelError(f"the model scales its pictures to {value!r}; expected height and width, or a shortest edge")
