"""The report before training names what its owner may want to change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from models import tiny_tokenizer, write_pictures
from PIL import Image

from lora_vision.buckets import by_size
from lora_vision.data import read_pictures
from lora_vision.survey import Survey, survey


def report(folder: Path, *, trigger: str | None = None, resolution: int = 32) -> Survey:
    pictures = read_pictures(folder, trigger=trigger, holdout=0.2)
    groups = by_size((*pictures.train, *pictures.held_out), resolution, 4)
    return survey(pictures, groups, resolution, {"text_encoder": tiny_tokenizer()})


def test_clean_pictures_raise_no_doubt(tmp_path: Path) -> None:
    found = report(write_pictures(tmp_path, 5))
    assert found.doubts == ()
    assert found.facts == (
        "4 pictures to learn from, 1 held out, 32x32 pixels",
        "trained: 5 at 32x32; at most 0% of a picture is cut off at its rim",
    )


def test_doubts_name_the_files(tmp_path: Path) -> None:
    write_pictures(tmp_path, 5)
    Image.open(tmp_path / "01.png").resize((64, 64)).save(tmp_path / "copy.jpg", quality=95, subsampling=0)
    Image.new("RGB", (16, 16), "navy").save(tmp_path / "small.png")
    Image.new("RGB", (60, 40), "olive").save(tmp_path / "wide.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "moving.gif")
    (tmp_path / "wide.txt").write_text("far more letters than this tokenizer reads")
    found = report(tmp_path, trigger="dots")
    assert found.facts[0].endswith("16x16 to 64x64 pixels")
    assert "6 at 32x32" in found.facts[1] and "1 at 36x24" in found.facts[1] and "1 at 16x16" in found.facts[1]
    assert found.doubts == (
        "1 picture is far smaller than 32x32, and trained so without --upscale: small.png",
        "01.png and copy.jpg look alike",
        "2 pictures are without a caption of their own: copy.jpg, small.png",
        "1 picture is captioned with more than 16 tokens, of which the rest is not read: wide.png",
        "1 picture is left out: only .png, .jpg, .jpeg, .webp are read: moving.gif",
    )


def test_repeats_and_mirror_images_are_told_apart_from_pictures(tmp_path: Path) -> None:
    write_pictures(tmp_path / "3_dots", 5, captions=False)
    pictures = read_pictures(tmp_path, holdout=0)
    assert len(pictures.train) == 15 and {picture.caption for picture in pictures.train} == {"dots"}
    train = pictures.train + tuple(replace(picture, flipped=True) for picture in pictures.train)
    groups = by_size(train, 32, 4)
    found = survey(replace(pictures, train=train), groups, 32, {"text_encoder": tiny_tokenizer()})
    assert found.facts[0].startswith("10 pictures to learn from (30 in each pass), 0 held out")
    assert found.doubts == ()
