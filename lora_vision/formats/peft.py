"""PEFT folders: `base_model.model.<module path>.lora_A.weight` beside `adapter_config.json`.

Read: LoRA (rank and alpha patterns, rsLoRA, DoRA, convolutions, embeddings, biases, modules_to_save), LoHa, LoKr and
(IA)3. The configuration comes in the metadata under `adapter_config`, as text, and goes out the same way; `files.py`
keeps it beside the tensors.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora_vision import names
from lora_vision.errors import AdapterError
from lora_vision.formats import leaves as vocabulary
from lora_vision.formats.patterns import Patterns, expression
from lora_vision.formats.reading import Reading

if TYPE_CHECKING:
    from torch import Tensor

    from lora_vision.adapter import Adapter

CONFIG = "adapter_config"
_ROOT = "base_model.model."
_TEXT = re.compile(r"^(?:text_model|text_projection|encoder\.layers\.\d+\.(?:self_attn|mlp\.fc|layer_norm))\b")
_UNET = re.compile(r"^(?:down_blocks|up_blocks|mid_block|conv_in|conv_out|time_embedding|add_embedding)\b")
_OTHERS = (  # models that are none of ours, by their module paths
    (
        "a language model",
        re.compile(
            r"^(?:model\.(?:language_model\.)?(?:layers|decoder|embed_tokens)|transformer\.h|gpt_neox|lm_head|\w*bert\w*"
            r"|(?:en|de)coder\.block)\b"
        ),
    ),
    (
        "a diffusion transformer",
        re.compile(r"^(?:(?:single_)?transformer_blocks|double_blocks|single_blocks|joint_blocks)\."),
    ),
)
_SAVED = re.compile(r"\.modules_to_save(?:\.default)?(?=\.|$)")
EMBEDDING = re.compile(r"(?:token|word|position)_embeddings?$")  # layers PEFT stores transposed
_TRICKS = {  # settings that change what the factors mean, or the base under them
    "fan_in_fan_out": "transposed weights",
    "layer_replication": "replicated layers",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "target_parameters": "parameter targets",
    "alora_invocation_tokens": "activated LoRA",
    "trainable_token_indices": "trainable tokens",
    "megatron_config": "Megatron layers",
    "kasa_config": "KaSA",
    "arrow_config": "Arrow routing",
}
_SPELLING = {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "lora_magnitude_vector", "ia3": "ia3_l"}
_SPELLING |= {"new_weight": "weight", "new_bias": "bias"}
_TRANSPOSED = {"up": "lora_embedding_A", "down": "lora_embedding_B"}
_CLASSES = {"unet": "UNet2DConditionModel", "text_encoder": "CLIPTextModel"}
_CLASSES |= {"text_encoder_2": "CLIPTextModelWithProjection"}
_KINDS = ("LORA", "LOHA", "LOKR", "IA3")
# Written: leaves a layer must have and may have. PEFT builds LoKr's and Tucker's shapes from its own settings, which
# cannot say how a given layer was split, so these are not written.
_WRITTEN = {"LORA": {"down", "up"}, "LOHA": {f"hada_w{n}_{s}" for n in "12" for s in "ab"}, "IA3": {"ia3", "on_input"}}
_BESIDE = {"LORA": {"alpha", "magnitude", "new_bias"}, "LOHA": {"alpha"}, "IA3": {"with_bias"}}


def matches(key: str) -> bool:
    """Returns whether a key is spelled PEFT's way."""
    return key.startswith("base_model.")


