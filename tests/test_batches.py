"""Batches: cut anywhere they are the same samples, and validation never changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import write_pictures

from lora_vision.base import Base, TextStates, load_base
from lora_vision.batches import EncodedPictures, StyleBatch, StyleBatches, encode, encode_captions
from lora_vision.data import load_pixels, read_pictures
from lora_vision.errors import DataError


@pytest.fixture(scope="module")
def base(sd1_folder: Path) -> Base:
    return load_base(sd1_folder)


def cached(count: int = 5, *, captions: bool = False) -> EncodedPictures:
    """Pictures whose latents and text are all their own number."""
    number = torch.arange(float(count)).view(-1, 1, 1, 1)
    mean = number.expand(count, 2, 4, 4)
    text = None if captions else TextStates(number.view(-1, 1, 1).expand(count, 3, 8))
    return EncodedPictures(mean, torch.zeros_like(mean), tuple(f"c{i}" for i in range(count)), text, None)


def shown(batch: StyleBatch) -> list[int]:
    return [int(value) for value in batch.latents[:, 0, 0, 0]]


def test_every_pass_shows_every_picture_once_in_its_own_order() -> None:
    batches = StyleBatches(cached(7), 1000, seed=3)
    passes = [shown(batches(7 * number, 7)) for number in range(4)]
    assert all(sorted(each) == list(range(7)) for each in passes)
    assert len({tuple(each) for each in passes}) == 4
    assert shown(StyleBatches(cached(7), 1000, seed=4)(0, 28)) != sum(passes, [])


def test_batches_are_the_same_however_the_stream_is_cut() -> None:
    batches = StyleBatches(cached(), 1000, seed=0)
    whole = batches(0, 12)
    parts = [StyleBatches(cached(), 1000, seed=0)(start, count) for start, count in ((0, 1), (1, 4), (5, 7))]
    for name in ("latents", "noise", "timesteps"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))
    assert isinstance(whole.text, TextStates)
    assert [int(row) for row in whole.text.states[:, 0, 0]] == shown(whole)


def test_captions_travel_with_their_pictures() -> None:
    batch = StyleBatches(cached(captions=True), 1000, seed=0)(3, 6)
    assert batch.text == tuple(f"c{number}" for number in shown(batch))


def test_timesteps_are_spread_evenly() -> None:
    levels = StyleBatches(cached(), 1000, seed=0)(0, 400).timesteps
    assert levels.min() >= 0 and levels.max() <= 999
    counts = torch.histc(levels.float(), 10, 0, 1000)
    assert counts.min() >= 38 and counts.max() <= 42
    counts = torch.histc(levels[100:120].float(), 4, 0, 1000)
    assert counts.min() >= 4


def test_latents_are_drawn_from_the_posterior() -> None:
    mean = torch.zeros(4, 2, 16, 16)
    pictures = EncodedPictures(mean, torch.full_like(mean, 3.0), ("",) * 4, TextStates(torch.zeros(4, 1, 1)), None)
    batch = StyleBatches(pictures, 1000, seed=0)(0, 16)
    assert abs(batch.latents.std().item() - 3) < 0.1 and abs(batch.noise.std().item() - 1) < 0.03
    assert abs((batch.latents * batch.noise).mean().item()) < 0.1


def test_validation_is_always_the_same_and_covers_all_levels() -> None:
    batches = StyleBatches(cached(3), 1000, seed=0)
    first = batches.fixed(5)
    batches(0, 9)
    again = StyleBatches(cached(3), 1000, seed=0).fixed(5)
    assert [len(batch.timesteps) for batch in first] == [5, 5, 2]
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.noise, other.noise) and torch.equal(one.timesteps, other.timesteps)
    rows = sorted(zip(sum(map(shown, first), []), torch.cat([b.timesteps for b in first]).tolist(), strict=True))
    assert [number for number, _ in rows] == [number for number in range(3) for _ in range(4)]
    assert len({level for _, level in rows}) == 12
    assert len(StyleBatches(cached(50), 1000, seed=0).fixed(8)) == 16


def test_encoding_is_the_vaes_and_the_text_encoders(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = read_pictures(write_pictures(tmp_path, 5), holdout=0).train
    monkeypatch.setattr("lora_vision.batches.PIXELS_AT_ONCE", 2 * 32 * 32)  # batches of two
    encoded = encode(base, pictures, 32)
    pixels = torch.stack([load_pixels(picture.path, 32) for picture in pictures])
    posterior = base.vae.encode(pixels).latent_dist
    scaling = base.vae.config.scaling_factor
    torch.testing.assert_close(encoded.mean, posterior.mean * scaling)
    torch.testing.assert_close(encoded.std, posterior.std * scaling)
    assert encoded.text is not None and encoded.time_ids is None and len(encoded) == 5
    torch.testing.assert_close(encoded.text.states, base.encode_text([p.caption for p in pictures]).states)
    assert encode(base, pictures, 32, keep_captions=True).text is None


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
        encode(base, pictures, 32)


def test_sdxl_is_told_sizes_and_crops(sdxl_folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    write_pictures(tmp_path, 3)
    Image.new("RGB", (80, 40), "red").save(tmp_path / "03.png")
    pictures = read_pictures(tmp_path, trigger="dots", holdout=0).train
    encoded = encode(load_base(sdxl_folder), pictures, 32)
    assert encoded.time_ids is not None and encoded.text is not None and encoded.text.pooled is not None
    assert encoded.time_ids[0].tolist() == [32, 32, 0, 0, 32, 32]
    assert encoded.time_ids[3].tolist() == [40, 80, 0, 16, 32, 32]
    assert encoded.text.states.shape == (4, 16, 32) and encoded.text.pooled.shape == (4, 16)
