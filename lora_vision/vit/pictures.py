"""Labelled pictures: class folders, CSV or metadata.jsonl in; checked, split, and told what is wrong with them."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lora_vision.data import SUFFIXES, open_picture
from lora_vision.errors import DataError

logger = logging.getLogger(__name__)

SPLITS: Mapping[str, str] = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
"""What folders and columns call a split, and what it is called here."""
TABLES = ("metadata.jsonl", "metadata.csv")


@dataclass(frozen=True)
class Labelled:
    """One picture: file, number of its label, SHA-256 of its content, split ("" where none is given)."""

    path: Path
    label: int
    digest: str
    split: str = ""


@dataclass(frozen=True)
class Dataset:
    """Checked pictures of at least two classes.

    Attributes:
        labels: Names of the classes, in the order of their numbers.
        pictures: All of them, in an order that depends on nothing but names.
        problems: What was found wrong, and what was done about it: a line for each kind.
    """

    labels: tuple[str, ...]
    pictures: tuple[Labelled, ...]
    problems: tuple[str, ...] = ()

    def of(self, split: str) -> tuple[Labelled, ...]:
        """The pictures of a split."""
        return tuple(picture for picture in self.pictures if picture.split == split)

    @property
    def fingerprint(self) -> str:
        """Hash (hex) of all contents, labels and splits; renaming files does not change it."""
        rows = sorted([picture.digest, self.labels[picture.label], picture.split] for picture in self.pictures)
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def counts(self, split: str) -> list[int]:
        """How many pictures of each class a split has."""
        found = Counter(picture.label for picture in self.of(split))
        return [found[number] for number in range(len(self.labels))]


def read_dataset(data: str | Path, labels: Sequence[str] | None = None) -> Dataset:
    """The pictures of a folder or table, every one of them opened and checked; nothing is split yet.

    Pictures that cannot be read are left out and named; a picture that lies in two splits is kept in the one that is
    measured on; one that lies under two labels is left out.

    Args:
        data: Folder with a folder for each class (perhaps inside train, val, test), or with metadata.jsonl or
            metadata.csv; or such a table itself. Its columns: file_name, label, perhaps split.
        labels: The classes a head knows; None takes those found.

    Raises:
        DataError: For nothing to read, fewer than two classes, an empty class, or one that is not among ``labels``.
    """
    data = Path(data).expanduser()
    rows = list(_rows(data))
    names = sorted({label for _, label, _ in rows}, key=_natural)
    if labels is not None:
        if strange := sorted(set(names) - set(labels)):
            raise DataError(f"{data} has labels the head does not know: {_few(strange)}; it knows {_few(labels)}")
        names = list(labels)
    elif len(names) < 2:
        raise DataError(f"{data} has {len(names)} class{'es' * (not names)} ({_few(names)}); at least 2 are needed")
    number = {name: at for at, name in enumerate(names)}
    pictures: list[Labelled] = []
    unreadable: list[str] = []
    for path, label, split in rows:
        try:
            open_picture(path)
            pictures.append(Labelled(path, number[label], hashlib.sha256(path.read_bytes()).hexdigest(), split))
        except (DataError, OSError):
            unreadable.append(path.name)
    problems = [f"{len(unreadable)} unreadable pictures left out: {_few(unreadable)}"] if unreadable else []
    pictures, more = _without_contradictions(pictures, names)
    found = Dataset(tuple(names), tuple(pictures), tuple(problems + more))
    for line in found.problems:
        logger.warning("%s", line)
    if labels is None:
        have = {picture.label for picture in pictures}
        if empty := [name for at, name in enumerate(names) if at not in have]:
            raise DataError(f"{data}: no readable picture of class {_few(empty)}; add some, or remove the class")
    return found


def split_dataset(found: Dataset, holdout: float, seed: int = 0, few: int | None = None) -> Dataset:
    """The same pictures, each with a split: as given, else ``holdout`` of every class is for validation.

    Which ones is decided by content and seed: equal pictures stay together. Classes of a single picture are trained on.

    Args:
        found: The pictures.
        holdout: Share of every class to validate on, where no validation split is given.
        seed: Draws another split.
        few: Keep only so many pictures of each class to train on.

    Raises:
        DataError: A class has nothing to train on.
    """
    pictures = [replace(picture, split=picture.split or "train") for picture in found.pictures]
    if holdout and not any(picture.split == "val" for picture in pictures):
        chosen: set[str] = set()
        for digests in _by_class(pictures).values():
            count = min(max(1, round(len(digests) * holdout)), len(digests) - 1)
            chosen.update(_shuffled(digests, seed)[:count])
        pictures = [replace(p, split="val") if p.split == "train" and p.digest in chosen else p for p in pictures]
    if few is not None:
        kept = {d for digests in _by_class(pictures).values() for d in _shuffled(digests, seed + 1)[:few]}
        pictures = [p for p in pictures if p.split != "train" or p.digest in kept]
    done = replace(found, pictures=tuple(pictures))
    if empty := [name for name, count in zip(done.labels, done.counts("train"), strict=True) if not count]:
        raise DataError(f"class {_few(empty)} has no picture to train on; add some, or remove the class")
    return done


def fold(found: Dataset, number: int, folds: int, seed: int = 0) -> Dataset:
    """The same pictures, a stratified fold of them for testing; given test pictures stay what they are."""
    if any(picture.split == "test" for picture in found.pictures):
        return found
    chosen: set[str] = set()
    for digests in _by_class([replace(p, split="train") for p in found.pictures]).values():
        chosen.update(_shuffled(digests, seed)[number::folds])
    return replace(found, pictures=tuple(replace(p, split="test") if p.digest in chosen else p for p in found.pictures))


def open_all(pictures: Iterable[Labelled]) -> Iterator[Image.Image]:
    """Each picture, upright and RGB."""
    return (open_picture(picture.path) for picture in pictures)


def picture_files(words: Sequence[str]) -> list[Path]:
    """The picture files that files and folders name.

    Raises:
        DataError: There is no such file, or a folder has no pictures.
    """
    found: list[Path] = []
    for word in words:
        path = Path(word).expanduser()
        inside = sorted(file for file in path.rglob("*") if _is_picture(file)) if path.is_dir() else [path]
        if not inside or not (path.is_dir() or path.is_file()):
            raise DataError(f"{word}: no pictures there; expected files or folders of {', '.join(SUFFIXES)}")
        found += inside
    return found


def _rows(data: Path) -> Iterator[tuple[Path, str, str]]:
    """File, label and split of every picture."""
    table = data if data.is_file() else next((data / name for name in TABLES if (data / name).is_file()), None)
    if table is not None:
        yield from _table_rows(table)
        return
    if not data.is_dir():
        raise DataError(f"{data} is neither a folder nor a table; expected class folders, a .csv or metadata.jsonl")
    folders = sorted((f for f in data.iterdir() if f.is_dir() and not f.name.startswith(".")), key=lambda f: f.name)
    given = [folder for folder in folders if folder.name.lower() in SPLITS]
    if given and len(given) < len(folders):
        other = _few([folder.name for folder in folders if folder not in given])
        raise DataError(
            f"{data} has splits ({_few([f.name for f in given])}) beside other folders ({other}); sort them"
        )
    for split_folder, split in [(f, SPLITS[f.name.lower()]) for f in given] or [(data, "")]:
        for folder in sorted(f for f in split_folder.iterdir() if f.is_dir() and not f.name.startswith(".")):
            files = sorted(file for file in folder.rglob("*") if _is_picture(file))
            if not files and split in ("", "train"):
                raise DataError(f"class {folder.name!r} in {split_folder} has no pictures; add some, or remove it")
            yield from ((file, folder.name, split) for file in files)


def _table_rows(table: Path) -> Iterator[tuple[Path, str, str]]:
    try:
        text = table.read_text(encoding="utf-8-sig")
        lines: list[Any] = (
            list(csv.DictReader(text.splitlines()))
            if table.suffix == ".csv"
            else [json.loads(line) for line in text.splitlines() if line.strip()]
        )
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{table} cannot be read as a table ({error}); expected a .csv or JSON lines") from error
    for at, line in enumerate(lines, 1):
        if not isinstance(line, dict) or line.get("file_name") in (None, "") or line.get("label") in (None, ""):
            raise DataError(
                f'{table} row {at} lacks file_name or label; expected {{"file_name": "a.png", "label": "cat"}}'
            )
        split = str(line.get("split") or "").lower()
        if split and split not in SPLITS:
            raise DataError(f"{table} row {at} has the split {split!r}; expected train, val or test")
        yield table.parent / str(line["file_name"]), str(line["label"]), SPLITS.get(split, "")


def _without_contradictions(pictures: list[Labelled], names: Sequence[str]) -> tuple[list[Labelled], list[str]]:
    """The pictures without equal ones under several labels or splits, and what was found."""
    labels: dict[str, set[int]] = defaultdict(set)
    splits: dict[str, set[str]] = defaultdict(set)
    for picture in pictures:
        labels[picture.digest].add(picture.label)
        splits[picture.digest].add(picture.split)
    problems = []
    torn = [p for p in pictures if len(labels[p.digest]) > 1]
    if torn:
        told = _few([f"{p.path.name} ({names[p.label]})" for p in torn])
        problems.append(f"{len(torn)} equal pictures under different labels left out: {told}")
    order = ("test", "val", "train", "")
    twice = [
        p for p in pictures
        if len(labels[p.digest]) == 1 and p.split != min(splits[p.digest], key=order.index)
    ]  # fmt: skip
    if twice:
        told = _few([p.path.name for p in twice])
        problems.append(f"{len(twice)} pictures that also lie in a split that is measured on left out: {told}")
    left_out = {id(picture) for picture in (*torn, *twice)}
    kept = [picture for picture in pictures if id(picture) not in left_out]
    same = [digest for digest, count in Counter(p.digest for p in kept).items() if count > 1]
    if same:
        told = _few([p.path.name for p in kept if p.digest in same])
        problems.append(f"{len(same)} pictures are there more than once, and stay in one split: {told}")
    return kept, problems


def _by_class(pictures: Iterable[Labelled]) -> dict[int, list[str]]:
    """Different contents to train on, by class, sorted."""
    found: dict[int, set[str]] = defaultdict(set)
    for picture in pictures:
        if picture.split == "train":
            found[picture.label].add(picture.digest)
    return {label: sorted(digests) for label, digests in sorted(found.items())}


def _shuffled(digests: Sequence[str], seed: int) -> list[str]:
    order = np.random.default_rng(seed).permutation(len(digests))
    return [digests[at] for at in order]


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _natural(name: str) -> tuple[int, int, str]:
    """Sorts 2 before 10, and numbers before words."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def _few(words: Sequence[str]) -> str:
    """The first words, and how many more."""
    return ", ".join(map(str, words[:5])) + (f" and {len(words) - 5} more" if len(words) > 5 else "")