def read(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> Reading:
    """Returns the layers of a PEFT folder's tensors (or of their header entries), alpha taken from its configuration.

    Raises:
        AdapterError: the configuration is absent, or is of a method that is not supported.
    """
    _refuse_others(tensors)
    config = _config(metadata)
    found = Reading()
    modules: dict[str, str] = {}
    part = _part(tensors, config)
    for key, tensor in tensors.items():
        path, leaf = vocabulary.split(key) or _whole(key)
        if ".original_module." in key or (_SAVED.search(key) and _SAVED.sub("", key) in tensors):
            continue  # the untouched weight saved beside a head, or (`bias="all"`) the head's bias once more
        path = path.removeprefix(_ROOT)
        owner = "vit" if path.startswith(("vision_model.", "visual_projection")) else part  # a whole CLIP has both
        name = f"{owner}.{names.classic(owner, path)}"
        found.add(key, name if names.known(name) else None, leaf, tensor)
        modules[name] = path
    for name, leaves in found.layers.items():
        if config["peft_type"] == "IA3":
            _read_ia3(leaves, modules[name], config)
        elif vocabulary.rank(leaves) is not None or any(leaf.startswith("lokr_") for leaf in leaves):
            leaves["alpha"] = alpha(config, modules[name], leaves)
            _scale_full_lokr(leaves, modules[name], config)
    return found


def _config(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Returns the parsed configuration, checked for what would make the factors mean something else."""
    if CONFIG not in metadata:
        raise AdapterError("no adapter_config.json beside the tensors; alpha is only there, so put both in one folder")
    try:
        config = json.loads(metadata[CONFIG])
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise AdapterError("adapter_config.json is no JSON object; expected the file PEFT wrote")
    if not isinstance(config.get("auto_mapping") or {}, dict) or not isinstance(
        config.get("feedforward_modules") or [], str | list
    ):
        raise AdapterError("adapter_config.json holds auto_mapping or feedforward_modules of another kind than PEFT's")
    kind = config.get("peft_type")
    if kind not in _KINDS:
        raise AdapterError(f"PEFT method {kind!a} is not supported; expected one of {', '.join(_KINDS)}")
    if kind == "LORA" and (tricks := [what for setting, what in _TRICKS.items() if config.get(setting)]):
        raise AdapterError(f"PEFT LoRA with {', '.join(tricks)} is not supported; expected plain LoRA, rsLoRA or DoRA")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and re.match(r"pissa|olora|corda|loftq|lora_ga", start.lower()):
        raise AdapterError(
            f"PEFT started this LoRA with {start!a}, which changes the base weights too; convert it to plain LoRA with "
            "PEFT's save_pretrained(path_initial_model_for_weight_conversion=...) first"
        )
    return config


def _refuse_others(tensors: Mapping[str, Any]) -> None:
    """Raises AdapterError where a module path shows that the folder is for another kind of model."""
    for what, paths in _OTHERS:
        if any(paths.match(key.removeprefix(_ROOT)) for key in tensors):
            raise AdapterError(f"this PEFT adapter is for {what}; expected one for a UNet, text encoder or ViT")


def _part(tensors: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Returns which part of a model the folder is for, from its module paths and the class PEFT noted."""
    stems = [key.removeprefix(_ROOT) for key in tensors]
    model = str((config.get("auto_mapping") or {}).get("base_model_class", ""))
    if any(_UNET.match(stem) for stem in stems) or model == "UNet2DConditionModel":
        return "unet"
    if model.startswith("CLIPText") or (any(_TEXT.match(stem) for stem in stems) and "Vision" not in model):
        return "text_encoder_2" if model == "CLIPTextModelWithProjection" else "text_encoder"
    return "vit"


def _whole(key: str) -> tuple[str, str | None]:
    """Returns (path, leaf) of a full weight or bias from modules_to_save or `bias="all"`."""
    path, _, ending = key.rpartition(".")
    return _SAVED.sub("", path), {"weight": "new_weight", "bias": "new_bias"}.get(ending)


def _patterns(config: dict[str, Any], kind: str) -> Patterns:
    """Returns a configuration's `rank_pattern` or `alpha_pattern`, made once."""
    if not isinstance(config.get(kind), Patterns):
        config[kind] = Patterns(config.get(kind))
    return config[kind]  # type: ignore[no-any-return]


def alpha(config: dict[str, Any], path: str, leaves: Mapping[str, Any]) -> float:
    """Returns one layer's alpha by a PEFT configuration: patterns first, times sqrt(rank) for rsLoRA.

    Raises:
        AdapterError: the configuration speaks of another rank than the tensors have, or of a DoRA they are not.
    """
    value = _patterns(config, "alpha_pattern").find(path, config.get("lora_alpha", config.get("alpha", 8)))
    rank = vocabulary.rank(leaves)
    if rank is None:
        return value
    stated = _patterns(config, "rank_pattern").find(path, config.get("r", rank))
    if stated != rank and "down" in leaves:
        raise AdapterError(f"adapter settings say rank {stated:g} for {path!a}, its tensors have {rank}")
    if config.get("use_dora") and "down" in leaves and not {"magnitude", "dora_scale"} & leaves.keys():
        raise AdapterError(f"adapter settings say DoRA, but {path!a} has no magnitude; the file is not whole")
    return value * math.sqrt(rank) if config.get("use_rslora") else value


def _scale_full_lokr(leaves: dict[str, Any], path: str, config: dict[str, Any]) -> None:
    """Puts PEFT's alpha/r into LoKr's first factor when both are full: LyCORIS, whose leaves these are, has 1 there."""
    if "lokr_w1" not in leaves or "lokr_w2" not in leaves:
        return
    stated = _patterns(config, "rank_pattern").find(path, config.get("r", 8))
    scale = leaves.pop("alpha") / stated if stated else math.inf
    if scale != 1 and hasattr(leaves["lokr_w1"], "to"):
        leaves["lokr_w1"] = leaves["lokr_w1"] * scale


def _read_ia3(leaves: dict[str, Any], path: str, config: Mapping[str, Any]) -> None:
    """Turns PEFT's factor 1 + w into w; feed-forward layers multiply their input, the others their output.

    A linear layer's factor tells by its shape, [1, I] or [O, 1]; a convolution's is [1, I or O, 1, 1].
    """
    if "ia3" not in leaves:
        return
    targets = config.get("feedforward_modules") or []
    if isinstance(targets, str):
        forward = expression(targets).fullmatch(path) is not None
    else:
        forward = path.endswith(tuple(target for target in targets if isinstance(target, str)))
    if len(shape := leaves["ia3"].shape) == 2 and max(shape) > 1:
        forward = shape[0] == 1
    leaves["on_input"] = float(forward)
    leaves["with_bias"] = float(not forward)
    if hasattr(leaves["ia3"], "to"):
        leaves["ia3"] = leaves["ia3"].float() - 1


def magnitude(value: Tensor, leaves: Mapping[str, Any]) -> Tensor:
    """Returns a DoRA magnitude [O] in PEFT's shape: [O], for convolutions [1, O, 1, 1]."""
    return value.reshape(1, -1, 1, 1) if leaves["down"].dim() == 4 else value.flatten()


def write(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns (tensors, metadata with `adapter_config`) of a one-part adapter as PEFT writes it; alpha stays exact.

    Raises:
        AdapterError: several parts, several algorithms, or a change that PEFT cannot hold.
    """
    if len(adapter.parts) != 1:
        raise AdapterError(f"a PEFT folder holds one model, this adapter has {', '.join(adapter.parts) or 'no layers'}")
    layers = {name.partition(".")[2]: vocabulary.disassemble(factors) for name, factors in adapter.layers.items()}
    embeddings = {path for path, leaves in layers.items() if EMBEDDING.search(path) and "down" in leaves}
    for path in embeddings & {path for path, leaves in layers.items() if "dora_scale" in leaves}:
        layers[path]["magnitude"] = layers[path].pop("dora_scale")  # PEFT's embeddings are transposed
    kind = _kind(layers)
    prefix = "vit." if adapter.parts == ("vit",) and adapter.extras else ""
    tensors: dict[str, Tensor] = {}
    for path, leaves in layers.items():
        for leaf, value in leaves.items():
            if leaf in ("alpha", "on_input", "with_bias"):
                continue
            if leaf == "magnitude":
                value = magnitude(value, leaves)
            if leaf == "ia3":
                shape = (1, -1, 1, 1) if value.dim() == 4 else (1, -1) if leaves["on_input"] else (-1, 1)
                value = (value.float() + 1).reshape(shape)
            ending = "base_layer.bias" if leaf == "new_bias" and "down" in leaves else _SPELLING.get(leaf, leaf)
            if path in embeddings and leaf in _TRANSPOSED:
                ending, value = _TRANSPOSED[leaf], value.T
            tensors[f"{_ROOT}{prefix}{path}.{ending}"] = value
    for name, value in adapter.extras.items():
        if not name.startswith("vit."):
            raise AdapterError(f"{name} is no module; a PEFT folder cannot hold it, use format='kohya'")
        tensors[_ROOT + name.removeprefix("vit.")] = value
    saved = {name.removeprefix("vit.").rpartition(".")[0] for name in adapter.extras}
    saved |= {path for path, leaves in layers.items() if "new_weight" in leaves}
    config = _settings(kind, layers, prefix, sorted(saved))
    if adapter.parts[0] in _CLASSES:
        config["auto_mapping"] = {"base_model_class": _CLASSES[adapter.parts[0]]}
    metadata = {key: value for key, value in adapter.metadata.items() if key != CONFIG}
    return tensors, {**metadata, "format": "pt", CONFIG: json.dumps(config, indent=2, sort_keys=True)}


def _kind(layers: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the one PEFT method that all layers' changes belong to."""
    kinds: set[str] = set()
    for path, leaves in layers.items():
        if {"new_weight", "new_bias"} >= leaves.keys():
            continue
        kind = next((k for k, marks in _WRITTEN.items() if marks <= leaves.keys() <= marks | _BESIDE[k]), None)
        if kind is None or (kind == "IA3" and not leaves["on_input"] and "with_bias" not in leaves):
            raise AdapterError(
                f"layer {path}: {vocabulary.algorithm(leaves)} of this form has no spelling in PEFT; use format='kohya'"
            )
        kinds.add(kind)
    if len(kinds) != 1:
        found = ", ".join(sorted({vocabulary.algorithm(leaves) for leaves in layers.values()})) or "nothing"
        raise AdapterError(
            f"found {found}; a PEFT folder holds one algorithm, so use format='kohya', or approximate it"
        )
    return kinds.pop()


def _settings(kind: str, layers: Mapping[str, Mapping[str, Any]], prefix: str, saved: list[str]) -> dict[str, Any]:
    """Returns what `adapter_config.json` says: ranks and alphas by layer, exact module paths as targets."""
    adapted = {
        prefix + path: leaves for path, leaves in layers.items() if not {"new_weight", "new_bias"} >= leaves.keys()
    }
    config: dict[str, Any] = {
        "peft_type": kind,
        "task_type": None,
        "inference_mode": True,
        "target_modules": sorted(adapted),
        "modules_to_save": saved or None,
    }
    if kind == "IA3":
        return config | {"feedforward_modules": [path for path, leaves in adapted.items() if leaves["on_input"]]}
    ranks = {path: vocabulary.rank(leaves) or 1 for path, leaves in adapted.items()}
    alphas = {path: leaves["alpha"] for path, leaves in adapted.items()}
    rank, strength = (vocabulary.commonest(values.values()) for values in (ranks, alphas))
    config |= {
        "r": rank,
        "rank_pattern": {f"^{re.escape(path)}": r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(path)}": a for path, a in alphas.items() if a != strength},
    }
    if kind != "LORA":
        return config | {"alpha": strength}
    dora = ["magnitude" in leaves for leaves in adapted.values()]
    if any(dora) and not all(dora):
        raise AdapterError("only some layers have DoRA; PEFT has it on all or none, so use format='kohya'")
    bias = "lora_only" if any("new_bias" in leaves for leaves in adapted.values()) else "none"
    extra = {"use_dora": any(dora), "use_rslora": False, "lora_bias": False, "bias": bias, "fan_in_fan_out": False}
    return config | {"lora_alpha": strength, "lora_dropout": 0.0, "init_lora_weights": True} | extra
