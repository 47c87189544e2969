"""Where an adapter file comes from: what made it, out of which files, known by their hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

KEY = "lora_vision.lineage"
"""The header string that holds it, as JSON."""

_OF_THE_RANK = ("ss_network_dim", "ss_network_alpha", "lora_vision.signed_off")


@dataclass(frozen=True)
class Lineage:
    """How a file came about.

    Attributes:
        how: ``resize``, ``merge``, ``extract``, ``bake`` ...
        parents: Name and sha256 of each file it was made of, weights too where there are some.
        settings: What it was made with.
    """

    how: str
    parents: tuple[Mapping[str, Any], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """One line of JSON, the same for the same lineage."""
        return json.dumps(asdict(self), sort_keys=True, default=str)


def record(
    metadata: Mapping[str, str],
    how: str,
    parents: Iterable[str | Path | Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> dict[str, str]:
    """The header strings of a child: the parent's own, less what no longer holds, and how the child was made.

    Args:
        metadata: The header strings to carry on; ``{}`` for a child of several.
        how: The verb.
        parents: Files, or what to say about each (at least ``file`` and ``sha256``).
        settings: With which settings; plain values.
    """
    told = tuple(parent if isinstance(parent, Mapping) else parent_of(parent) for parent in parents)
    kept = {key: value for key, value in metadata.items() if key not in _OF_THE_RANK}
    return kept | {KEY: Lineage(how, told, dict(settings)).to_json()}


def parent_of(path: str | Path, **more: Any) -> dict[str, Any]:
    """A file's name and hash, and whatever else is to be said about it."""
    return {"file": Path(path).name, "sha256": sha256_of(path), **more}


def read(metadata: Mapping[str, str]) -> Lineage | None:
    """The lineage that header strings tell, or None where they tell none that can be read."""
    try:
        told = json.loads(metadata[KEY])
        return Lineage(str(told["how"]), tuple(dict(parent) for parent in told["parents"]), dict(told["settings"]))
    except (KeyError, TypeError, ValueError):
        return None


def sha256_of(path: str | Path) -> str:
    """Hash (hex) of a file's bytes, or of all files of a folder in order of their paths."""
    path = Path(path)
    digest = hashlib.sha256()
    for file in sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]:
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
