"""inspect: what is in an adapter file, told from its header in milliseconds; torch stays asleep."""

from __future__ import annotations

import hashlib
import json
import mmap
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_vision import files, names
from lora_vision.errors import AdapterError
from lora_vision.formats import container
from lora_vision.formats import leaves as vocabulary

SCAN_LIMIT = 32 << 20
"""Files up to this many bytes are read whole without being asked: hashes, broken and silent layers."""

_SETTINGS = (
    *("ss_sd_model_name", "ss_network_module", "ss_network_args", "ss_learning_rate", "ss_unet_lr"),
    *("ss_text_encoder_lr", "ss_optimizer", "ss_lr_scheduler", "ss_steps", "ss_epoch", "ss_num_train_images"),
    *("ss_resolution", "ss_batch_size_per_device", "ss_clip_skip", "ss_noise_offset", "ss_min_snr_gamma", "ss_seed"),
)
_STATED = ("ss_base_model_version", "modelspec.architecture", "lora_vision.family")
_GROUPS = (
    (re.compile(r"attn\d?\.|self_attn\.|\.attention\."), "attention"),
    (re.compile(r"\.ff\.|\.mlp\.|intermediate|\.output\.dense$"), "feed-forward"),
    (re.compile(r"proj_in$|proj_out$"), "projections"),
    (re.compile(r"norm"), "norms"),
    (re.compile(r"conv|time_emb_proj"), "resnets and convolutions"),
)
_PRODUCT = re.compile(r"down|up$|mid$|hada_|lokr_")


@dataclass(frozen=True)
class Inspection:
    """What is in an adapter file.

    Attributes:
        file: the file.
        bytes: its size.
        format: `kohya`, `diffusers`, `peft`, `native`, `cloneofsimo`, or None.
        problem: why the file cannot be loaded, or None.
        algorithms: algorithm -> number of layers.
        family: the base its shapes say it is for: `sd1`, `sd2`, `sdxl`, `sd` (1 or 2), `vit`, or None.
        stated_family: what the file says about its base, which may be wrong.
        groups: layer group -> number of layers, ranks and alphas (value -> layers).
        dtypes: stored type -> number of tensors.
        extras: embeddings and other tensors of no layer.
        unknown: keys that nothing explains.
        trigger_words: words that call it, the likeliest first.
        settings: the top training settings.
        hashes: `sshs_model_hash`, `sshs_legacy_hash` as stated; `sha256`, `model_hash` computed when scanned.
        scanned: whether the tensors were read.
        broken: layers with NaN or infinite numbers.
        silent: layers that change nothing, all zero or alpha 0.
    """

    file: str
    bytes: int
    format: str | None = None
    problem: str | None = None
    algorithms: dict[str, int] = field(default_factory=dict)
    family: str | None = None
    stated_family: str | None = None
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    dtypes: dict[str, int] = field(default_factory=dict)
    extras: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    trigger_words: list[str] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    scanned: bool = False
    broken: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Returns it as plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.file}: {self.bytes / 1e6:.2f} MB, {self.format or 'unknown'} format"]
        lines += [f"cannot be loaded: {self.problem}"] * bool(self.problem)
        lines.append("algorithm  " + (", ".join(f"{a} ({n} layers)" for a, n in self.algorithms.items()) or "none"))
        says = f" (the file says {self.stated_family})" if self.stated_family else ""
        lines.append(f"base       {self.family or 'unknown'}{says}")
        for name, group in self.groups.items():
            ranks, alphas = (_values(group[kind]) for kind in ("ranks", "alphas"))
            lines.append(f"  {name}: {group['layers']} layers, rank {ranks}, alpha {alphas}")
        lines.append("types      " + ", ".join(f"{dtype} ({n})" for dtype, n in self.dtypes.items()))
        lines += [f"extras     {', '.join(self.extras)}"] * bool(self.extras)
        lines += [f"unknown    {', '.join(map(ascii, self.unknown[:5]))} ({len(self.unknown)})"] * bool(self.unknown)
        lines += [f"trigger    {', '.join(self.trigger_words)}"] * bool(self.trigger_words)
        lines += [f"{key:22} {value[:200]}" for key, value in self.settings.items()]
        lines += [f"{key:16} {value}" for key, value in self.hashes.items()]
        if self.scanned:
            lines.append(f"NaN or infinite: {', '.join(self.broken) or 'none'}")
            lines.append(f"silent (zero): {', '.join(self.silent) or 'none'}")
        return "\n".join(_printable(line) for line in lines)


def _values(counts: Mapping[str, int]) -> str:
    if len(counts) > 4:
        return f"{len(counts)} different"
    return ", ".join(f"{value} ({n})" if len(counts) > 1 else value for value, n in counts.items()) or "none"


