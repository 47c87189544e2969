"""A folder of pictures: every kind of file becomes upright RGB, captions find their picture, bad ones are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from models import write_pictures
from PIL import Image

from lora_vision.data import crop_offset, load_pixels, read_pictures
from lora_vision.errors import DataError

RED, GRAY = (200, 40, 20), 128


def seen(path: Path) -> list[int]:
    """The one colour of a plain picture, as training sees it (0-255)."""
    pixels = (load_pixels(path, 8) + 1) * 127.5
    assert pixels.shape == (3, 8, 8)
    assert (pixels - pixels[:, :1, :1]).abs().max() < 4
    return [round(value) for value in pixels.mean((1, 2)).tolist()]


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_plain_pictures_keep_their_colour(tmp_path: Path, suffix: str) -> None:
    Image.new("RGB", (10, 20), RED).save(tmp_path / f"a.{suffix}", quality=100)
    assert np.allclose(seen(tmp_path / f"a.{suffix}"), RED, atol=6)


@pytest.mark.parametrize(
    ("picture", "colour"),
    [
        (Image.new("L", (9, 9), GRAY), [GRAY] * 3),
        (Image.new("1", (9, 9), 1), [255] * 3),
        (Image.new("LA", (9, 9), (0, 0)), [255] * 3),
        (Image.new("RGBA", (9, 9), (*RED, 0)), [255] * 3),
        (Image.new("RGBA", (9, 9), (0, 0, 0, 51)), [204] * 3),
        (Image.new("RGB", (9, 9), RED).quantize(4), list(RED)),
        (Image.fromarray(np.full((9, 9), 32896, np.uint16)), [128] * 3),
        (Image.fromarray(np.full((9, 9), 65535, np.uint16)), [255] * 3),
    ],
    ids=["grayscale", "bilevel", "gray-alpha", "transparent", "translucent", "palette", "16-bit", "16-bit-white"],
)
def test_every_mode_becomes_rgb_on_white(tmp_path: Path, picture: Image.Image, colour: list[int]) -> None:
    picture.save(tmp_path / "a.png")
    assert np.allclose(seen(tmp_path / "a.png"), colour, atol=1)


def test_a_transparent_palette_lies_on_white(tmp_path: Path) -> None:
    picture = Image.new("RGB", (9, 9), RED).quantize(4)
    picture.save(tmp_path / "a.png", transparency=picture.getpixel((0, 0)))
    assert seen(tmp_path / "a.png") == [255] * 3


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (9, 9), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    red, green, blue = seen(tmp_path / "a.jpg")
    assert red > 200 and green < 60 and blue < 60


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    picture = Image.new("RGB", (16, 16), "black")
    picture.paste("white", (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter turn clockwise
    picture.save(tmp_path / "a.jpg", exif=exif, quality=100)
    pixels = load_pixels(tmp_path / "a.jpg", 16)
    assert pixels[:, :, 10:].mean() > 0.9 and pixels[:, :, :6].mean() < -0.9


def test_the_middle_is_kept_and_nothing_is_squeezed(tmp_path: Path) -> None:
    picture = Image.new("RGB", (30, 10), "black")
    picture.paste("white", (10, 0, 20, 10))
    picture.save(tmp_path / "a.png")
    assert load_pixels(tmp_path / "a.png", 10).min() > 0.9
    assert crop_offset((10, 30), 10) == (0, 10)
    assert crop_offset((40, 20), 10) == (5, 0)


def test_captions_come_from_text_files_then_metadata(tmp_path: Path) -> None:
    write_pictures(tmp_path, 4)
    (tmp_path / "02.txt").write_text("  a red\ncircle ", encoding="utf-8")
    pictures = read_pictures(tmp_path, holdout=0)
    assert [picture.caption for picture in pictures.train] == ["dot 0", "dot 1", "a red circle", "dot 3"]
    assert pictures.trigger is None and pictures.held_out == ()


def test_the_trigger_goes_before_captions_and_stands_for_missing_ones(tmp_path: Path) -> None:
    write_pictures(tmp_path, 4, captions=False)
    (tmp_path / "00.txt").write_text("a fox")
    (tmp_path / "01.txt").write_text("Ink Style drawing of a cat")
    captions = [picture.caption for picture in read_pictures(tmp_path, trigger="ink style", holdout=0).train]
    assert captions == ["ink style, a fox", "Ink Style drawing of a cat", "ink style", "ink style"]


def test_without_captions_the_folder_names_the_style(tmp_path: Path) -> None:
    pictures = read_pictures(write_pictures(tmp_path / "soft_ink-wash", 4, captions=False))
    assert pictures.trigger == "soft ink wash"
    assert {picture.caption for picture in pictures.train} == {"soft ink wash"}


def test_pictures_are_held_out_by_content(tmp_path: Path) -> None:
    pictures = read_pictures(write_pictures(tmp_path / "a", 12), holdout=0.25)
    assert (len(pictures.train), len(pictures.held_out)) == (9, 3)
    assert not {p.digest for p in pictures.train} & {p.digest for p in pictures.held_out}
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "00.png").rename(tmp_path / "b" / "zz.png")
    rows = (tmp_path / "b" / "metadata.jsonl").read_text().replace("00.png", "zz.png")
    (tmp_path / "b" / "metadata.jsonl").write_text(rows)
    renamed = read_pictures(tmp_path / "b", holdout=0.25)
    assert {p.digest for p in renamed.held_out} == {p.digest for p in pictures.held_out}
    assert renamed.fingerprint == pictures.fingerprint


def test_the_fingerprint_sees_a_pixel_and_a_word(tmp_path: Path) -> None:
    before = read_pictures(write_pictures(tmp_path, 5)).fingerprint
    assert read_pictures(tmp_path).fingerprint == before
    (tmp_path / "03.txt").write_text("dot 3!")
    word = read_pictures(tmp_path).fingerprint
    with Image.open(tmp_path / "01.png") as picture:
        changed = picture.copy()
    changed.putpixel((0, 0), (1, 2, 3))
    changed.save(tmp_path / "01.png")
    assert len({before, word, read_pictures(tmp_path).fingerprint}) == 3


def test_equal_pictures_are_noted_and_stay_on_one_side(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_pictures(tmp_path, 5)
    for number in range(5):
        shutil.copy(tmp_path / f"{number:02}.png", tmp_path / f"copy{number}.png")
    pictures = read_pictures(tmp_path, trigger="dots", holdout=0.4)
    assert len(pictures.duplicates) == 5 and "the same picture 2 times: 00.png, copy0.png" in caplog.text
    assert not {p.digest for p in pictures.train} & {p.digest for p in pictures.held_out}
    assert len(pictures.held_out) == 4


def refusal(folder: Path, **options: float) -> str:
    with pytest.raises(DataError) as caught:
        read_pictures(folder, **options)  # type: ignore[arg-type]
    return str(caught.value)


def test_folders_without_enough_pictures_are_refused(tmp_path: Path) -> None:
    assert "is not a folder" in refusal(tmp_path / "absent")
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    (tmp_path / "empty" / "notes.doc").write_text("x")
    assert "has no pictures" in refusal(tmp_path / "empty") and "inner" in refusal(tmp_path / "empty")
    assert "has 3 different pictures; expected at least 4" in refusal(write_pictures(tmp_path / "few", 3))
    same = write_pictures(tmp_path / "same", 1)
    for number in range(5):
        shutil.copy(same / "00.png", same / f"{number}.png")
    (same / "metadata.jsonl").unlink()
    assert "has 1 different pictures" in refusal(same)
    assert "held-out share of 1.5" in refusal(write_pictures(tmp_path / "many", 8), holdout=1.5)


def test_unreadable_pictures_are_named(tmp_path: Path) -> None:
    write_pictures(tmp_path, 5)
    whole = (tmp_path / "02.png").read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"not a picture"):
        (tmp_path / "02.png").write_bytes(broken)
        assert "02.png cannot be read as a picture" in refusal(tmp_path)


def test_captions_that_fit_nothing_are_refused(tmp_path: Path) -> None:
    write_pictures(tmp_path, 5)
    rows = (tmp_path / "metadata.jsonl").read_text().splitlines()
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows[:3]))
    assert "2 of 5 pictures in" in refusal(tmp_path) and "03.png, 04.png" in refusal(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("\n".join([*rows, json.dumps({"file_name": "no.png", "text": "x"})]))
    assert "line 6 names 'no.png'" in refusal(tmp_path)
    (tmp_path / "metadata.jsonl").write_text(rows[0] + '\n{"file_name": "01.png"}\n')
    assert "line 2 is not understood" in refusal(tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff\xfe\x00")
    assert "expected text in UTF-8" in refusal(tmp_path)


def test_pixels_span_minus_one_to_one(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 4), "black")
    picture.paste("white", (0, 0, 4, 2))
    picture.save(tmp_path / "a.png")
    pixels = load_pixels(tmp_path / "a.png", 4)
    assert pixels.dtype == torch.float32 and pixels.max() == 1 and pixels.min() == -1
