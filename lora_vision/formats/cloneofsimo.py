"""cloneofsimo/lora files: `unet:0:up`, `unet:0:down`, ... numbered in the order its tool walked the model. Read only.

The numbers are positions in diffusers before 0.15, where a transformer block listed attn1, ff, attn2; today's order
would put tensors on wrong layers without a word. The order below is that of every Stable Diffusion 1.x and 2.x model,
and the shapes are checked against it. There is no alpha: the scale is 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from lora_vision.errors import AdapterError
from lora_vision.formats import leaves as vocabulary
from lora_vision.formats.reading import Reading

_KEY = re.compile(r"^(unet|text_encoder):(\d{1,5}):(up|down)$")
_TOKEN = re.compile(r"^<.{1,64}>$")
EMBEDDING = "<embed>"  # what the header says of a learnt token
_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


def matches(key: str) -> bool:
    """Returns whether a key is a numbered factor or a learnt token."""
    return _KEY.match(key) is not None or _TOKEN.match(key) is not None


def positional(tensors: list[Any]) -> dict[str, Any]:
    """Returns the keyed tensors of an old `.pt` file, a flat list up, down, up, down, ... of one model.

    Raises:
        AdapterError: not such a list.
    """
    if len(tensors) % 2 or not tensors or any(len(getattr(t, "shape", ())) not in (2, 4) for t in tensors):
        raise AdapterError("the list in this file is no sequence of (up, down) pairs as cloneofsimo/lora wrote it")
    one_width = len({tensor.shape[1] for tensor in tensors[1::2]}) == 1
    part = "text_encoder" if one_width else "unet"
    return {f"{part}:{n // 2}:{'down' if n % 2 else 'up'}": tensor for n, tensor in enumerate(tensors)}


def read(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> Reading:
    """Returns the layers of numbered tensors (or of their header entries).

    Raises:
        AdapterError: numbers are missing, or the shapes do not follow the order of a Stable Diffusion model.
    """
    found = Reading()
    numbered: dict[str, dict[int, dict[str, Any]]] = {}
    for key, tensor in tensors.items():
        if match := _KEY.match(key):
            numbered.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = tensor
        else:
            found.extras[f"embedding.{key}.text_encoder"] = tensor
    if not numbered:  # learnt tokens alone are a textual inversion
        return Reading(unknown=list(tensors))
    for part, pairs in numbered.items():
        if sorted(pairs) != list(range(len(pairs))) or any(len(pair) != 2 for pair in pairs.values()):
            raise AdapterError(
                f"{part}: {len(pairs)} numbered pairs with gaps; expected {part}:0 to {part}:N, up and down each"
            )
        order = _text_order(len(pairs)) if part == "text_encoder" else _unet_order(len(pairs))
        if order is None or not _classes_fit(part, metadata):
            raise AdapterError(
                f"{part}: {len(pairs)} numbered pairs for the classes {metadata.get(part, 'unknown')!a}; expected "
                "128, 144, 208 or 224 (UNet) or 4 a layer (text encoder) of a Stable Diffusion 1.x or 2.x model"
            )
        for number, path in enumerate(order):
            found.layers[f"{part}.{path}"] = pairs[number]
        _check(part, {path: pairs[number] for number, path in enumerate(order)})
    return found


def _classes_fit(part: str, metadata: Mapping[str, str]) -> bool:
    """Returns whether the classes that the header says were walked are those whose order is known."""
    if part not in metadata:
        return True
    try:
        classes = set(json.loads(metadata[part]))
    except (ValueError, RecursionError, TypeError):
        return False
    return classes <= (
        {"CLIPAttention"} if part == "text_encoder" else {"CrossAttention", "Attention", "GEGLU", "ResnetBlock2D"}
    )


def _text_order(count: int) -> list[str] | None:
    """Returns the paths of a text encoder's attention projections in the order k, v, q, out."""
    if count % 4 or not 0 < count <= 128:
        return None
    stem = "text_model.encoder.layers"
    return [f"{stem}.{n // 4}.self_attn.{('k', 'v', 'q', 'out')[n % 4]}_proj" for n in range(count)]


def _unet_order(count: int) -> list[str] | None:
    """Returns the paths of a UNet's layers in the order they were walked, for the known selections of classes."""
    for gated in (False, True):
        for convs in (False, True):
            order = list(_walk(gated, convs))
            if len(order) == count:
                return order
    return None


def _walk(gated: bool, convs: bool) -> Iterator[str]:
    """Yields UNet paths block by block, attentions before resnets, the middle block last.

    Args:
        gated: with the feed-forward's first layer (class GEGLU).
        convs: with the resnets (class ResnetBlock2D, the tool's `extended` mode).
    """
    blocks = [(f"down_blocks.{b}", 2 if b < 3 else 0, 2, b in (1, 2)) for b in range(4)]
    blocks += [(f"up_blocks.{b}", 3 if b else 0, 3, True) for b in range(4)]
    for stem, attentions, resnets, shortcut in [*blocks, ("mid_block", 1, 2, False)]:
        for layer in range(attentions):
            block = f"{stem}.attentions.{layer}.transformer_blocks.0"
            yield from (f"{block}.attn1.{projection}" for projection in _PROJECTIONS)
            yield from (f"{block}.ff.net.0.proj",) * gated
            yield from (f"{block}.attn2.{projection}" for projection in _PROJECTIONS)
        for layer in range(resnets if convs else 0):
            inner = ["conv1", "time_emb_proj", "conv2"]
            if shortcut and (stem.startswith("up") or layer == 0):
                inner.append("conv_shortcut")
            yield from (f"{stem}.resnets.{layer}.{name}" for name in inner)


def _check(part: str, pairs: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises AdapterError unless every pair has the shape its place in the model asks for."""
    widths = set()
    for path, pair in pairs.items():
        shape = vocabulary.weight_shape(pair) or (0, 0)
        if path.endswith(("attn2.to_k", "attn2.to_v")):
            widths.add(shape[1])
            fits = len(widths) == 1
        elif path.endswith("ff.net.0.proj"):
            fits = shape[0] == 8 * shape[1]
        elif ".resnets." in path:
            fits = (len(shape) == 2) == path.endswith("time_emb_proj")
        else:
            fits = shape[0] == shape[1]
        if not fits:
            raise AdapterError(
                f"{part}: the pair at the place of {path} changes a weight {list(shape)}, which that layer is not"
            )
