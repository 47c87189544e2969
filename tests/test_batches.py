"""Batches: cut anywhere they are the same samples, and validation never changes."""

from __future__ import annotations

from collections import Counter

import torch

from lora_vision.base import TextStates
from lora_vision.batches import StyleBatch, StyleBatches
from lora_vision.captions import Wording
from lora_vision.encoding import EncodedPictures


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


def test_noise_offset_and_input_perturbation_are_in_training_only() -> None:
    """Noise offset: one more number for each channel. Input perturbation: more noise, in the input only."""
    plain, offset, shaken = (
        StyleBatches(cached(), 1000, seed=0, **options)
        for options in ({}, {"noise_offset": 0.5}, {"noise_offset": 0.5, "input_perturbation": 0.2})
    )
    before, after, more = (batches(0, 400) for batches in (plain, offset, shaken))
    added = after.noise - before.noise
    assert torch.allclose(added, added.mean((2, 3), keepdim=True), atol=1e-5)
    assert 0.4 < added[:, :, 0, 0].std() < 0.6 and not torch.allclose(added[:, 0], added[:, 1])
    assert before.perturbed is None and torch.equal(more.noise, after.noise) and more.perturbed is not None
    assert 0.19 < (more.perturbed - more.noise).std() < 0.21
    assert torch.equal(more.latents, before.latents) and torch.equal(more.timesteps, before.timesteps)
    for one, other in zip(plain.fixed(3), shaken.fixed(3), strict=True):
        assert torch.equal(one.noise, other.noise) and other.perturbed is None


def test_two_processes_share_an_odd_number_of_pictures() -> None:
    """Process p of two takes every second batch: together each picture once in a pass, none twice, no one waits."""
    batches = StyleBatches(cached(7), 1000, seed=0)
    seen = [sum((shown(batches(turn * 2, 2)) for turn in range(process, 14, 2)), []) for process in (0, 1)]
    assert Counter(seen[0] + seen[1]) == dict.fromkeys(range(7), 4)
    assert len(seen[0]) == len(seen[1]) == 14


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


def sized(*counts: int) -> list[EncodedPictures]:
    """Groups of pictures of different sizes; the latents are all the picture's own number."""
    groups, first = [], 0
    for height, count in enumerate(counts, 2):
        number = torch.arange(float(first), first + count).view(-1, 1, 1, 1)
        mean, text = number.expand(count, 2, height, 4), TextStates(number.view(-1, 1, 1).expand(count, 3, 8))
        groups.append(EncodedPictures(mean, torch.zeros_like(mean), ("",) * count, text, None))
        first += count
    return groups


def test_pictures_of_several_sizes_are_shown_equally_often() -> None:
    batches = StyleBatches(sized(11, 5, 2), 1000, seed=0)
    seen: Counter[int] = Counter()
    for number in range(270):
        batch = batches(number * 4, 4)
        assert batch.text.states[:, 0, 0].tolist() == shown(batch)  # type: ignore[union-attr]
        seen.update(shown(batch))
    assert sorted(seen) == list(range(18)) and min(seen.values()) >= 54 and max(seen.values()) <= 66
    again = StyleBatches(sized(11, 5, 2), 1000, seed=0)
    assert torch.equal(again(100, 4).noise, batches(100, 4).noise), "cut anywhere it is the same"
    levels = torch.cat([batches(n * 4, 4).timesteps for n in range(270) if len(batches(n * 4, 4).latents[0, 0]) == 4])
    assert torch.histc(levels.float(), 5, 0, 1000).min() > 0.1 * len(levels), "every size sees every noise level"


def test_validation_covers_every_size() -> None:
    fixed = StyleBatches(sized(3, 2), 1000, seed=0).fixed(5)
    assert [len(batch) for batch in fixed] == [5, 5, 2, 5, 3]
    levels = sorted(torch.cat([batch.timesteps for batch in fixed]).tolist())
    assert levels == [int((row + 0.5) / 20 * 1000) for row in range(20)]


def test_wordings_depend_on_the_sample_alone() -> None:
    pictures = EncodedPictures(torch.zeros(3, 1, 2, 2), torch.zeros(3, 1, 2, 2), ("ink, a, b, c, d",) * 3, None, None)
    batches = StyleBatches(pictures, 1000, seed=0, wording=Wording(shuffle=True, trigger="ink"))
    whole = batches(0, 9).text
    assert whole == batches(0, 4).text + batches(4, 5).text and len(set(whole)) > 4
    assert all(caption.startswith("ink, ") and len(caption) == len("ink, a, b, c, d") for caption in whole)
    assert batches.fixed(4)[0].text[0] == "ink, a, b, c, d", "validation keeps captions as they are"


def test_masks_weights_and_plain_captions_travel_with_their_pictures() -> None:
    number = torch.arange(4.0).view(-1, 1, 1, 1)
    mean = number.expand(4, 2, 3, 3)
    plain = tuple(f"p{index}" for index in range(4))
    pictures = EncodedPictures(
        mean, torch.zeros_like(mean), ("",) * 4, None, None, number.expand(4, 1, 3, 3), number.flatten(), (plain, None)
    )
    batch = StyleBatches(pictures, 1000, seed=0)(0, 7)
    assert batch.mask is not None and batch.mask[:, 0, 0, 0].tolist() == shown(batch)
    assert batch.weight is not None and batch.weight.tolist() == shown(batch)
    assert batch.prior == tuple(f"p{number}" for number in shown(batch))
