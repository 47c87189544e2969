"""Which layers: named sets ("attention", "ff", "conv", ...), joined by "+", and globs over true layer names."""

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import translate

from torch import nn

from lora_vision.errors import AdapterError

SETS: Mapping[str, str] = {
    "attention": r"\.(attn[12]\.to_([qkv]|out\.0)|self_attn\.(q|k|v|out)_proj"
    r"|attention\.(attention|self)\.(query|key|value)|attention\.output\.dense|attn\.(qkv\.[qkv]|proj))$",
    "self-attention": r"\.(attn1\.to_([qkv]|out\.0)|self_attn\.(q|k|v|out)_proj"
    r"|attention\.(attention|self)\.(query|key|value)|attention\.output\.dense|attn\.(qkv\.[qkv]|proj))$",
    "cross-attention": r"^unet\..*\.attn2\.to_([qkv]|out\.0)$",
    "ff": r"\.(ff\.net\.(0\.proj|2)|mlp\.fc[12]|intermediate\.dense|(?<!attention\.)output\.dense)$",
    "conv": r"^unet\..*\.(resnets\.\d+\.conv(1|2|_shortcut)|(down|up)samplers\.\d+\.conv)$",
    "text": r"^text_encoder(_2)?\..*\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])$",
    "vit": r"^vit\..*\.(self_attn\.(q|k|v|out)_proj|attention\.(attention|self)\.(query|key|value)"
    r"|attention\.output\.dense|attn\.(qkv\.[qkv]|proj)|mlp\.fc[12]|intermediate\.dense|output\.dense)$",
    "style": r"^unet\.up_blocks\.0\.attentions\.1\..*\.attn[12]\.to_([qkv]|out\.0)$",
    "qv": r"\.(attn[12]\.to_[qv]|self_attn\.[qv]_proj|attention\.(attention|self)\.(query|value)|attn\.qkv\.[qv])$",
}
"""Named sets as patterns over true names; "conv" is the convolutions of resnets and samplers, as in LyCORIS' LoCon;
"style" is the block of SDXL that B-LoRA (Frenkel et al. 2024, arXiv 2403.14572, its W5) and InstantStyle (Wang et al.
2024, arXiv 2404.02733) found to hold a picture's style."""


def select(targets: str | Sequence[str], layers: Mapping[str, nn.Module]) -> list[str]:
    """The names of the layers meant, in the model's order.

    Args:
        targets: Named sets and globs, joined by ``+`` or as a sequence: ``"attention+ff"``, ``"unet.up_blocks.*"``,
            ``("self-attention", "*.conv1")``. A name without wildcards also means everything below it.
        layers: True name to module, as ``names.index`` gives them; only linear, convolution and embedding layers
            can be chosen.

    Raises:
        AdapterError: A term is empty or matches nothing; near matches and the named sets are listed.
    """
    terms = [term.strip() for text in ([targets] if isinstance(targets, str) else targets) for term in text.split("+")]
    names = [name for name, layer in layers.items() if isinstance(layer, nn.Linear | nn.Conv2d | nn.Embedding)]
    chosen: set[str] = set()
    for term in terms:
        chosen.update(_members(term, names))
    if not chosen:
        raise AdapterError(f"no targets given; choose from {', '.join(SETS)}, joined by +, or globs over layer names")
    return [name for name in names if name in chosen]


def match(pattern: str, names: Iterable[str]) -> list[str]:
    """The names a glob covers; a dotted name without wildcards covers everything below it too.

    Raises:
        AdapterError: It matches nothing; near matches are listed.
    """
    names = list(names)
    found = re.compile(translate(pattern)).match
    chosen = [name for name in names if found(name) or name.startswith(f"{pattern}.")]
    if not chosen:
        raise AdapterError(f"{pattern!r} matches none of {len(names)} layers; {_advice(pattern, names)}")
    return chosen


def _members(term: str, names: list[str]) -> list[str]:
    if term in SETS:
        found = re.compile(SETS[term]).search
        chosen = [name for name in names if found(name)]
        if not chosen:
            raise AdapterError(f"the set {term!r} matches none of {len(names)} layers; {_advice(term, names)}")
        return chosen
    return match(term, names)


def _advice(pattern: str, names: list[str]) -> str:
    """What the user may have meant: sets, and dotted beginnings and endings of the layers there are."""
    heads = {".".join(name.split(".")[:depth]) for name in names for depth in (1, 2, 3, 5)} | set(names)
    tails = {f"*.{name.split('.', depth)[-1]}" for name in names for depth in range(1, name.count("."))}
    plain = pattern.rstrip(".*") or pattern
    near = get_close_matches(plain, [*SETS, *sorted(heads)], 3, 0.5) + get_close_matches(pattern, sorted(tails), 2, 0.6)
    parts = sorted({name.partition(".")[0] for name in names})
    return (
        f"nearest: {', '.join(near) or 'nothing'}; named sets: {', '.join(SETS)}; "
        f"globs start with {' or '.join(parts) or 'a part'}, for example '{parts[0] if parts else 'unet'}.*'"
    )
