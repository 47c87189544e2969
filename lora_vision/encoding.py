"""Pictures and captions encoded once: latents, text states, masks, in groups of one size each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from lora_vision.base import Base, TextStates, fingerprint_of
from lora_vision.buckets import by_size
from lora_vision.cache import Cache, Entry
from lora_vision.captions import without
from lora_vision.data import Picture, Size, crop_offset, load_mask, load_pixels
from lora_vision.errors import DataError

T = TypeVar("T")
PIXELS_AT_ONCE = 8 * 512 * 512


def chunks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """The items in runs of at most `size`."""
    return [items[start : start + size] for start in range(0, len(items), size)]


@dataclass(frozen=True)
class EncodedPictures:
    """N pictures of one size as the UNet sees them, on the CPU.

    Attributes:
        mean: Of each picture's latents [N, C, h, w].
        std: Standard deviation of the same.
        captions: N captions.
        text: Text states of the captions; None where captions are encoded as they come.
        time_ids: SDXL's sizes and crops [N, 6]; None for SD 1.x and 2.x.
        mask: How much each latent counts [N, 1, h, w]; None where all do.
        weight: How much each picture counts [N]; None where all count alike.
        plain: N captions without the trigger, and their states where captions have theirs; None where not asked for.
    """

    mean: Tensor
    std: Tensor
    captions: tuple[str, ...]
    text: TextStates | None
    time_ids: Tensor | None
    mask: Tensor | None = None
    weight: Tensor | None = None
    plain: tuple[tuple[str, ...], TextStates | None] | None = None

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self.mean)


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How pictures are encoded.

    Attributes:
        resolution: Side of a square picture in pixels; others keep their shape and about its area.
        upscale: Enlarge smaller pictures.
        keep_captions: Leave the captions as words, for a text encoder that is trained or captions that change.
        prior_weight: What pictures of what shall stay count against the others.
        plain_of: The trigger without which the captions are wanted too; None where they are not.
        cache: Where encoded pictures and captions are kept.
        quiet: Show no progress bar.
    """

    resolution: int
    upscale: bool = False
    keep_captions: bool = False
    prior_weight: float = 1.0
    plain_of: str | None = None
    cache: Cache = Cache(None)
    quiet: bool = False


def step_of(base: Base) -> int:
    """What the sides of a picture are multiples of: the pixels of one latent in the UNet's smallest map."""
    return base.factor * int(2 ** (len(base.unet.config.block_out_channels) - 1))


def encode(base: Base, pictures: Sequence[Picture], how: Encoding) -> list[EncodedPictures]:
    """The pictures' latents and, unless the captions are kept as they are, their text states: a group for each size.

    Raises:
        DataError: Where a picture cannot be read or its latents are not finite, named.
    """
    groups = by_size(pictures, how.resolution, step_of(base), upscale=how.upscale)
    return [_encode_group(base, group, size, how) for size, group in groups.items()]


def _encode_group(base: Base, pictures: Sequence[Picture], size: Size, how: Encoding) -> EncodedPictures:
    """The pictures of one size, each different one encoded once."""
    distinct = list(dict.fromkeys(pictures))
    place = {picture: index for index, picture in enumerate(distinct)}
    rows = torch.tensor([place[picture] for picture in pictures])
    latents = encode_latents(base, distinct, size, how)
    mean, std = (torch.stack([each[name] for each in latents])[rows] for name in ("mean", "std"))
    captions = tuple(picture.caption for picture in pictures)
    time_ids, mask, weight, plain = cast(tuple[Any, ...], (None,) * 4)
    if base.family == "sdxl":
        crops = [crop_offset(picture.size, size) for picture in pictures]
        ids = [[*picture.size, *crop, *size] for picture, crop in zip(pictures, crops, strict=True)]
        time_ids = torch.tensor(ids, dtype=torch.float32)
    if any(picture.mask for picture in pictures):
        mask = torch.stack([load_mask(picture, size) for picture in distinct])[rows]
        mask = F.interpolate(mask, mean.shape[2:], mode="area")
    if any(picture.prior for picture in pictures):
        weight = torch.tensor([how.prior_weight if picture.prior else 1.0 for picture in pictures])
    text = None if how.keep_captions else encode_captions(base, captions, how.cache)
    if how.plain_of is not None:
        words = tuple(without(caption, how.plain_of) for caption in captions)
        plain = (words, None if how.keep_captions else encode_captions(base, words, how.cache))
    return EncodedPictures(mean, std, captions, text, time_ids, mask, weight, plain)


@torch.no_grad()
def encode_latents(base: Base, pictures: Sequence[Picture], size: Size, how: Encoding) -> list[Entry]:
    """Mean and std of each picture's latents [C, h, w] at that size, on the CPU, from the cache where it has them.

    Raises:
        DataError: Where a picture cannot be read or its latents are not finite, named.
    """
    vae = "" if how.cache.folder is None else fingerprint_of({"vae": base.vae})
    keys = [["latents", vae, str(base.vae.dtype), each.digest, size, each.flipped] for each in pictures]

    def make(missing: list[int]) -> list[Entry]:
        found = []
        parts = chunks([pictures[index] for index in missing], min(32, max(1, PIXELS_AT_ONCE // math.prod(size))))
        for chunk in tqdm(parts, desc="encoding pictures", delay=2, leave=False, disable=how.quiet):
            pixels = torch.stack([load_pixels(picture.path, size, flipped=picture.flipped) for picture in chunk])
            mean, std = base.encode_pictures(pixels)
            for picture, latents in zip(chunk, mean, strict=True):
                if not latents.isfinite().all():
                    raise DataError(
                        f"the VAE makes no finite latents of {picture.path}; remove it, or load the VAE in fp32"
                    )
            found += [{"mean": m, "std": s} for m, s in zip(mean.float().cpu(), std.float().cpu(), strict=True)]
        return found

    return how.cache.entries(keys, make, "latents")


@torch.no_grad()
def encode_captions(
    base: Base, captions: Sequence[str], cache: Cache = Encoding.cache, batch_size: int = 32
) -> TextStates:
    """Text states of the captions on the CPU, each different caption computed once, or taken from the cache."""
    distinct = sorted(set(captions))
    encoders = {name: base.parts[name] for name in base.tokenizers}
    of = [] if cache.folder is None else [fingerprint_of(encoders), str(next(base.unet.parameters()).dtype)]

    def make(missing: list[int]) -> list[Entry]:
        done = [base.encode_text(chunk) for chunk in chunks([distinct[index] for index in missing], batch_size)]
        states = torch.cat([chunk.states.cpu() for chunk in done])
        pooled = [row for chunk in done if chunk.pooled is not None for row in chunk.pooled.cpu()]
        rows = [{"states": row} for row in states]
        return [row | {"pooled": pooled[index]} for index, row in enumerate(rows)] if pooled else rows

    found = cache.entries([["text", *of, caption] for caption in distinct], make, "captions")
    states, pooled = ([each[name] for each in found if name in each] for name in ("states", "pooled"))
    place = {caption: index for index, caption in enumerate(distinct)}
    index = torch.tensor([place[caption] for caption in captions])
    return TextStates(torch.stack(states), torch.stack(pooled) if pooled else None).rows(index)
