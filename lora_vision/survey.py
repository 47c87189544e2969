"""What a set of pictures looks like to training, told before it begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_vision.data import SUFFIXES, Picture, PictureSet, Size

OTHERS = (".gif", ".bmp", ".tif", ".tiff", ".heic", ".avif", ".jxl")
ALIKE = 4.0  # mean difference of two thumbnails, of 255
MOST_COMPARED = 5000


@dataclass(frozen=True)
class Survey:
    """The report.

    Attributes:
        facts: Numbers, sizes, what is cut away.
        doubts: What its owner may want to change, with the files' names.
    """

    facts: tuple[str, ...]
    doubts: tuple[str, ...]


def survey(
    pictures: PictureSet, groups: Mapping[Size, Sequence[Picture]], resolution: int, tokenizers: Mapping[str, Any]
) -> Survey:
    """The report on these pictures, trained in groups of one size each.

    Args:
        pictures: The set.
        groups: All its pictures by the height and width at which they are trained.
        resolution: Side of a square picture.
        tokenizers: Those of the base's text encoders.
    """
    different = len(set(pictures.train))
    shown_once = {picture for group in groups.values() for picture in group if not picture.flipped}
    every = sorted(shown_once, key=lambda picture: picture.path)
    sizes = sorted({picture.size for picture in every}, key=lambda size: (size[0] * size[1], size))
    span = " to ".join(dict.fromkeys(_named(size) for size in (sizes[0], sizes[-1])))
    shown = [f"{len(set(group))} at {_named(size)}" for size, group in groups.items()]
    more = f" and {len(shown) - 8} more sizes" if len(shown) > 8 else ""
    cut = max(_cut(picture.size, size) for size, group in groups.items() for picture in group)
    passes = "" if different == len(pictures.train) else f" ({len(pictures.train)} in each pass)"
    facts = (
        f"{different} pictures to learn from{passes}, {len(pictures.held_out)} held out, {span} pixels",
        f"trained: {', '.join(shown[:8])}{more}; at most {cut:.0%} of a picture is cut off at its rim",
    )
    small = [p for size, group in groups.items() for p in group if size[0] * size[1] < 0.6 * resolution**2]
    doubts = [
        *_doubt(small, f"far smaller than {resolution}x{resolution}, and trained so without --upscale"),
        *(f"{one.path.name} and {other.path.name} look alike" for one, other in _alike(every)[:10]),
        *_caption_doubts(every, pictures.trigger, tokenizers),
        *_doubt(_left_out(every), f"left out: only {', '.join(SUFFIXES)} are read"),
    ]
    return Survey(facts, tuple(doubts))


def _named(size: Size) -> str:
    return f"{size[1]}x{size[0]}"


def _cut(size: Size, shown: Size) -> float:
    """The share of a picture that is cut off where it covers the shown size."""
    ratio = size[1] / size[0] * shown[0] / shown[1]
    return 1 - min(ratio, 1 / ratio)


def _doubt(which: Sequence[Picture | Path], what: str) -> list[str]:
    """One line on some pictures, if there are any."""
    names = list(dict.fromkeys((each.path if isinstance(each, Picture) else each).name for each in which))
    if not names:
        return []
    listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return [f"{len(names)} {'picture is' if len(names) == 1 else 'pictures are'} {what}: {listed}"]


def _alike(pictures: Sequence[Picture]) -> list[tuple[Picture, Picture]]:
    """Pairs of pictures, not the same files, whose thumbnails hardly differ."""
    pictures = pictures[:MOST_COMPARED]
    looks = torch.tensor([list(picture.look) for picture in pictures], dtype=torch.float32)
    near = torch.cdist(looks, looks, p=1) < ALIKE * looks.shape[1]
    pairs = [(pictures[i], pictures[j]) for i, j in near.triu(1).nonzero().tolist()]
    return [(one, other) for one, other in pairs if one.digest != other.digest]


def _caption_doubts(pictures: Sequence[Picture], trigger: str | None, tokenizers: Mapping[str, Any]) -> list[str]:
    """Lines on captions that are missing or longer than the text encoder reads."""
    bare = [picture for picture in pictures if picture.caption in ("", trigger) and not picture.prior]
    missing = _doubt(bare, "without a caption of their own") if len(bare) < len(pictures) else []
    tokenizer = next(iter(tokenizers.values()))
    most = tokenizer.model_max_length
    long = [p for p in pictures if len(tokenizer(p.caption, truncation=False).input_ids) > most]
    return missing + _doubt(long, f"captioned with more than {most} tokens, of which the rest is not read")


def _left_out(pictures: Sequence[Picture]) -> list[Path]:
    """Files beside the pictures that other programs open as pictures."""
    folders = dict.fromkeys(picture.path.parent for picture in pictures)
    return [path for folder in folders for path in sorted(folder.iterdir()) if path.suffix.lower() in OTHERS]
