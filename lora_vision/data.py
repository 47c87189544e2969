"""A folder of pictures: checked, captioned, split, and read as pixels."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lora_vision.errors import DataError

logger = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MASKS = (".mask.png", "-masklabel.png")
FEWEST = 4
CONCEPT = re.compile(r"(\d+)_(.+)")
Size = tuple[int, int]


@dataclass(frozen=True)
class Picture:
    """One picture of a set.

    Attributes:
        path: Its file.
        caption: What it shows, as the text encoder will read it.
        size: Height and width in pixels after the EXIF rotation.
        digest: SHA-256 (hex) of the content of its file and of its mask's.
        mask: The file that says how much each pixel counts; the picture's own file where its alpha channel does.
        flipped: Whether its mirror image is meant.
        prior: Whether it shows what shall stay as it is.
        look: Its 16 x 16 thumbnail, RGB, to find pictures that look alike.
    """

    path: Path
    caption: str
    size: Size
    digest: str
    mask: Path | None = None
    flipped: bool = False
    prior: bool = False
    look: bytes = field(default=b"", repr=False, compare=False)


@dataclass(frozen=True)
class PictureSet:
    """A checked folder of pictures, in an order that depends on nothing but names and content.

    Attributes:
        train: Pictures to learn from; one that is to be shown several times in each pass stands there as often.
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
        parts = (("t", self.train), ("v", self.held_out))
        rows = [[p.digest, p.caption, part, *_marks(p)] for part, pictures in parts for p in pictures]
        return hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()


def read_pictures(
    folder: str | Path, *, trigger: str | None = None, holdout: float = 0.1, alpha_mask: bool = False
) -> PictureSet:
    """The pictures of a folder and of the concept folders in it, every one of them opened and checked.

    A caption comes from NAME.txt beside the picture, else from metadata.jsonl ("file_name" and "text" in each line, the
    Hugging Face imagefolder convention); the trigger words are put before it, or stand alone where there is none.
    Where nothing at all says what the pictures are, the folder's name becomes the trigger. A subfolder called 10_fox is
    a concept (kohya's convention): its pictures stand 10 times in the set, as "fox" where a caption is missing.
    NAME.mask.png (or OneTrainer's NAME-masklabel.png) beside a picture says how much each pixel counts.

    Args:
        folder: Where the png, jpg and webp files are.
        trigger: Words that will call the style.
        holdout: Share of the pictures to validate on; at least one unless it is 0. They are chosen by content, so
            equal pictures stay on one side and a further picture moves no other.
        alpha_mask: Whether an alpha channel says how much each pixel counts.

    Raises:
        DataError: For a folder that is missing or empty, too few pictures, a picture that cannot be read, captions
            for pictures that are not there, pictures without a caption beside ones that have one.
    """
    folder = Path(folder).expanduser()
    if not 0 <= holdout < 1:
        raise DataError(f"found a held-out share of {holdout}; expected at least 0 and less than 1")
    rows: list[tuple[Path, str | None, int]] = []
    for place, words, times in _concepts(folder):
        paths = _picture_paths(place)
        captions = _captions(place, paths)
        rows += [(path, captions.get(path.name, words), times) for path in paths]
    if not rows:
        raise DataError(_nothing(folder))
    missing = [path.name for path, caption, _ in rows if caption is None]
    if trigger is None and len(missing) == len(rows):
        trigger = " ".join(folder.resolve().name.replace("_", " ").replace("-", " ").split())
        logger.info("no captions found; using the folder's name as the trigger: %r", trigger)
    elif trigger is None and missing:
        raise DataError(
            f"{len(missing)} of {len(rows)} pictures in {folder} have no caption ({_few(missing)}); "
            "add NAME.txt beside each, or give a trigger word"
        )
    pictures = [_check_picture(path, _with_trigger(words or "", trigger), alpha_mask) for path, words, _ in rows]
    duplicates = _duplicates(pictures)
    for group in duplicates:
        logger.warning("the same picture %d times: %s", len(group), _few([path.name for path in group]))
    distinct = sorted({picture.digest for picture in pictures})
    if len(distinct) < FEWEST:
        raise DataError(f"{folder} has {len(distinct)} different pictures; expected at least {FEWEST}: add more")
    count = max(1, round(len(distinct) * holdout)) if holdout else 0
    kept_out = set(distinct[:count])
    often = [picture for picture, row in zip(pictures, rows, strict=True) for _ in range(row[2])]
    return PictureSet(
        train=tuple(picture for picture in often if picture.digest not in kept_out),
        held_out=tuple(picture for picture in pictures if picture.digest in kept_out),
        trigger=trigger,
        duplicates=duplicates,
    )


