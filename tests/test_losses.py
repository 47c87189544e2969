"""The diffusion loss: diffusers' own formulas, the weights' papers, and the ends of the schedule."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from diffusers.training_utils import compute_snr
from models import tiny_scheduler, tiny_unet
from torch import Tensor, nn

from lora_vision.base import TextStates
from lora_vision.batches import StyleBatch
from lora_vision.config import ObjectiveConfig
from lora_vision.errors import BaseModelError
from lora_vision.losses import DiffusionLoss, NoiseSchedule

STEPS = torch.tensor([0, 1, 250, 500, 999])


def draws(seed: int = 0) -> tuple[Tensor, Tensor]:
    latents, noise = torch.randn(2, 5, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    return latents, noise


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_mix_and_target_are_those_of_diffusers(prediction: str, zero_snr: bool) -> None:
    scheduler = tiny_scheduler(prediction, zero_snr=zero_snr)
    oracle = DDPMScheduler.from_config(scheduler.config)
    schedule = NoiseSchedule(scheduler)
    latents, noise = draws()
    assert len(schedule) == 1000
    torch.testing.assert_close(schedule.mix(latents, noise, STEPS), oracle.add_noise(latents, noise, STEPS))
    target = noise if prediction == "epsilon" else oracle.get_velocity(latents, noise, STEPS)
    torch.testing.assert_close(schedule.target(latents, noise, STEPS), target)


def test_any_kind_of_scheduler_gives_the_same_levels() -> None:
    scheduler = tiny_scheduler()
    other = NoiseSchedule(EulerDiscreteScheduler.from_config(scheduler.config))
    torch.testing.assert_close(other.signal, NoiseSchedule(scheduler).signal)


def test_weights_are_min_snr() -> None:
    snr = compute_snr(DDPMScheduler.from_config(tiny_scheduler().config), STEPS)
    weights = NoiseSchedule(tiny_scheduler("epsilon")).weights(STEPS, ObjectiveConfig())
    torch.testing.assert_close(weights, snr.clamp(max=5) / snr, rtol=1e-4, atol=1e-6)
    weights = NoiseSchedule(tiny_scheduler("v_prediction")).weights(STEPS, ObjectiveConfig())
    torch.testing.assert_close(weights, (snr + 1).clamp(max=5) / (snr + 1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_zero_terminal_snr_is_trained_with_a_full_weight(prediction: str) -> None:
    schedule = NoiseSchedule(tiny_scheduler(prediction, zero_snr=True))
    assert schedule.signal[-1] == 0
    assert schedule.weights(torch.tensor([999]), ObjectiveConfig()).item() == 1
    weights = schedule.weights(torch.arange(1000), ObjectiveConfig())
    assert weights.isfinite().all() and (weights > 0).all() and (weights <= 1).all()
    for how in (ObjectiveConfig(weighting="debiased"), ObjectiveConfig(huber="snr")):
        values = schedule.weights(torch.arange(1000), how), schedule.thresholds(torch.arange(1000), how)
        assert all(value.isfinite().all() and (value > 0).all() for value in values)
    if prediction == "v_prediction":  # pure noise in, minus the clean latents asked for
        latents, noise = draws()
        torch.testing.assert_close(schedule.target(latents, noise, torch.full((5,), 999)), -latents)


def test_debiased_weights_are_those_of_the_paper_and_of_kohya() -> None:
    snr = compute_snr(DDPMScheduler.from_config(tiny_scheduler().config), STEPS).clamp(max=1000)
    how = ObjectiveConfig(weighting="debiased")
    weights = NoiseSchedule(tiny_scheduler("epsilon")).weights(STEPS, how)
    torch.testing.assert_close(weights, 1 / snr.sqrt(), rtol=1e-4, atol=1e-6)
    weights = NoiseSchedule(tiny_scheduler("v_prediction")).weights(STEPS, how)
    torch.testing.assert_close(weights, 1 / (snr + 1), rtol=1e-4, atol=1e-6)
    assert (NoiseSchedule(tiny_scheduler()).weights(STEPS, ObjectiveConfig(weighting="none")) == 1).all()


def test_huber_thresholds_are_those_of_kohyas_schedules() -> None:
    schedule = NoiseSchedule(tiny_scheduler())
    kept = DDPMScheduler.from_config(tiny_scheduler().config).alphas_cumprod[STEPS].double()
    sigmas = ((1 - kept) / kept) ** 0.5
    wanted = {
        "constant": torch.full((5,), 0.1),
        "exponential": torch.exp(STEPS / 1000 * math.log(0.1)),
        "snr": ((1 - 0.1) / (1 + sigmas) ** 2 + 0.1).float(),
    }
    for name, values in wanted.items():
        torch.testing.assert_close(schedule.thresholds(STEPS, ObjectiveConfig(huber=name)), values, rtol=1e-4, atol=0)


class Answer(nn.Module):
    """A UNet that answers what it is told to."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, *_: object, **__: object) -> tuple[Tensor]:
        return (self.answer,)


