"""The diffusion loss: a batch in, a scalar out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from lora_vision.base import TextStates
from lora_vision.batches import StyleBatch
from lora_vision.config import ObjectiveConfig
from lora_vision.errors import BaseModelError


class NoiseSchedule(nn.Module):
    """How signal and noise are mixed at each timestep, and what the UNet is asked for."""

    signal: Tensor
    noise: Tensor

    def __init__(self, scheduler: Any) -> None:
        """The noise levels and the prediction type of a diffusers scheduler of any kind."""
        super().__init__()
        plain: Any = DDPMScheduler
        levels = plain.from_config(scheduler.config)
        self.prediction = str(levels.config.prediction_type)
        if self.prediction not in ("epsilon", "v_prediction"):
            raise BaseModelError(f"found the prediction type {self.prediction!r}; expected epsilon or v_prediction")
        kept = levels.alphas_cumprod.double()
        self.register_buffer("signal", kept.sqrt().float(), persistent=False)
        self.register_buffer("noise", (1 - kept).sqrt().float(), persistent=False)

    def __len__(self) -> int:
        """The number of timesteps."""
        return len(self.signal)

    def mix(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents [B, C, h, w] with the noise of their timesteps in them."""
        return _rows(self.signal, timesteps) * latents + _rows(self.noise, timesteps) * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The right answer to the mix [B, C, h, w]: the noise, or the velocity (Salimans and Ho 2022, app. D)."""
        if self.prediction == "epsilon":
            return noise
        return _rows(self.signal, timesteps) * noise - _rows(self.noise, timesteps) * latents

    def weights(self, timesteps: Tensor, how: ObjectiveConfig) -> Tensor:
        """What the squared errors at these timesteps [B] count: [B], above 0.

        min-snr (Hang et al. 2023, arXiv 2303.09556, sec. 3.4), in (0, 1]: min(SNR, gamma) / SNR for epsilon; for the
        velocity the same with SNR + 1 in place of SNR, as diffusers does. The paper's min(SNR, gamma) / (SNR + 1) is 0
        at a zero terminal SNR: the step where sampling starts would never be trained.

        debiased: 1 / sqrt(SNR) for epsilon (Yu et al. 2023, arXiv 2310.08442), 1 / (SNR + 1) for the velocity, as kohya
        has it; SNR within 0.001 and 1000.
        """
        snr = (self.signal[timesteps].double() / self.noise[timesteps].double()) ** 2
        velocity = self.prediction == "v_prediction"
        if how.weighting == "debiased":
            snr = snr.clamp(1e-3, 1e3)
            return (1 / (snr + 1) if velocity else snr.rsqrt()).float()
        if how.weighting == "none":
            return torch.ones_like(snr, dtype=torch.float32)
        return (how.snr_gamma / (snr + 1 if velocity else snr)).clamp(max=1).float()

    def thresholds(self, timesteps: Tensor, how: ObjectiveConfig) -> Tensor:
        """Beyond which error the pseudo-Huber loss is linear at these timesteps [B]: [B].

        Khrapov et al. 2024 (arXiv 2403.16728, sec. 4) with c = how.huber_c at full noise: exponential c^(t / T); snr
        c + (1 - c) / (1 + noise / signal)^2, kohya's schedule of that name.
        """
        c = how.huber_c
        if how.huber == "exponential":
            return torch.as_tensor(c, device=timesteps.device) ** (timesteps / len(self))
        if how.huber == "snr":
            return c + (1 - c) / (1 + self.noise[timesteps] / self.signal[timesteps]) ** 2
        return torch.full_like(self.noise[timesteps], c)


class DiffusionLoss(nn.Module):
    """Weighted error of the UNet's prediction."""

    def __init__(
        self,
        unet: nn.Module,
        schedule: NoiseSchedule,
        *,
        objective: ObjectiveConfig = ObjectiveConfig(),  # noqa: B008  (frozen)
        encode_text: Callable[[tuple[str, ...]], TextStates] | None = None,
        encoders: nn.Module | None = None,
        prior_weight: float = 1.0,
        silenced: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """The loss of this UNet.

        Args:
            unet: Takes noisy latents, timesteps and text states.
            schedule: The base's noise schedule.
            objective: How errors weigh.
            encode_text: Makes text states of captions; needed where batches hold captions.
            encoders: The trained text encoders, held here so that a wrapper of this loss sees their weights.
            prior_weight: What keeping the base's answers counts, in batches that ask for it.
            silenced: A context in which the model is the base.
        """
        super().__init__()
        self.unet = unet
        self.schedule = schedule
        self.objective = objective
        self.encoders = encoders
        self.prior_weight = prior_weight
        self._encode_text = encode_text
        self._silenced = silenced

    def forward(self, batch: StyleBatch) -> Tensor:
        """The mean over the batch, a float32 scalar; what shall stay counts in training only."""
        mixed = batch.noise if batch.perturbed is None else batch.perturbed
        noisy = self.schedule.mix(batch.latents, mixed, batch.timesteps)
        target = self.schedule.target(batch.latents, batch.noise, batch.timesteps)
        errors = self._errors(self._answer(noisy, batch, batch.text), target, batch)
        if batch.weight is not None:
            errors = errors * batch.weight
        if batch.prior is not None and torch.is_grad_enabled():
            with torch.no_grad(), self._silenced():
                target = self._answer(noisy, batch, batch.prior)
            errors = errors + self.prior_weight * self._errors(self._answer(noisy, batch, batch.prior), target, batch)
        mean: Tensor = errors.mean()
        return mean

    def _answer(self, noisy: Tensor, batch: StyleBatch, text: TextStates | tuple[str, ...]) -> Tensor:
        """The UNet's prediction [B, C, h, w] for these captions."""
        if not isinstance(text, TextStates):
            if self._encode_text is None:
                raise ValueError("a batch of captions needs a loss with encode_text")
            text = self._encode_text(text)
        extra = None if batch.time_ids is None else {"text_embeds": text.pooled, "time_ids": batch.time_ids}
        (answer,) = self.unet(noisy, batch.timesteps, text.states, added_cond_kwargs=extra, return_dict=False)
        return cast(Tensor, answer)

    def _errors(self, answer: Tensor, target: Tensor, batch: StyleBatch) -> Tensor:
        """The weighted error of each row [B], over what its mask lets count.

        Squared, or pseudo-Huber as kohya scales it: 2c (sqrt(error^2 + c^2) - c), the square where c is large.
        """
        errors = answer.float() - target.float()
        if self.objective.huber is None:
            errors = errors.square()
        else:
            c = self.schedule.thresholds(batch.timesteps, self.objective).view(-1, 1, 1, 1)
            errors = 2 * c * ((errors.square() + c.square()).sqrt() - c)
        if batch.mask is None:
            errors = errors.flatten(1).mean(1)
        else:
            counted = batch.mask.flatten(1).mean(1).clamp(min=1e-6)
            errors = (errors * batch.mask).flatten(1).mean(1) / counted
        return errors * self.schedule.weights(batch.timesteps, self.objective)


def _rows(values: Tensor, timesteps: Tensor) -> Tensor:
    """values[timesteps], shaped [B, 1, 1, 1]."""
    return values[timesteps].view(-1, 1, 1, 1)
