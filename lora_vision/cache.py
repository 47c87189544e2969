"""Encoded pictures and captions kept on disk, each under a hash of everything it was made from."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lora_vision.whole import write_whole

logger = logging.getLogger(__name__)

Entry = dict[str, Tensor]


class Cache:
    """A folder of entries; without a folder nothing is kept.

    A key holds all that an entry depends on, so that an entry is either right or not found: what changed is made
    anew, what did not is not.
    """

    def __init__(self, folder: str | Path | None) -> None:
        """The cache in this folder, made where it is missing."""
        self.folder = None if folder is None else Path(folder).expanduser()
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def entries(self, keys: Sequence[object], make: Callable[[list[int]], list[Entry]], what: str) -> list[Entry]:
        """The entry of each key, in order; `make` gets the places of those that are not there yet."""
        paths = [self._path(key) for key in keys]
        found = [_read(path) for path in paths]
        missing = [place for place, entry in enumerate(found) if entry is None]
        for place, entry in zip(missing, make(missing) if missing else [], strict=True):
            found[place] = entry
            if (path := paths[place]) is not None:
                write_whole(path, save({name: tensor.contiguous() for name, tensor in entry.items()}))
        if self.folder is not None:
            logger.info("%s: %d from %s, %d made", what, len(keys) - len(missing), self.folder, len(missing))
        return [entry for entry in found if entry is not None]

    def _path(self, key: object) -> Path | None:
        """Where the entry of a key lies."""
        if self.folder is None:
            return None
        return self.folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()}.safetensors"


def _read(path: Path | None) -> Entry | None:
    """The entry of a file, or None where there is no whole one."""
    try:
        return None if path is None else load(path.read_bytes())
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError):
        logger.warning("%s is damaged and made anew", path)
        return None