def test_the_loss_is_the_weighted_mean_square() -> None:
    latents, noise = draws()
    schedule = NoiseSchedule(tiny_scheduler("v_prediction"))
    target = schedule.target(latents, noise, STEPS)
    batch = StyleBatch(latents, noise, STEPS, TextStates(torch.zeros(5, 3, 16)))
    assert DiffusionLoss(Answer(target), schedule)(batch) == 0
    off = target + torch.arange(1.0, 6).view(-1, 1, 1, 1)
    squares = torch.arange(1.0, 6) ** 2
    plain = ObjectiveConfig(weighting="none")
    torch.testing.assert_close(DiffusionLoss(Answer(off), schedule, objective=plain)(batch), squares.mean())
    weighted = (squares * schedule.weights(STEPS, ObjectiveConfig())).mean()
    torch.testing.assert_close(DiffusionLoss(Answer(off), schedule)(batch), weighted)
    assert DiffusionLoss(Answer(off.half()), schedule)(batch).dtype == torch.float32


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_huber_is_the_square_for_small_errors_and_linear_for_large(prediction: str) -> None:
    latents, noise = draws()
    schedule = NoiseSchedule(tiny_scheduler(prediction))
    target = schedule.target(latents, noise, STEPS)
    batch = StyleBatch(latents, noise, STEPS, TextStates(torch.zeros(5, 3, 16)))
    how = ObjectiveConfig(weighting="none", huber="exponential", huber_c=0.2)
    c = torch.exp(STEPS / 1000 * math.log(0.2))
    for error, wanted in (
        (0.5, 2 * c * ((0.25 + c**2).sqrt() - c)),  # kohya's "huber"
        (1e-2, torch.full((5,), 1e-4)),
        (1e4, 2 * c * 1e4),
    ):
        found = DiffusionLoss(Answer(target + error), schedule, objective=how)(batch)
        torch.testing.assert_close(found, wanted.mean(), rtol=3e-3, atol=1e-7)


def test_perturbed_input_is_not_asked_for() -> None:
    latents, noise = draws()
    schedule, seen = NoiseSchedule(tiny_scheduler()), list[Tensor]()

    class Watch(Answer):
        def forward(self, *words: Any, **options: Any) -> tuple[Tensor]:
            seen.append(words[0])
            return super().forward()

    batch = StyleBatch(latents, noise, STEPS, TextStates(torch.zeros(5, 3, 16)), perturbed=noise + 1)
    assert DiffusionLoss(Watch(noise), schedule)(batch) == 0
    torch.testing.assert_close(seen[0], schedule.mix(latents, noise + 1, STEPS))


def test_captions_are_encoded_where_the_encoder_is_trained() -> None:
    torch.manual_seed(0)
    latents, noise = draws()
    unet, schedule = tiny_unet().eval(), NoiseSchedule(tiny_scheduler())
    states = torch.randn(5, 3, 16)
    cached = StyleBatch(latents, noise, STEPS, TextStates(states))
    live = StyleBatch(latents, noise, STEPS, tuple("abcde"))
    loss = DiffusionLoss(unet, schedule, encode_text=lambda captions: TextStates(states[: len(captions)]))
    assert loss(cached) == loss(live)
    with pytest.raises(ValueError, match="encode_text"):
        DiffusionLoss(unet, schedule)(live)


def test_other_predictions_are_refused() -> None:
    with pytest.raises(BaseModelError, match="'sample'; expected epsilon or v_prediction"):
        NoiseSchedule(tiny_scheduler("sample"))
