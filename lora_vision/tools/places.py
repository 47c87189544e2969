"""Where in a model a layer stands, in words: its block (down, mid, up ...) and its kind (query, feed-forward ...)."""

from __future__ import annotations

import re
from collections.abc import Iterable

_KINDS = (  # the first that fits decides
    (r"attn2\.to_(q|k|v|out)", r"cross \1"),
    (r"attn1\.to_(q|k|v|out)", r"self \1"),
    (r"self_attn\.(q|k|v|out)_proj$", r"self \1"),
    (r"attention\.(?:attention|self)\.(q|k|v)(?:uery|ey|alue)$", r"self \1"),
    (r"attention\.output\.dense$", "self out"),
    (r"(?:ff\.net\.0\.proj|mlp\.fc1|intermediate\.dense)$", "ff in"),
    (r"(?:ff\.net\.2|mlp\.fc2|output\.dense)$", "ff out"),
    (r"proj_(in|out)$", r"proj \1"),
    (r"resnets\.\d+\.(conv1|conv2)$", r"\1"),
    (r"conv_shortcut$", "shortcut"),
    (r"time_emb|add_embedding", "time"),
    (r"samplers\.\d+\.conv$", "sampler"),
    (r"norm", "norm"),
)
KINDS = (
    *(f"{a} {p}" for a in ("self", "cross") for p in ("q", "k", "v", "out")),
    *("ff in", "ff out", "proj in", "proj out", "conv1", "conv2", "shortcut", "sampler", "time", "norm", "other"),
)
"""Every kind of layer, in the order of tables."""

_BLOCK = re.compile(r"unet\.((?:down|up)_blocks\.\d+|mid_block)\.|(vit)\.(?:vision_model\.)?encoder\.layers?\.(\d+)\.")
_ORDER = {"text_encoder": -2, "text_encoder_2": -1, "down": 1, "mid": 2, "up": 3}


def block(name: str) -> str:
    """The block of a layer: ``down 0``, ``mid``, ``up 2``; ``unet ends`` for what stands in none; else its part."""
    found = _BLOCK.match(name)
    if found is None:
        part = name.partition(".")[0]
        return "unet ends" if part == "unet" else part
    if found[2]:
        return f"layer {found[3]}"
    return found[1].replace("_blocks.", " ").replace("_block", "")


def glob(block: str) -> str:
    """The globs' name of a UNet block: ``down 0`` as ``unet.down_blocks.0``."""
    return "unet." + (f"{block}_block" if block == "mid" else block.replace(" ", "_blocks."))


def kind(name: str) -> str:
    """The kind of a layer, one of KINDS."""
    for pattern, word in _KINDS:
        if found := re.search(pattern, name):
            return found.expand(word)
    return "other"


def blocks(names: Iterable[str]) -> list[str]:
    """The blocks of these layers in the order of the forward pass, text encoders first."""
    return sorted({block(name) for name in names}, key=_order)


def kinds(names: Iterable[str]) -> list[str]:
    """The kinds of these layers in the order of KINDS."""
    return sorted({kind(name) for name in names}, key=KINDS.index)


def _order(block: str) -> tuple[int, int]:
    word, _, number = block.partition(" ")
    return _ORDER.get(word, 0), int(number) if number.isdecimal() else 0
