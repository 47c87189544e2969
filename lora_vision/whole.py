"""Files that are whole or not there, whatever interrupts the writing."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from lora_vision.errors import DataError


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


def check_place(output: Path, *, folder: bool = False) -> None:
    """See, before long work, whether a file (or folder) of this name could be written; nothing is made.

    Raises:
        DataError: Something of another kind is in the way, or the folder it would stand in forbids it.
    """
    there = next(place for place in (output.absolute(), *output.absolute().parents) if place.exists())
    kind = there.is_dir() if there != output.absolute() else there.is_dir() == folder
    if not kind:
        raise DataError(f"{output} cannot be written: {there} is a {'folder' if there.is_dir() else 'file'} already")
    if not os.access(there, os.W_OK):
        raise DataError(f"{output} cannot be written: {there} may not be changed; choose another place")


def check_writable(output: Path, folder: Path) -> None:
    """Make the folders, remove what killed runs of this output left, and prove that files can be written there.

    Raises:
        DataError: Where they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for place in (folder, folder / "samples"):
            sweep(place)
        adapters = "*.safetensors"
        for place, name in ((folder, adapters), (folder / "samples", adapters), (output.parent, output.name)):
            sweep(place, f".{name}.*")  # adapters on their way
        for place in (folder, output.parent):
            with tempfile.TemporaryFile(dir=place):
                pass
    except OSError as error:
        raise DataError(
            f"{output} cannot be written ({error.strerror}: {error.filename}); choose another place"
        ) from error
