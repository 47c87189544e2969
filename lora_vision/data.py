"""A folder of pictures: checked, captioned, split, and read as pixels."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lora_vision.errors import DataError

logger = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FEWEST = 4


@dataclass(frozen=True)
class Picture:
    """One picture of a set.

    Attributes:
        path: Its file.
        caption: What it shows, as the text encoder will read it.
        size: Height and width in pixels after the EXIF rotation.
        digest: SHA-256 (hex) of the file's content.
    """

    path: Path
    caption: str
    size: tuple[int, int]
    digest: str


@dataclass(frozen=True)
class PictureSet:
    """A checked folder of pictures, in an order that depends on nothing but names and content.

    Attributes:
        train: Pictures to learn from.
        held_out: Pictures to validate on, never trained on.
        trigger: The words that call the style, if there are any.
        duplicates: Groups of files with the same content.
    """

    train: tuple[Picture, ...]
    held_out: tuple[Picture, ...]
    trigger: str | None
    duplicates: tuple[tuple[Path, ...], ...]

    @property
    def fingerprint(self) -> str:
        """Hash (hex) of all contents and captions and of the split; renaming the files does not change it."""
        rows = [[p.digest, p.caption, part] for part, ps in (("t", self.train), ("v", self.held_out)) for p in ps]
        return hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()


def read_pictures(folder: str | Path, *, trigger: str | None = None, holdout: float = 0.1) -> PictureSet:
    """The pictures of a folder (not of its subfolders), every one of them opened and checked.

    A caption comes from NAME.txt beside the picture, else from metadata.jsonl ("file_name" and "text" in each line, the
    Hugging Face imagefolder convention); the trigger words are put before it, or stand alone where there is none.
    Where nothing at all says what the pictures are, the folder's name becomes the trigger.

    Args:
        folder: Where the png, jpg and webp files are.
        trigger: Words that will call the style.
        holdout: Share of the pictures to validate on; at least one unless it is 0. They are chosen by content, so
            equal pictures stay on one side and a further picture moves no other.

    Raises:
        DataError: For a folder that is missing or empty, too few pictures, a picture that cannot be read, captions
            for pictures that are not there, pictures without a caption beside ones that have one.
    """
    folder = Path(folder).expanduser()
    paths = _picture_paths(folder)
    if not 0 <= holdout < 1:
        raise DataError(f"found a held-out share of {holdout}; expected at least 0 and less than 1")
    captions = _captions(folder, paths)
    missing = [path.name for path in paths if path.name not in captions]
    if trigger is None and len(missing) == len(paths):
        trigger = " ".join(folder.resolve().name.replace("_", " ").replace("-", " ").split())
        logger.info("no captions found; using the folder's name as the trigger: %r", trigger)
    elif trigger is None and missing:
        raise DataError(
            f"{len(missing)} of {len(paths)} pictures in {folder} have no caption ({_few(missing)}); "
            "add NAME.txt beside each, or give a trigger word"
        )
    pictures = [_check_picture(path, _with_trigger(captions.get(path.name, ""), trigger)) for path in paths]
    duplicates = _duplicates(pictures)
    for group in duplicates:
        logger.warning("the same picture %d times: %s", len(group), _few([path.name for path in group]))
    distinct = sorted({picture.digest for picture in pictures})
    if len(distinct) < FEWEST:
        raise DataError(f"{folder} has {len(distinct)} different pictures; expected at least {FEWEST}: add more")
    count = max(1, round(len(distinct) * holdout)) if holdout else 0
    kept_out = set(distinct[:count])
    return PictureSet(
        train=tuple(picture for picture in pictures if picture.digest not in kept_out),
        held_out=tuple(picture for picture in pictures if picture.digest in kept_out),
        trigger=trigger,
        duplicates=duplicates,
    )


def load_pixels(path: Path, resolution: int) -> Tensor:
    """Pixels [3, resolution, resolution] in [-1, 1]: the middle of a picture that is scaled to cover the square.

    EXIF rotation is applied, transparency put on white; grayscale, palette, CMYK and 16-bit pictures become RGB.

    Raises:
        DataError: Where it cannot be read.
    """
    square = ImageOps.fit(open_picture(path), (resolution, resolution), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(square, dtype=np.uint8))
    return pixels.permute(2, 0, 1).float().div_(127.5).sub_(1.0)


def crop_offset(size: tuple[int, int], resolution: int) -> tuple[int, int]:
    """Top and left of the crop of `load_pixels`, in pixels of the scaled picture (SDXL is told them)."""
    height, width = size
    scale = resolution / min(height, width)
    return round((height * scale - resolution) / 2), round((width * scale - resolution) / 2)


def open_picture(path: Path) -> Image.Image:
    """The picture as upright RGB: EXIF rotation applied, transparency put on white.

    Raises:
        DataError: Where it cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # it refuses twice that by itself
            with Image.open(path) as file:
                picture = ImageOps.exif_transpose(file)
                picture.load()
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, EOFError, struct.error …
        raise DataError(f"{path} cannot be read as a picture ({error}); repair or remove it") from error
    if picture.mode.startswith("I") or picture.mode == "F":  # 16-bit grayscale: Pillow's own conversion clips it to 255
        values = np.asarray(picture, dtype=np.float64)
        picture = Image.fromarray(np.clip(values / 257.0, 0, 255).round().astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(ground, picture)
    return picture.convert("RGB")


def _check_picture(path: Path, caption: str) -> Picture:
    """The picture, decoded once so that a broken one is found before any training."""
    width, height = open_picture(path).size
    return Picture(path, caption, (height, width), hashlib.sha256(path.read_bytes()).hexdigest())


def _picture_paths(folder: Path) -> list[Path]:
    """The picture files of the folder, sorted by name."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; expected one with {', '.join(SUFFIXES)} pictures")
    paths = sorted(
        (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")),
        key=lambda path: path.name,
    )
    if not paths:
        inside = [entry.name for entry in sorted(folder.iterdir()) if entry.is_dir()]
        hint = f"; pictures of subfolders are not read, give one of {_few(inside)}" if inside else ""
        raise DataError(f"{folder} has no pictures; expected {', '.join(SUFFIXES)}{hint}")
    return paths


def _captions(folder: Path, paths: Sequence[Path]) -> dict[str, str]:
    """Captions by picture name: those of metadata.jsonl, over them those of the .txt files."""
    names = {path.name for path in paths}
    captions = _read_metadata(folder / "metadata.jsonl", names)
    for path in paths:
        beside = path.with_suffix(".txt")
        if beside.is_file():
            captions[path.name] = " ".join(_read_text(beside).split())
    return {name: caption for name, caption in captions.items() if caption}


def _read_metadata(file: Path, names: set[str]) -> dict[str, str]:
    """Captions by picture name from a metadata.jsonl, none where there is no such file."""
    captions: dict[str, str] = {}
    lines = _read_text(file).splitlines() if file.is_file() else []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, caption = row["file_name"], row["text"] if "text" in row else row["caption"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f'{file} line {number} is not understood ({error}); expected {{"file_name": "a.png", "text": "a fox"}}'
            ) from error
        if name not in names:
            raise DataError(f"{file} line {number} names {name!r}, which is not in the folder; remove the line")
        captions[name] = " ".join(str(caption).split())
    return captions


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); expected text in UTF-8") from error


def _with_trigger(caption: str, trigger: str | None) -> str:
    """The caption, called by the trigger."""
    if not trigger or trigger.lower() in caption.lower():
        return caption
    return f"{trigger}, {caption}" if caption else trigger


def _duplicates(pictures: Sequence[Picture]) -> tuple[tuple[Path, ...], ...]:
    """Groups of files with the same content."""
    groups: dict[str, list[Path]] = {}
    for picture in pictures:
        groups.setdefault(picture.digest, []).append(picture.path)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def _few(names: Sequence[str]) -> str:
    """The first names, and how many more."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
