"""New words: learnt with an adapter, read by stock pipelines as they were learnt, and no other word is touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from models import write_pictures
from safetensors import safe_open
from torch import Tensor

import lora_vision as lv
from lora_vision.adapter import Adapter
from lora_vision.base import Base
from lora_vision.config import StyleConfig
from lora_vision.errors import AdapterError, DataError
from lora_vision.words import NewWord, teach
from train_scripts.train_style import run


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate remembers the first precision it was given for the whole process."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def learnt(folder: Path) -> tuple[Base, NewWord]:
    """A base and a word whose embeddings training has moved."""
    base = lv.load_base(folder)
    word = NewWord(base.parts, base.tokenizers, "inkish", 2)
    torch.manual_seed(1)
    with torch.no_grad():
        for rows in word.rows.values():
            rows += torch.randn(rows.shape)
    return base, word


def encoded(base: Base, prompt: str) -> list[Tensor]:
    """What a stock pipeline tells the UNet, without guidance."""
    found = base.pipeline().encode_prompt(
        prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return [each for each in found if each is not None]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@torch.no_grad()
def test_what_is_learnt_is_what_a_pipeline_reads(family: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(f"{family}_folder")
    base, word = learnt(folder)
    training = base.encode_text([word.spell("inkish dot")])
    adapter = Adapter({}, word.extras())
    other = lv.load_base(folder)
    before = encoded(other, "a dot")
    assert teach(other.parts, other.tokenizers, [adapter]) == ["inkish"]
    torch.testing.assert_close(encoded(other, "inkish dot")[0], training.states)
    if training.pooled is not None:
        torch.testing.assert_close(encoded(other, "inkish dot")[1], training.pooled)
    assert all(torch.equal(one, two) for one, two in zip(before, encoded(other, "a dot"), strict=True))
    base, _ = learnt(folder)
    assert all(torch.equal(one, two) for one, two in zip(before, encoded(base, "a dot"), strict=True))


@torch.no_grad()
def test_it_is_diffusers_own_textual_inversion(sd1_folder: Path) -> None:
    base, word = learnt(sd1_folder)
    rows = word.extras()["embedding.inkish.text_encoder"]
    other = lv.load_base(sd1_folder)
    other.pipeline().load_textual_inversion({"inkish": rows})
    torch.testing.assert_close(encoded(other, "inkish dot")[0], base.encode_text([word.spell("inkish dot")]).states)


def test_words_that_cannot_be_new_are_refused_and_nothing_is_changed(sd1_folder: Path) -> None:
    base = lv.load_base(sd1_folder)
    rows = torch.zeros(1, 16)
    for word, values, words in (
        ("a", rows, "'a' cannot be a new word"),
        ("Ink", rows, "'Ink' cannot be a new word"),
        ("ink ish", rows, "cannot be a new word"),
        ("inkish", torch.zeros(1, 15), r"\(1, 15\); text_encoder wants \[N, 16\]"),
    ):
        good = {"embedding.fine.text_encoder": rows}
        bad = Adapter({}, good | {f"embedding.{word}.text_encoder": values})
        with pytest.raises(AdapterError, match=words):
            teach(base.parts, base.tokenizers, [bad])
    assert "fine" not in base.tokenizers["text_encoder"].get_vocab()


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_word_is_trained_and_travels_in_the_file(
    family: str, tmp_path: Path, request: pytest.FixtureRequest, lora_vision: Callable[..., Any]
) -> None:
    folder = request.getfixturevalue(f"{family}_folder")
    config = StyleConfig(
        data=str(write_pictures(tmp_path / "dots", 6)), base=str(folder), output=str(tmp_path / "ink.safetensors"),
        steps=3, batch_size=2, rank=2, targets="attention", resolution=32, learning_rate=1e-2, validate_every=0,
        sample_every=3, sample_prompts=("inkish dot",), new_tokens=2, trigger="inkish", tracker="none",
    )  # fmt: skip
    path = run(config)
    with safe_open(path, framework="pt") as file:
        found = {name for name in file.keys() if name.startswith("bundle_emb.")}  # noqa: SIM118
    endings = ("clip_l", "clip_g") if family == "sdxl" else ("string_to_param.*",)
    assert found == {f"bundle_emb.inkish.{ending}" for ending in endings}
    adapter = lv.load_adapter(path)
    start = NewWord((base := lv.load_base(folder)).parts, base.tokenizers, "inkish", 2).extras()
    assert adapter.extras.keys() == start.keys()
    for name, rows in adapter.extras.items():
        assert rows.shape == start[name].shape and not torch.equal(rows, start[name])
    if family == "sd1":
        lv.save_adapter(replace(adapter, extras={}), tmp_path / "mute.safetensors")
        for name in ("ink", "mute"):
            words = ("--base", folder, "--adapter", tmp_path / f"{name}.safetensors", "--steps", 2, "--size", 32)
            assert lora_vision("generate", "inkish dot", *words, "--output", tmp_path / f"{name}.png").code == 0
        assert (tmp_path / "ink.png").read_bytes() != (tmp_path / "mute.png").read_bytes()
        with pytest.raises(DataError, match="give a --trigger"):
            run(replace(config, trigger=None))
    with pytest.raises(ValueError, match="has no place for new tokens"):
        replace(config, format="diffusers")
