"""Sizes to train at: the picture's own shape, never more area than asked for, nothing enlarged unasked."""

from __future__ import annotations

import pytest

from lora_vision.buckets import fitting


def test_a_square_is_the_square_asked_for() -> None:
    for side in (512, 600, 4000):
        assert fitting((side, side), 512, 64) == (512, 512)
    assert fitting((600, 600), 520, 64) == (520, 520), "also where it is no multiple of the step"


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((1000, 1500), (384, 576)), ((1500, 1000), (576, 384)), ((1080, 1920), (320, 576)), ((600, 6000), (128, 1280))],
)
def test_shapes_are_kept(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    assert fitting(size, 512, 64) == wanted


@pytest.mark.parametrize("step", [16, 32, 64])
def test_little_is_cut_off_and_the_area_is_used(step: int) -> None:
    for height in range(300, 2000, 97):
        for width in range(300, 2000, 131):
            rows, columns = fitting((height, width), 512, step)
            assert rows % step == columns % step == 0 or rows == columns == 512
            area = min(512**2, height * width)
            assert 0.55 * area <= rows * columns <= area, (height, width)
            ratio = width / height * rows / columns
            assert min(ratio, 1 / ratio) > 0.86, (height, width)
            assert rows <= height and columns <= width, "nothing is enlarged"


def test_small_pictures_stay_small_unless_asked() -> None:
    assert fitting((200, 200), 512, 64) == (192, 192)
    assert fitting((200, 200), 512, 64, upscale=True) == (512, 512)
    assert fitting((100, 150), 512, 64, upscale=True) == (384, 576)
    assert fitting((30, 30), 512, 64) == (64, 64), "save for those below one step"