def load_pixels(path: Path, size: int | Size, *, flipped: bool = False) -> Tensor:
    """Pixels [3, H, W] in [-1, 1] of that size: the middle of a picture that is scaled to cover it.

    EXIF rotation is applied, transparency put on white; grayscale, palette, CMYK and 16-bit pictures become RGB.

    Raises:
        DataError: Where it cannot be read.
    """
    shown = _shown(open_picture(path), size, flipped)
    pixels = torch.from_numpy(np.array(shown, dtype=np.uint8))
    return pixels.permute(2, 0, 1).float().div_(127.5).sub_(1.0)


def load_mask(picture: Picture, size: Size) -> Tensor:
    """How much each pixel of the picture counts [1, H, W], 0 to 1, cut as `load_pixels` cuts; ones without a mask.

    Raises:
        DataError: Where the mask cannot be read, or is not of the picture's size.
    """
    if picture.mask is None:
        return torch.ones(1, *size)
    mask = _upright(picture.mask)
    mask = mask.convert("RGBA").getchannel("A") if picture.mask == picture.path else mask.convert("L")
    if mask.size != picture.size[::-1]:
        raise DataError(f"{picture.mask} has {mask.size} pixels; expected those of its picture, {picture.size[::-1]}")
    return torch.from_numpy(np.array(_shown(mask, size, picture.flipped))).float().div_(255)[None]


def crop_offset(size: Size, shown: int | Size) -> Size:
    """Top and left of the crop of `load_pixels`, in pixels of the scaled picture (SDXL is told them)."""
    rows, columns = (shown, shown) if isinstance(shown, int) else shown
    scale = max(rows / size[0], columns / size[1])
    return round((size[0] * scale - rows) / 2), round((size[1] * scale - columns) / 2)


def _shown(picture: Image.Image, size: int | Size, flipped: bool) -> Image.Image:
    """The middle of the picture (or its mirror image), scaled to cover the size [height, width]."""
    rows, columns = (size, size) if isinstance(size, int) else size
    fitted = ImageOps.fit(picture, (columns, rows), Image.Resampling.LANCZOS)
    return ImageOps.mirror(fitted) if flipped else fitted


def open_picture(path: Path) -> Image.Image:
    """The picture as upright RGB: EXIF rotation applied, transparency put on white.

    Raises:
        DataError: Where it cannot be read.
    """
    picture = _upright(path)
    if picture.mode.startswith("I") or picture.mode == "F":  # 16-bit grayscale: Pillow's own conversion clips it to 255
        values = np.asarray(picture, dtype=np.float64)
        picture = Image.fromarray(np.clip(values / 257.0, 0, 255).round().astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(ground, picture)
    return picture.convert("RGB")


def _upright(path: Path) -> Image.Image:
    """The picture as it is stored, EXIF rotation applied."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # it refuses twice that by itself
            with Image.open(path) as file:
                picture = ImageOps.exif_transpose(file)
                picture.load()
                return picture
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, EOFError, struct.error …
        raise DataError(f"{path} cannot be read as a picture ({error}); repair or remove it") from error


def _check_picture(path: Path, caption: str, alpha_mask: bool) -> Picture:
    """The picture, decoded once so that a broken one is found before any training."""
    picture = open_picture(path)
    content = hashlib.sha256(path.read_bytes())
    masks = [path.with_name(path.stem + ending) for ending in MASKS]
    mask = next((file for file in masks if file.is_file()), None)
    if mask is not None:
        content.update(mask.read_bytes())
    elif alpha_mask and "A" in _upright(path).getbands():
        mask = path
    look = picture.resize((16, 16), Image.Resampling.BOX).tobytes()
    found = Picture(path, caption, (picture.height, picture.width), content.hexdigest(), mask, look=look)
    if mask is not None:
        load_mask(found, found.size)
    return found


def _marks(picture: Picture) -> list[str]:
    """What sets a picture apart from one that is shown whole and as it is."""
    alpha = picture.mask == picture.path
    return [name for name, on in (("alpha", alpha), ("flipped", picture.flipped), ("prior", picture.prior)) if on]


def _concepts(folder: Path) -> list[tuple[Path, str | None, int]]:
    """The folder and its concept folders: place, words for missing captions, how often each picture is shown."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; expected one with {', '.join(SUFFIXES)} pictures")
    found: list[tuple[Path, str | None, int]] = [(folder, None, 1)]
    for place in sorted(folder.iterdir()):
        if place.is_dir() and (match := CONCEPT.fullmatch(place.name)) and int(match[1]):
            found.append((place, " ".join(match[2].replace("_", " ").split()), int(match[1])))
    return found


def _picture_paths(folder: Path) -> list[Path]:
    """The picture files of the folder, masks left out, sorted by name."""
    paths = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")]
    return sorted((path for path in paths if not path.name.endswith(MASKS)), key=lambda path: path.name)


def _nothing(folder: Path) -> str:
    """Why nothing was found in a folder."""
    inside = [entry.name for entry in sorted(folder.iterdir()) if entry.is_dir()]
    hint = f"; of subfolders only concepts such as 10_fox are read, give one of {_few(inside)}" if inside else ""
    return f"{folder} has no pictures; expected {', '.join(SUFFIXES)}{hint}"


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
