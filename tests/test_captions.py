"""Captions that change from sample to sample keep their trigger, their head and their tags."""

from __future__ import annotations

import pytest
import torch

from lora_vision.captions import Wording, without
from lora_vision.config import StyleConfig

CAPTION = "ink, fox, snow, night, moon"


def told(wording: Wording, count: int = 200, caption: str = CAPTION) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    return [wording(caption, generator) for _ in range(count)]


def test_shuffled_tags_are_the_same_tags() -> None:
    captions = told(Wording(shuffle=True, keep=1, trigger="ink"))
    assert {tuple(sorted(caption.split(", "))) for caption in captions} == {tuple(sorted(CAPTION.split(", ")))}
    assert all(caption.startswith("ink, fox, ") for caption in captions) and len(set(captions)) == 6


def test_tags_and_captions_are_dropped_at_their_rate() -> None:
    captions = told(Wording(drop=0.25, trigger="ink"), 400)
    assert all(caption.startswith("ink") for caption in captions)
    kept = sum(len(caption.split(", ")) - 1 for caption in captions) / (4 * 400)
    assert abs(kept - 0.75) < 0.04
    assert all(caption.split(", ") == sorted(caption.split(", "), key=CAPTION.index) for caption in captions)
    silent = sum(caption == "" for caption in told(Wording(silence=0.1), 1000))
    assert 70 < silent < 130


def test_without_a_wish_captions_stay() -> None:
    config = StyleConfig(data="d", output="o.safetensors")
    assert Wording.of(config, "ink") is None
    config = StyleConfig(data="d", output="o.safetensors", shuffle_tags=True)
    assert Wording.of(config, "ink") == Wording(shuffle=True, trigger="ink")


@pytest.mark.parametrize(
    ("caption", "wanted"),
    [
        ("ink, a fox", "a fox"),
        ("a fox, Ink", "a fox"),
        ("ink", ""),
        ("a fox", "a fox"),
        ("a fox in ink style", "a fox in style"),
    ],
)
def test_a_caption_without_its_trigger(caption: str, wanted: str) -> None:
    assert " ".join(without(caption, "ink").split()) == wanted
    assert without(caption, None) == caption
