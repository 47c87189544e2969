"""history: the adapters of a folder, how each was made and of what, told from their headers and training folders.

Rolling back to an earlier version is choosing its file: nothing here changes anything.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from lora_vision import files, lineage
from lora_vision.errors import AdapterError


@dataclass(frozen=True)
class Entry:
    """One adapter file.

    Attributes:
        file: Path inside the folder.
        sha256: Hash of its bytes.
        bytes: Its size.
        changed: When it was last written, ISO 8601.
        how: ``train``, ``resize``, ``merge``, ``extract``; ``unknown`` for files of other tools.
        version: Version of lora_vision that wrote it, where it says so.
        steps: Training steps behind it.
        base: The base it was made for.
        data: Fingerprint of the pictures it was trained on.
        parents: The files it was made of, or whose training it went on with: as they are called here, else as they
            were called then.
        resumed: The steps done each time its training went on from a checkpoint, so far as they led to this file.
        scores: What its training folder tells: losses, best step.
        settings: With which settings it was made.
    """

    file: str
    sha256: str
    bytes: int
    changed: str
    how: str
    version: str | None
    steps: int | None
    base: str | None
    data: str | None
    parents: tuple[str, ...]
    resumed: tuple[int, ...]
    scores: Mapping[str, float]
    settings: Mapping[str, Any]


def history(folder: str | Path) -> list[Entry]:
    """The adapters in a folder and below, the oldest first; files that are no adapters are passed over.

    Raises:
        AdapterError: There is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterError(f"{folder} is no folder; expected one with adapter files")
    every = [_entry(folder, file) for file in sorted(folder.rglob("*.safetensors"))]
    found = [entry for entry in every if entry is not None]
    here: dict[str, list[str]] = {}
    for entry, _ in found:
        here.setdefault(entry.sha256, []).append(entry.file)
    entries = [_named(entry, parents, here) for entry, parents in found]
    return sorted(entries, key=lambda entry: (entry.changed, entry.file))


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Setting to its two values, where they differ."""
    return {key: (one.get(key), other.get(key)) for key in sorted({*one, *other}) if one.get(key) != other.get(key)}


def settings_of(file: str | Path) -> dict[str, Any]:
    """The settings that an adapter file was made with, as far as it tells."""
    _, metadata = files.header(file)
    return _settings(metadata)


def went_on_from(before: Path, output: Path, extends: int | None, steps: int | None) -> dict[str, str]:
    """The header string that names the finished adapter a longer run went on from; nothing where there was none.

    A run that broke off and was resumed names none: its file is that of an unbroken run. What was made longer before
    keeps what its file tells.

    Args:
        before: The adapter the earlier run wrote, not yet written over.
        output: Where this run's adapter goes.
        extends: Steps of the earlier run, if this one made it longer.
        steps: Steps of this run.
    """
    if extends is None:
        return {}
    try:
        metadata = files.header(before)[1]
        made = json.loads(metadata["lora_vision.config"])["steps"]
    except (AdapterError, KeyError, TypeError, ValueError):
        return {}
    if made == steps and lineage.KEY in metadata:
        return {lineage.KEY: metadata[lineage.KEY]}
    if made != extends:
        return {}
    told = {**lineage.parent_of(before, step=extends), "file": before.relative_to(output.parent).as_posix()}
    return lineage.record({}, "train", [told], {"resumed at step": extends})


def table(entries: list[Entry]) -> str:
    """The entries for a person, one below the other; nothing where there are none."""
    lines = []
    for entry in entries:
        facts = [
            f"{entry.steps} steps" if entry.steps is not None else "",
            f"{'resumed from' if entry.how == 'train' else 'of'} {' + '.join(entry.parents)}" if entry.parents else "",
            f"resumed at step {', '.join(map(str, entry.resumed))}" if entry.resumed else "",
            f"on {entry.base}" if entry.base else "",
            f"pictures {entry.data[:12]}" if entry.data else "",
            *(f"{name} {value:.4g}" for name, value in entry.scores.items()),
            f"version {entry.version}" if entry.version else "",
        ]
        about = f"{entry.changed}  {entry.how:8} {entry.bytes / 1e6:7.2f} MB  {entry.sha256[:12]}"
        lines += [entry.file, f"  {about}", f"  {', '.join(fact for fact in facts if fact)}".rstrip()]
    return "\n".join(line for line in lines if line)


def to_dict(entries: list[Entry]) -> list[dict[str, Any]]:
    """The entries as plain values, for JSON."""
    return [asdict(entry) for entry in entries]


def _entry(folder: Path, file: Path) -> tuple[Entry, tuple[Mapping[str, Any], ...]] | None:
    """The entry of one file and its parents as it tells them, or None where it is no adapter."""
    try:
        header, metadata = files.header(file)
        files.understood(header.entries, metadata)
    except AdapterError:
        return None
    told = lineage.read(metadata)
    how = told.how if told else "train" if "lora_vision.config" in metadata else "unknown"
    told_steps = metadata.get("lora_vision.step") or metadata.get("ss_steps") or ""
    steps = int(told_steps) if told_steps.isdecimal() else None
    status, run = file.stat(), _run(file) if how == "train" else {}
    entry = Entry(
        file=str(file.relative_to(folder)),
        sha256=lineage.sha256_of(file),
        bytes=status.st_size,
        changed=datetime.fromtimestamp(status.st_mtime).isoformat(timespec="seconds"),
        how=how,
        version=metadata.get("lora_vision.version"),
        steps=steps,
        base=metadata.get("lora_vision.base") or metadata.get("ss_sd_model_name"),
        data=metadata.get("lora_vision.data_fingerprint"),
        parents=(),
        resumed=tuple(step for step in _resumed(run) if steps is None or step < steps),
        scores=_scores(run),
        settings=_settings(metadata),
    )
    return entry, told.parents if told else ()


def _named(entry: Entry, parents: tuple[Mapping[str, Any], ...], here: Mapping[str, list[str]]) -> Entry:
    """The entry with its parents called as they are called in this folder; of copies the one still called as then."""
    names = []
    for parent in parents:
        told = str(parent.get("file", "?"))
        copies = here.get(str(parent.get("sha256")), [f"{told} (not here)"])
        name = next((copy for copy in copies if Path(copy).name == Path(told).name), copies[0])
        scale = parent.get("scale")
        names.append(name if scale in (None, 1, 1.0) else f"{name}:{scale:g}")
    return Entry(**{**asdict(entry), "parents": tuple(names)})


def _settings(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The settings in a header: ours, or kohya's ``ss_`` ones; what made a child of it counts too."""
    try:
        found = dict(json.loads(metadata["lora_vision.config"]))
    except (KeyError, ValueError, TypeError):
        found = {k: v for k, v in metadata.items() if k.startswith("ss_") and len(v) < 200}
    for key in ("lora_vision.base_fingerprint", "lora_vision.data_fingerprint", "lora_vision.version"):
        if key in metadata:
            found[key.removeprefix("lora_vision.")] = metadata[key]
    told = lineage.read(metadata)
    return found | ({f"{told.how} {key}": value for key, value in told.settings.items()} if told else {})


def _run(file: Path) -> Mapping[str, Any]:
    """What the training folder beside a file, or around it, keeps of its run."""
    for folder in (file.with_name(f"{file.stem}-training"), file.parent):
        try:
            told = json.loads((folder / "history.json").read_text())
        except (OSError, ValueError):
            continue
        return told if isinstance(told, dict) else {}
    return {}


def _resumed(run: Mapping[str, Any]) -> tuple[int, ...]:
    steps = run.get("resumed")
    return tuple(step for step in steps if isinstance(step, int)) if isinstance(steps, list) else ()


def _scores(run: Mapping[str, Any]) -> dict[str, float]:
    """How well a run went."""
    try:
        losses = [float(loss) for loss in run["losses"] if loss is not None][-20:]
        held_out = {int(step): float(loss) for step, loss in run["validation"].items() if loss is not None}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}
    scores = {"loss": sum(losses) / len(losses)} if losses else {}
    if held_out:
        best = min(held_out, key=held_out.__getitem__)
        scores |= {"held-out loss": held_out[max(held_out)], "best held-out loss": held_out[best], "at step": best}
    return {name: value for name, value in scores.items() if math.isfinite(value)}
