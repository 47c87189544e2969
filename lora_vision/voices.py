"""What a user writes about adapters, read: files with weights, tags in prompts, schedules, regions, sweeps."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lora_vision import schedules
from lora_vision.adapter import Adapter
from lora_vision.arguments import near
from lora_vision.errors import AdapterError
from lora_vision.lineage import sha256_of
from lora_vision.schedules import Schedule

ENDINGS = (".safetensors", ".pt", ".bin")
TAG = re.compile(r"<lora:([^<>]*)>")
ELLIPSES = ("...", "…")


@dataclass(frozen=True)
class Voice:
    """An adapter that sounds in a picture.

    Attributes:
        name: What it is called here: the file's stem, numbered where two are alike.
        file: The file, as the user names it.
        scale: The user's multiplier.
        sha256: Hash (hex) of the file's bytes.
        layers: Globs over layer names with a multiplier of their own.
    """

    name: str
    file: str
    scale: float
    sha256: str
    layers: Mapping[str, float] = field(default_factory=dict)

    def weight(self, scale: float | None = None) -> float | dict[str, float]:
        """The weight as ``Blend.set`` takes it, at this scale instead of its own if one is given."""
        scale = self.scale if scale is None else scale
        return {"*": scale, **self.layers} if self.layers else scale


def read_shelf(folder: str | None) -> dict[str, list[Path]]:
    """The adapter files in a folder and those below it, by stem.

    Raises:
        AdapterError: There is no such folder.
    """
    if folder is None:
        return {}
    if not Path(folder).is_dir():
        raise AdapterError(f"--adapter-dir {folder}: there is no such folder")
    found: dict[str, list[Path]] = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix in ENDINGS:
            found.setdefault(path.stem, []).append(path)
    return found


def read_voices(texts: Sequence[str], shelf: Mapping[str, list[Path]] | None = None) -> list[Voice]:
    """The adapters that FILE, FILE:SCALE or FILE:SCALE@GLOB=SCALE... name; colons and @ inside a path stay with it.

    Args:
        texts: What follows ``--adapter``.
        shelf: Files that may be called by their stems.

    Raises:
        AdapterError: There is no such file, or a scale is no finite number.
    """
    voices: list[Voice] = []
    for text in texts:
        file, scale, layers = _read_voice(text, shelf or {})
        voices.append(_voice(file, scale, layers, voices))
    return voices


def refuse_overwriting(output: str | Path, source: str | Path) -> None:
    """Nothing, unless what is to be written would take the place of what it is made of.

    Raises:
        AdapterError: They are one file or folder.
    """
    if Path(output).exists() and Path(source).exists() and Path(output).samefile(source):
        raise AdapterError(f"{output} would overwrite what it is made of; choose another name")


def read_tags(prompt: str) -> tuple[str, dict[str, float]]:
    """The prompt without its ``<lora:NAME:SCALE>`` tags, and the scale of each name in them (1 if left out).

    Automatic1111's web UI takes adapters into prompts in this way.

    Raises:
        AdapterError: A tag has another form, or names an adapter twice.
    """
    found: dict[str, float] = {}
    for tag in TAG.finditer(prompt):
        name, *rest = tag[1].split(":")
        scale = _number(rest[0]) if len(rest) == 1 else 1.0
        if not name or len(rest) > 1 or scale is None or name in found:
            problem = "names it a second time" if name in found else "cannot be read"
            raise AdapterError(f"{tag[0]} {problem}; expected one <lora:NAME:SCALE>, as <lora:ink:0.8>")
        found[name] = scale
    return (" ".join(TAG.sub("", prompt).split()) if found else prompt), found


@dataclass(frozen=True)
class Part:
    """A part of a picture, as a user writes it.

    Attributes:
        place: One of PLACES, or the file of a mask.
        mask: Where it is, [H, W] of any size, 1 inside.
        scales: Adapter name to scale there.
        prompt: What is drawn there, if not the picture's own prompt.
    """

    place: str
    mask: Tensor
    scales: Mapping[str, float]
    prompt: str | None


PLACES: Mapping[str, list[list[int]]] = {
    "left": [[1, 0]],
    "right": [[0, 1]],
    "top": [[1], [0]],
    "bottom": [[0], [1]],
    "middle": [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]],
}
"""The parts of a picture that have a name."""


def read_parts(texts: Sequence[str]) -> list[Part]:
    """The parts of a picture that ``PLACE=PROMPT`` name, the prompt with tags, or nothing but tags.

    Raises:
        AdapterError: A place is none of PLACES and no picture, a tag cannot be read, or nothing follows the place.
    """
    found = []
    for text in texts:
        place, equals, prompt = text.partition("=")
        if not equals or not prompt.strip():
            raise AdapterError(f"--region {text}: expected PLACE=PROMPT with adapters as <lora:NAME:SCALE> in it")
        words, scales = read_tags(prompt)
        found.append(Part(place, _mask(place), scales, words.strip() or None))
    return found


def _mask(place: str) -> Tensor:
    if place in PLACES:
        return torch.tensor(PLACES[place], dtype=torch.float32)
    if not Path(place).is_file():
        raise AdapterError(f"--region {place}: there is no such mask picture and no such place: {near(place, PLACES)}")
    try:
        with Image.open(place) as picture:
            mask = torch.from_numpy(np.array(picture.convert("L"))).float() / 255
    except OSError as error:
        raise AdapterError(f"--region {place}: this is no picture; a mask is one, white where the region is") from error
    if not mask.any():
        raise AdapterError(f"--region {place}: the mask is black all over; it has to be white where the region is")
    return mask


def with_named(voices: Sequence[Voice], names: Iterable[str], shelf: Mapping[str, list[Path]]) -> list[Voice]:
    """The voices, and silent ones for the further names, whose files stand on the shelf.

    Raises:
        AdapterError: A name is neither there nor on the shelf, or two files have it; near matches are listed.
    """
    every = list(voices)
    for name in dict.fromkeys(names):
        if name not in {voice.name for voice in every}:
            every.append(_voice(str(_on_shelf(name, shelf, [v.name for v in voices])), 0.0, {}, every))
    return every


def read_sweeps(texts: Sequence[str]) -> dict[str, list[float]]:
    """The scales of each swept adapter: ``ink=0,0.5,1`` or ``ink=0,0.25,...,1``.

    Raises:
        AdapterError: A text has another form, names an adapter twice, or there are more than two.
    """
    found: dict[str, list[float]] = {}
    for text in " ".join(texts).split():
        name, _, listed = text.rpartition("=")
        values = _listed(listed)
        if not name or not values or name in found:
            raise AdapterError(
                f"--sweep {text}: expected NAME=SCALE,SCALE,... once for each name, as ink=0,0.25,...,1 with "
                "steps that reach the end; prompts stand before the flag"
            )
        found[name] = values
    if len(found) > 2:
        raise AdapterError(f"--sweep of {', '.join(found)}: a sheet has two sides; sweep one or two adapters")
    return found


def read_schedules(texts: Sequence[str], adapters: Mapping[str, Adapter]) -> dict[str, Schedule]:
    """The schedule of each adapter that has one: ``NAME=SCHEDULE``, or ``SCHEDULE`` for all of them.

    Besides those of ``schedules.read``, for all: ``switch`` or ``switch:STEPS`` (taking turns), ``klora`` (the first
    adapter is the subject, the second the style).

    Args:
        texts: What follows ``--schedule``.
        adapters: The adapters by name, in the user's order.

    Raises:
        AdapterError: A name or a schedule is unknown, or the adapters do not suit it.
    """
    found: dict[str, Schedule] = {}
    for text in texts:
        name, named, spelled = text.rpartition("=")
        if named and name not in adapters:
            raise AdapterError(f"--schedule {text}: no adapter is called {name!r}: {near(name, adapters)}")
        word, _, number = spelled.partition(":")
        try:
            if word == "klora":
                if named or number or len(adapters) != 2:
                    raise ValueError("klora is for exactly two adapters, the subject and then the style")
                found |= schedules.klora(adapters)
            elif word == "switch":
                if named:
                    raise ValueError("switch is for all adapters; leave the name out")
                found |= schedules.switch(list(adapters), int(number or 1))
            else:
                found |= dict.fromkeys([name] if named else adapters, schedules.read(spelled))
        except ValueError as error:  # AdapterError is one
            raise AdapterError(f"--schedule {text}: {error}") from error
    return found


def _read_voice(text: str, shelf: Mapping[str, list[Path]]) -> tuple[str, float, dict[str, float]]:
    """File, scale and globs."""
    pieces = text.split("@")
    for count in [len(pieces)] if Path(text).exists() else range(1, len(pieces) + 1):
        head = "@".join(pieces[:count])
        file, colon, tail = (head, "", "") if Path(head).exists() else head.rpartition(":")
        file = file or tail
        if not Path(file).exists():
            if head not in shelf and file not in shelf:
                continue
            file, colon = (head, "") if head in shelf else (file, colon)
            file = str(_on_shelf(file, shelf, ()))
        scale = _number(tail) if colon else 1.0
        if scale is None:
            raise AdapterError(f"--adapter {text}: {tail!r} is no scale; a number is needed, as {file}:0.8")
        return file, scale, dict(_read_glob(text, piece) for piece in pieces[count:])
    stem = Path(pieces[0].rpartition(":")[0] or pieces[0]).stem
    meant = f" ({near(stem, shelf)})" if shelf else ""
    raise AdapterError(
        f"--adapter {text}: there is no such file{meant}; expected FILE, FILE:SCALE or FILE:SCALE@GLOB=SCALE"
    )


def _read_glob(text: str, piece: str) -> tuple[str, float]:
    glob, _, tail = piece.rpartition("=")
    scale = _number(tail)
    if not glob or scale is None:
        raise AdapterError(f"--adapter {text}: @{piece} cannot be read; expected @GLOB=SCALE, as @unet.up_blocks.*=0.5")
    return glob, scale


def _on_shelf(name: str, shelf: Mapping[str, list[Path]], others: Sequence[str]) -> Path:
    found = shelf.get(name, [])
    if len(found) > 1:
        raise AdapterError(f"{len(found)} files are called {name!r}: {', '.join(map(str, found))}; use --adapter FILE")
    if not found:
        known = {*shelf, *others}
        advice = near(name, known) if known else "there is none; give --adapter FILE or --adapter-dir FOLDER"
        raise AdapterError(f"no adapter is called {name!r}: {advice}")
    return found[0]


def _voice(file: str, scale: float, layers: Mapping[str, float], others: Sequence[Voice]) -> Voice:
    names = {voice.name for voice in others}
    stem = Path(file).stem
    name = next(n for n in (stem, *(f"{stem}-{i}" for i in range(2, len(names) + 2))) if n not in names)
    return Voice(name, file, scale, sha256_of(file), layers)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _listed(text: str) -> list[float]:
    """The numbers of a list whose dots, between two and one, stand for equal steps; nothing if it cannot be read."""
    words = text.split(",")
    dots = [at for at, word in enumerate(words) if word in ELLIPSES]
    values = [_number(word) for word in words if word not in ELLIPSES]
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values) or not dots:
        return numbers if len(numbers) == len(values) else []
    at = dots[0]
    if len(dots) > 1 or at < 2 or at != len(words) - 2:
        return []
    *before, end = numbers
    step = before[-1] - before[-2]
    count = round((end - before[-1]) / step) if step else 0
    if count < 1 or count > 1000 or abs(before[-1] + count * step - end) > 1e-6 * abs(step):
        return []
    return [*before, *(round(before[-1] + number * step, 10) for number in range(1, count)), end]
