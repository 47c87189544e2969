"""Files that are whole or not there, whatever interrupts the writing."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write under a temporary name beside the file (.NAME.PROCESS.new), flush it to the disk, then take its name.

    Raises:
        OSError: The disk is full, or the place cannot be written; what was there before stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder: Path, pattern: str = ".*.new") -> None:
    """Remove what writers that were killed left in a folder."""
    for left in folder.glob(pattern):
        left.unlink(missing_ok=True)