def _printable(line: str) -> str:
    """Returns the line with everything that could disturb a terminal escaped, bidirectional marks too."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def inspect(path: str | Path, *, scan: bool | None = None, allow_pickle: bool = False) -> Inspection:
    """Returns what is in an adapter file, also where it cannot be loaded.

    Args:
        path: a `.safetensors` file, or a folder with one.
        scan: read the tensors too, for hashes and for broken and silent layers; None: if the file is small.
        allow_pickle: also open `.pt` and `.bin` files, through torch's `weights_only` loader.

    Raises:
        AdapterError: the file is missing, or no safetensors file.
    """
    found = files.member(path)
    if allow_pickle:
        with tempfile.TemporaryDirectory() as folder:
            if made := files.repack(found, Path(folder)):
                hashes = {"sha256": hashlib.sha256(found.read_bytes()).hexdigest()}
                return replace(_inspect(made, scan), file=str(found), bytes=found.stat().st_size, hashes=hashes)
    return _inspect(found, scan)


def _inspect(found: Path, scan: bool | None) -> Inspection:
    header, metadata = files.header(found)
    size = found.stat().st_size
    report: dict[str, Any] = {
        "file": str(found),
        "bytes": size,
        "dtypes": dict(Counter(entry.dtype for entry in header.entries.values())),
        "stated_family": next((metadata[key] for key in _STATED if metadata.get(key)), None),
        "trigger_words": _trigger_words(metadata),
        "settings": {key: metadata[key] for key in _SETTINGS if metadata.get(key) not in (None, "", "None")},
        "hashes": {key: metadata[key] for key in ("sshs_model_hash", "sshs_legacy_hash") if key in metadata},
    }
    with found.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            report |= _contents(header, metadata, data)
            layers = report.pop("layers")
        except AdapterError as error:
            what = vocabulary.refusal(header.entries)
            report |= {"problem": str(error), "algorithms": {what: len(header.entries)} if what else {}}
            layers = {}
        if scan if scan is not None else size <= SCAN_LIMIT:
            report["hashes"] |= {"sha256": hashlib.sha256(data).hexdigest()}
            report["hashes"] |= {"model_hash": hashlib.sha256(memoryview(data)[header.start :]).hexdigest()}
            report |= {"scanned": True, **_scan(layers, header, data)}
    return Inspection(**report)


def _contents(header: container.Header, metadata: Mapping[str, str], data: mmap.mmap) -> dict[str, Any]:
    """Returns format, algorithms, family and groups, and the layers with their entries."""
    kind, reading = files.understood(header.entries, metadata)
    groups: dict[str, dict[str, Any]] = {}
    for name, leaves in reading.layers.items():
        group = groups.setdefault(_group(name), {"layers": 0, "ranks": Counter(), "alphas": Counter()})
        group["layers"] += 1
        rank = vocabulary.rank(leaves)
        alpha = leaves.get("alpha")
        if isinstance(alpha, container.Entry):
            begin, end = header.start + alpha.begin, header.start + alpha.end
            alpha = leaves["alpha"] = container.scalar(alpha, data[begin:end]) if end - begin <= 8 else None
        if rank is not None:
            group["ranks"][str(rank)] += 1
            group["alphas"][f"{alpha:g}" if alpha is not None else "= rank"] += 1
    return {
        "format": kind,
        "problem": f"{len(reading.unknown)} unknown keys" if reading.unknown else None,
        "algorithms": dict(Counter(map(vocabulary.algorithm, reading.layers.values()))),
        "family": names.family({name: vocabulary.weight_shape(leaves) for name, leaves in reading.layers.items()}),
        "groups": {
            name: {key: dict(value) if isinstance(value, Counter) else value for key, value in groups[name].items()}
            for name in sorted(groups)
        },
        "extras": list(reading.extras),
        "unknown": reading.unknown,
        "layers": reading.layers,
    }


def _group(name: str) -> str:
    part, _, path = name.partition(".")
    return f"{part} {next((group for pattern, group in _GROUPS if pattern.search('.' + path)), 'other')}"


def _trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """Returns the stated trigger phrase, else the ten commonest tags of the training captions.

    What lora_vision trained states it, be it that there is none.
    """
    phrase = metadata.get("modelspec.trigger_phrase") or metadata.get("lora_vision.trigger")
    if phrase or "lora_vision.trigger" in metadata:
        return [phrase] if phrase else []
    counts: Counter[str] = Counter()
    try:
        for tags in json.loads(metadata.get("ss_tag_frequency", "{}")).values():
            counts.update({str(tag).strip(): int(number) for tag, number in tags.items()})
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError):
        return []
    return [tag for tag, _ in counts.most_common(10)]


def _scan(layers: Mapping[str, Mapping[str, Any]], header: container.Header, data: mmap.mmap) -> dict[str, Any]:
    """Returns the layers with NaN or infinite numbers, and those that change nothing."""
    broken, silent = [], []
    for name, leaves in layers.items():
        views = {
            leaf: _view(value, header, data) for leaf, value in leaves.items() if isinstance(value, container.Entry)
        }
        zero = {leaf: not view.any() for leaf, view in views.items() if leaf != "on_input"}
        product = [is_zero for leaf, is_zero in zero.items() if _PRODUCT.search(leaf)]
        others = [is_zero for leaf, is_zero in zero.items() if not _PRODUCT.search(leaf)]
        if any(_not_finite(view, leaves[leaf].dtype) for leaf, view in views.items()):
            broken.append(name)
        elif leaves.get("alpha") == 0 or ((any(product) or not product) and all(others)):
            silent.append(name)
        del views
    return {"broken": broken, "silent": silent}


def _view(entry: container.Entry, header: container.Header, data: mmap.mmap) -> Any:
    """Returns a tensor's bits as unsigned integers of its element's size."""
    import numpy as np

    width = container.ITEM[entry.dtype]
    raw = data[header.start + entry.begin : header.start + entry.end]
    return np.frombuffer(raw, dtype=f"<u{width}")


def _not_finite(bits: Any, dtype: str) -> bool:
    """Returns whether floating-point numbers hold NaN or infinity: all bits of an exponent are ones."""
    exponent = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "F16": 0x1F << 10, "BF16": 0xFF << 7}.get(dtype)
    return exponent is not None and bool(((bits & bits.dtype.type(exponent)) == exponent).any())
