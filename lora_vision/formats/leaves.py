"""Returns what the last part of a key means, in every tool's spelling, and builds a layer's factors from it.

A key is a layer and a leaf. All tools agree on what the leaves hold, not on what they are called: `lora_down.weight`
(kohya), `lora_A.weight` (PEFT) and `lora.down.weight` (diffusers) are one thing. `Layers` is a whole file sorted that
way: true layer name -> leaf -> tensor. It holds tensors when reading, header entries when only looking.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from lora_vision import names
from lora_vision.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

    from lora_vision.factors import Factors


class Shaped(Protocol):
    """A tensor, or the header's entry of one."""

    @property
    def shape(self) -> tuple[int, ...]: ...


Layers = dict[str, dict[str, Any]]

_SPELLINGS = {
    "down": ("lora_down.weight", "lora_A.weight", "lora.down.weight", "lora_linear_layer.down.weight", "down.weight"),
    "up": ("lora_up.weight", "lora_B.weight", "lora.up.weight", "lora_linear_layer.up.weight", "up.weight"),
    "mid": ("lora_mid.weight",),
    "alpha": ("alpha", "lora.alpha", "lora_linear_layer.alpha"),
    "dora_scale": ("dora_scale",),
    "magnitude": ("lora_magnitude_vector", "lora_magnitude_vector.weight", "magnitude"),
    "up_bias": ("lora_B.bias",),
    "embedding_down": ("lora_embedding_A",),
    "embedding_up": ("lora_embedding_B",),
    "ia3": ("ia3_l",),
    "new_bias": ("base_layer.bias",),
    "new_weight": ("base_layer.weight",),
    "diff": ("diff", "lora.weight"),  # the second is ZipLoRA's
}
_PLAIN: tuple[str, ...] = (
    "diff_b",
    "w_norm",
    "b_norm",
    "on_input",
    "hada_t1",
    "hada_t2",
    "lokr_w1",
    "lokr_w2",
    "lokr_t2",
)
_PLAIN += tuple(f"hada_w{n}_{s}" for n in "12" for s in "ab") + tuple(f"lokr_w{n}_{s}" for n in "12" for s in "ab")
LEAVES: dict[str, str] = {spelling: leaf for leaf, spellings in _SPELLINGS.items() for spelling in spellings}
LEAVES.update((leaf, leaf) for leaf in _PLAIN)

_ADAPTER_NAME = re.compile(
    r"\.(lora_A|lora_B|lora_magnitude_vector|lora_embedding_A|lora_embedding_B)\.(?!weight$|bias$)\w+"
)

