"""Encoding: what the VAE and the text encoder say, in groups of one size, and from disk only what is still true."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import write_pictures
from PIL import Image

from lora_vision.base import Base, load_base
from lora_vision.cache import Cache
from lora_vision.data import load_pixels, read_pictures
from lora_vision.encoding import Encoding, encode, encode_captions
from lora_vision.errors import DataError


@pytest.fixture(scope="module")
def base(sd1_folder: Path) -> Base:
    return load_base(sd1_folder)


def test_encoding_is_the_vaes_and_the_text_encoders(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = read_pictures(write_pictures(tmp_path, 5), holdout=0).train
    monkeypatch.setattr("lora_vision.encoding.PIXELS_AT_ONCE", 2 * 32 * 32)  # batches of two
    (encoded,) = encode(base, pictures, Encoding(resolution=32))
    pixels = torch.stack([load_pixels(picture.path, 32) for picture in pictures])
    posterior = base.vae.encode(pixels).latent_dist
    scaling = base.vae.config.scaling_factor
    torch.testing.assert_close(encoded.mean, posterior.mean * scaling)
    torch.testing.assert_close(encoded.std, posterior.std * scaling)
    assert encoded.text is not None and encoded.time_ids is None and len(encoded) == 5
    torch.testing.assert_close(encoded.text.states, base.encode_text([p.caption for p in pictures]).states)
    assert encode(base, pictures, Encoding(resolution=32, keep_captions=True))[0].text is None


def test_equal_captions_are_encoded_once(base: Base) -> None:
    states = encode_captions(base, ["dot", "fox", "dot"]).states
    assert torch.equal(states[0], states[2]) and not torch.equal(states[0], states[1])


def test_a_picture_with_latents_that_are_no_numbers_is_named(base: Base, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    pictures = read_pictures(write_pictures(tmp_path, 4), holdout=0).train
    real = Base.encode_pictures

    def broken(self: Base, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = real(self, pixels)
        mean[1] = float("nan")
        return mean, std

    monkeypatch.setattr(Base, "encode_pictures", broken)
    with pytest.raises(DataError, match=r"no finite latents of .*01\.png"):
        encode(base, pictures, Encoding(resolution=32))


def test_sdxl_is_told_sizes_and_crops(sdxl_folder: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path, 3)
    Image.new("RGB", (85, 40), "red").save(tmp_path / "03.png")
    pictures = read_pictures(tmp_path, trigger="dots", holdout=0).train
    square, wide = encode(load_base(sdxl_folder), pictures, Encoding(resolution=32))
    assert square.time_ids is not None and wide.time_ids is not None and wide.text is not None
    assert square.time_ids[0].tolist() == [32, 32, 0, 0, 32, 32]
    assert wide.time_ids[0].tolist() == [40, 85, 0, 0, 20, 44] and wide.mean.shape[2:] == (10, 22)
    assert wide.text.states.shape == (1, 16, 32) and wide.text.pooled.shape == (1, 16)  # type: ignore[union-attr]


def test_mirror_images_repeats_and_masks(base: Base, tmp_path: Path) -> None:
    write_pictures(tmp_path, 4)
    Image.new("L", (32, 32), 0).save(tmp_path / "00.mask.png")
    first, second, *_ = read_pictures(tmp_path, holdout=0).train
    pictures = [first, replace(first, flipped=True), replace(second, prior=True), first]
    (encoded,) = encode(base, pictures, Encoding(resolution=32, prior_weight=0.5, plain_of="dot"))
    pixels = load_pixels(first.path, 32)
    mean, _ = base.encode_pictures(torch.stack([pixels, pixels.flip(2)]))
    torch.testing.assert_close(encoded.mean[:2], mean)
    assert torch.equal(encoded.mean[0], encoded.mean[3]) and not torch.equal(encoded.mean[0], encoded.mean[1])
    assert encoded.mask is not None and encoded.mask.mean((1, 2, 3)).tolist() == [0, 0, 1, 0]
    assert encoded.weight is not None and encoded.weight.tolist() == [1, 1, 0.5, 1]
    assert encoded.plain is not None and encoded.plain[0] == ("0", "0", "1", "0")


def made(caplog: pytest.LogCaptureFixture) -> dict[str, int]:
    """How many entries were made anew since the last time this was asked."""
    lines = [record.getMessage() for record in caplog.records if record.getMessage().endswith(" made")]
    caplog.clear()
    return {line.split(":")[0]: int(line.split()[-2]) for line in lines}


def test_stale_entries_are_made_anew_and_no_others(
    base: Base, sd1_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    folder = write_pictures(tmp_path / "pictures", 5)
    cache = Cache(tmp_path / "cache")

    def run(model: Base = base, resolution: int = 32, **changes: bool) -> tuple[torch.Tensor, dict[str, int]]:
        pictures = [replace(picture, **changes) for picture in read_pictures(folder, holdout=0).train]
        found = encode(model, pictures, Encoding(resolution=resolution, cache=cache))
        return torch.cat([each.mean for each in found]), made(caplog)

    first, count = run()
    assert count == {"latents": 5, "captions": 5}
    again, count = run()
    assert torch.equal(again, first) and count == {"latents": 0, "captions": 0}
    Image.new("RGB", (32, 32), "teal").save(folder / "02.png")
    edited, count = run()
    assert count == {"latents": 1, "captions": 0}
    assert [torch.equal(one, other) for one, other in zip(first, edited, strict=True)] == [
        True,
        True,
        False,
        True,
        True,
    ]
    (folder / "03.txt").write_text("another dot")
    assert run()[1] == {"latents": 0, "captions": 1}
    assert run(resolution=16)[1] == {"latents": 5, "captions": 0}
    assert run(flipped=True)[1] == {"latents": 5, "captions": 0}
    other = load_base(sd1_folder)
    other.vae.encoder.conv_in.weight.mul_(1.5)
    changed, count = run(other)
    assert count == {"latents": 5, "captions": 0} and not torch.allclose(changed, edited)
    next(other.parts["text_encoder"].parameters()).mul_(1.5)
    assert run(other)[1] == {"latents": 0, "captions": 5}
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:50])
    again, count = run()
    assert count == {"latents": 5, "captions": 5}
    torch.testing.assert_close(again, edited)  # the edited picture was encoded alone: not the same bits