_REFUSED = (  # what a leaf, or a whole key, gives away
    (re.compile(r"(^|\.)(oft_blocks|oft_diag|oft_R|oft_r)(\.|$)|^oft_unet_"), "OFT or BOFT"),
    (re.compile(r"(^|\.)(boft_R|boft_s)(\.|$)"), "BOFT"),
    (re.compile(r"(^|\.)([ab][12]|bm)\.weight$"), "GLoRA"),
    (re.compile(r"(^|\.)(q_layer|p_layer)\.weight$|(^|\.)lambda_layer$"), "T-LoRA"),
    (re.compile(r"(^|\.)bias_(indices|values|size)$"), "LyCORIS sparse bias"),
    (re.compile(r"(^|\.)lora_E$|(^|\.)ranknum"), "AdaLoRA"),
    (re.compile(r"vera_lambda"), "VeRA"),
    (re.compile(r"lora_controlnet"), "control-LoRA"),
    (re.compile(r"custom_diffusion"), "Custom Diffusion"),
    (re.compile(r"^w_[ab]_\d{3}$|^fc_\d+in_\d+out$"), "LoRA-ViT"),
    (re.compile(r"motion_modules|temporal_transformer"), "AnimateDiff motion LoRA"),
    (
        re.compile(r"^emb_params$|^string_to_param|^clip_[lg]$|^<.+>$"),
        "textual inversion (an embedding, not an adapter)",
    ),
    (re.compile(r"double_blocks|single_blocks|single_transformer_blocks"), "FLUX"),
    (re.compile(r"joint_blocks|context_block|joint_transformer_blocks"), "Stable Diffusion 3"),
    (re.compile(r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\."), "full checkpoint"),
    (re.compile(r"(^|\.)ip_adapter\.|(^|\.)image_proj\.|^\d+\.to_(q|k|v|out)_(lora|ip)\."), "IP-Adapter"),
    (re.compile(r"^control_model\.|(^|\.)controlnet_"), "ControlNet"),
    (re.compile(r"^lora_prior_unet_"), "Stable Cascade"),
    (
        re.compile(
            r"^(prior\.|transformer\.|diffusion_model\.)?transformer_blocks\.|^transformer\.|^lora_transformer_|^lora_te3_"
            r"|^lora_te_t5|^(diffusion_model|net)\.(blocks|layers)\.\d|(double|single)_stream_blocks"
            r"|distilled_guidance_layer|^(lora_unet|lycoris)_(transformer_blocks|blocks|layers)_\d"
        ),
        "diffusion-transformer or Kandinsky prior",
    ),
    (re.compile(r"\.add_[kqv]_proj(_lora)?\."), "Kandinsky 2.2 or DeepFloyd IF"),
)


def split(key: str) -> tuple[str, str] | None:
    """Returns (path, leaf) of a dotted key such as `a.b.lora_A.weight`, or None when its ending is not known."""
    return _split(key) or _split(_ADAPTER_NAME.sub(r".\1", key))


def _split(key: str) -> tuple[str, str] | None:
    pieces = key.rsplit(".", 3)
    for count in range(1, len(pieces)):  # the longest ending first
        leaf = LEAVES.get(".".join(pieces[count:]))
        if leaf and pieces[0]:
            return ".".join(pieces[:count]), leaf
    return None


def refusal(keys: Iterable[str]) -> str | None:
    """Returns the name of the first algorithm or model among the keys that is known and not supported, or None."""
    for key in keys:
        for pattern, what in _REFUSED:
            if pattern.search(key):
                return what
    return None


def algorithm(leaves: Mapping[str, Any]) -> str:
    """Returns the name of the algorithm a layer's leaves belong to: `LoRA`, `LoCon`, `LoHa`, `LoKr`, `(IA)3`, ..."""
    if "down" in leaves or "up" in leaves or "embedding_down" in leaves:
        conv = len(getattr(leaves.get("down"), "shape", ())) == 4 and math.prod(leaves["down"].shape[2:]) > 1
        kind = "LoCon Tucker" if "mid" in leaves else "LoCon" if conv else "LoRA"
    elif any(leaf.startswith("hada_") for leaf in leaves):
        kind = "LoHa"
    elif any(leaf.startswith("lokr_") for leaf in leaves):
        kind = "LoKr"
    elif "ia3" in leaves:
        kind = "(IA)3"
    elif "new_weight" in leaves or "new_bias" in leaves:
        kind = "full weights"
    else:
        kind = "norm" if "w_norm" in leaves or "b_norm" in leaves else "full difference"
    return kind + " + DoRA" if "dora_scale" in leaves or "magnitude" in leaves else kind


def rank(leaves: Mapping[str, Any]) -> int | None:
    """Returns the rank a layer's leaves have, from their shapes alone, or None where the word means nothing."""
    for leaf, axis in (("down", 0), ("embedding_down", 0), ("hada_w1_b", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0)):
        if leaf in leaves and len(leaves[leaf].shape) > 1:
            return int(leaves[leaf].shape[axis])
    return None


def weight_shape(leaves: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Returns [O, I, ...] of the weight that low-rank or full leaves change, from their shapes alone, else None."""
    if "down" in leaves and "up" in leaves and len(leaves["down"].shape) > 1:
        kernel = leaves["mid"] if "mid" in leaves else leaves["down"]
        return (leaves["up"].shape[0], leaves["down"].shape[1], *kernel.shape[2:])
    if "hada_w1_a" in leaves and "hada_w1_b" in leaves and "hada_t1" not in leaves:
        return leaves["hada_w1_a"].shape[0], leaves["hada_w1_b"].shape[-1]
    return tuple(leaves["diff"].shape) if "diff" in leaves else None


def assemble(name: str, leaves: Mapping[str, Any]) -> Factors:
    """Returns the factors of one layer from its leaves.

    Args:
        name: true layer name; convolutions with a known kernel get their shape from it.
        leaves: leaf -> tensor; `alpha` may be a number. A missing alpha means the rank (kohya, ComfyUI, diffusers).

    Raises:
        AdapterError: leaves are missing, left over, or do not fit each other.
    """
    left = dict(leaves)
    try:
        for leaf, value in left.items():
            _check(leaf, value)
        factors = _build(name, left)
        if left:
            raise AdapterError(f"{', '.join(left)} beside {algorithm(leaves)}, which has no such thing")
        return factors
    except AdapterError as error:
        raise AdapterError(f"layer {name}: {error}") from None


def _check(leaf: str, value: Any) -> None:
    """Raises AdapterError for a tensor no factor can be: empty, or of integers."""
    if isinstance(value, (float, int)) or leaf in ("alpha", "on_input"):
        return
    if value.numel() == 0:
        raise AdapterError(f"{leaf} is empty {list(value.shape)}; expected at least rank 1")
    if not value.is_floating_point():
        raise AdapterError(f"{leaf} holds {value.dtype}; expected floating-point numbers")


def _number(value: Any, leaf: str) -> float:
    """Returns a finite number from a one-element tensor or a number."""
    if not isinstance(value, (float, int)):
        if value.numel() != 1:
            raise AdapterError(f"{leaf} has shape {list(value.shape)}; expected one number")
        value = value.item()
    if not math.isfinite(value):
        raise AdapterError(f"{leaf} is {value}; expected a finite number")
    return float(value)


def commonest(values: Iterable[Any]) -> Any:
    """Returns the value that occurs most often, of equals the smallest, so that the order of layers does not matter."""
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))


def number(value: float) -> Tensor:
    """Returns a number as tools store alpha: a float32 scalar tensor, float64 where float32 would round it."""
    import torch

    single = torch.tensor(value, dtype=torch.float32)
    return single if single.item() == value else torch.tensor(value, dtype=torch.float64)


def _build(name: str, left: dict[str, Any]) -> Factors:
    """Returns the factors, taking the leaves it uses out of `left`."""
    if "new_weight" in left or "new_bias" in left:
        from lora_vision.replacement import Replacement

        new = {"weight": left.pop("new_weight", None), "new_bias": left.pop("new_bias", None)}
        return Replacement(**new, inner=_build(name, left) if left else None)
    alpha = _number(left.pop("alpha"), "alpha") if "alpha" in left else None
    magnitude, axis = _magnitude(left)
    inner = _direction(name, left, alpha)
    if magnitude is None:
        return inner
    import lora_vision.factors as kinds

    if axis == 0:
        features = inner.size and inner.size[0]
    else:
        features = inner.down.shape[1] if isinstance(inner, kinds.LowRank) else None
    if features and magnitude.numel() != features:
        side = "input" if axis else "output"
        raise AdapterError(f"a magnitude of {magnitude.numel()} numbers for {features} {side} features")
    return kinds.Dora(inner, magnitude, axis)


def _magnitude(left: dict[str, Any]) -> tuple[Tensor | None, int]:
    """Returns DoRA's magnitude and its axis: [O, 1, ...] is the output's, [1, I, ...] the input's, [O] PEFT's.

    PEFT takes an embedding's weight [V, D] transposed, so that its magnitude [D] is the input's here.
    """
    if "magnitude" in left:
        return left.pop("magnitude").flatten(), int("embedding_down" in left)
    if "dora_scale" not in left:
        return None, 0
    scale = left.pop("dora_scale")
    if scale.numel() != max(scale.shape):
        raise AdapterError(f"dora_scale {list(scale.shape)}; expected [O, 1, ...] or [1, I, ...]")
    return scale.flatten(), 1 if scale.dim() > 1 and scale.shape[0] == 1 and scale.shape[1] > 1 else 0


def _direction(name: str, left: dict[str, Any], alpha: float | None) -> Factors:
    """Returns the factors without DoRA."""
    import lora_vision.factors as kinds

    take: Callable[[str], Any] = lambda leaf: left.pop(leaf, None)  # noqa: E731
    bias = take("diff_b")
    if "embedding_down" in left and "embedding_up" in left:  # [R, V] and [D, R]; the weight is [V, D]
        down, up = take("embedding_up").T, take("embedding_down").T
        return kinds.LowRank(down, up, float(down.shape[0]) if alpha is None else alpha)
    if "down" in left and "up" in left:
        down = take("down")
        alpha = float(down.shape[0] if down.dim() else 1) if alpha is None else alpha
        if (up_bias := take("up_bias")) is not None:
            bias = up_bias.float() * (alpha / down.shape[0])
        return kinds.LowRank(down, take("up"), alpha, take("mid"), bias=bias)
    if all(f"hada_w{n}_{s}" in left for n in "12" for s in "ab"):
        sides = {f"w{n}_{s}": take(f"hada_w{n}_{s}") for n in "12" for s in "ab"}
        alpha = float(sides["w1_b"].shape[0]) if alpha is None else alpha
        cores = {"t1": take("hada_t1"), "t2": take("hada_t2")}
        return _shaped(name, kinds.Hadamard(**sides, alpha=alpha, **cores, bias=bias))
    if any(leaf.startswith("lokr_") for leaf in left):
        parts = {leaf.removeprefix("lokr_"): take(leaf) for leaf in list(left) if leaf.startswith("lokr_")}
        given = rank({f"lokr_{leaf}": value for leaf, value in parts.items()}) if alpha is None else alpha
        return _shaped(name, kinds.Kronecker(**parts, alpha=float(given or 1), bias=bias))
    if "ia3" in left:
        on_input = bool(_number(left.pop("on_input"), "on_input")) if "on_input" in left else False
        vector = take("ia3")
        vector = vector.flatten() if vector.dim() == 2 else vector  # PEFT's [1, I] or [O, 1], LyCORIS' [O]
        return kinds.IA3(vector, on_input, bool(take("with_bias")), bias=bias)
    if "w_norm" in left or "b_norm" in left:
        return kinds.Full(take("w_norm"), bias=take("b_norm"))
    if "diff" in left or bias is not None:
        return kinds.Full(take("diff"), bias=bias)
    raise AdapterError(f"found only {', '.join(left) or 'alpha'}; expected a complete pair (down and up) or its like")


def _shaped(name: str, factors: Any) -> Factors:
    """Returns LoHa or LoKr factors with the weight's shape where the layer's name tells a flattened kernel."""
    import dataclasses

    size, kernel = factors.size, names.kernel(name)
    if kernel and size[1] % (kernel * kernel) == 0:
        shape = (size[0], size[1] // (kernel * kernel), kernel, kernel)
        return dataclasses.replace(factors, shape=shape)  # type: ignore[no-any-return]
    return factors  # type: ignore[no-any-return]


def disassemble(factors: Factors) -> dict[str, Any]:
    """Returns a layer's leaves, alpha as a number: what `assemble` takes."""
    import lora_vision.factors as kinds
    from lora_vision.replacement import Replacement

    bias = {} if factors.bias is None else {"diff_b": factors.bias}
    match factors:
        case Replacement(weight=weight, new_bias=new_bias, inner=inner):
            new = {"new_weight": weight, "new_bias": new_bias}
            return {**(disassemble(inner) if inner else {}), **{k: v for k, v in new.items() if v is not None}}
        case kinds.Dora(inner=inner, magnitude=magnitude, axis=axis):
            length = {"magnitude": magnitude.flatten()} if axis == 0 else {"dora_scale": magnitude.view(1, -1)}
            return disassemble(inner) | length
        case kinds.LowRank(down=down, up=up, alpha=alpha, mid=mid):
            leaves = {"down": down, "up": up, "alpha": alpha, **({} if mid is None else {"mid": mid})}
        case kinds.Hadamard():
            leaves = {f"hada_{k}": v for k, v in factors.tensors().items() if k != "bias"} | {"alpha": factors.alpha}
        case kinds.Kronecker():
            leaves = {f"lokr_{k}": v for k, v in factors.tensors().items() if k != "bias"} | {"alpha": factors.alpha}
        case kinds.IA3(vector=vector, on_input=on_input, with_bias=with_bias):
            leaves = {"ia3": vector, "on_input": float(on_input), **({"with_bias": 1.0} if with_bias else {})}
        case kinds.Full(diff=diff):
            keys = ("w_norm", "b_norm") if diff is not None and diff.dim() == 1 else ("diff", "diff_b")
            return {k: v for k, v in zip(keys, (diff, factors.bias), strict=True) if v is not None}
        case _:
            raise AdapterError(f"{type(factors).__name__} has no spelling in any file format")
    return leaves | bias
