"""ZipLoRA: a subject's and a style's adapter in one file, each column of their changes weighted to clash less.

Shah et al. 2023, "ZipLoRA: Any Subject in Any Style by Effectively Merging LoRAs" (arXiv 2311.13600). In every layer
that both change, the merged change is ``m_c ⊙ ΔW_c + m_s ⊙ ΔW_s`` with one learned number for each column, so that for
the subject's noisy latents the merged model predicts what the subject's adapter does, for the style's what the style's
does, and ``λ |m_c · m_s|`` stays small (section 4.2). Two things differ from the paper: the latents are pictures that
each adapter draws itself from its own prompt, since there is no training set at merging time, and the last term is
averaged over a layer's columns, as in the public reimplementation, so that λ means the same at any width.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from tqdm import tqdm

from lora_vision import names
from lora_vision.adapter import Adapter
from lora_vision.base import Base
from lora_vision.blend import Blend
from lora_vision.combine import Combined, combine, errors_of, plain
from lora_vision.errors import AdapterError
from lora_vision.factors import Factors, Full, LowRank

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Zip:
    """The settings of ZipLoRA; the defaults are the paper's, but for the number of pictures.

    Attributes:
        steps: Steps of Adam.
        learning_rate: Its learning rate.
        overlap: λ, the weight of the term that keeps the two sets of columns apart.
        pictures: How many latents each adapter draws to learn on; a step sees all of them, each at its own noise level.
        seed: Seed of latents, noise and noise levels.
    """

    steps: int = 100
    learning_rate: float = 0.01
    overlap: float = 0.01
    pictures: int = 2
    seed: int = 0


@dataclass(frozen=True, eq=False)
class _Scenes:
    """What the model is asked, and what it is to answer: one entry for each step."""

    inputs: list[dict[str, Any]]
    answers: list[Tensor]


def ziplora(
    base: Base,
    subject: tuple[Adapter, float],
    style: tuple[Adapter, float],
    prompts: tuple[str, str],
    settings: Zip | None = None,
) -> tuple[Combined, list[float]]:
    """The merged adapter, its errors against the weighted sum, and the loss of each step.

    Layers that only one of them changes, and the text encoders', are summed at their weights.

    Args:
        base: What both were made for; it is untouched afterwards.
        subject: The subject's adapter and its weight.
        style: The style's.
        prompts: What each of them draws to learn on: a prompt that calls the subject, one that calls the style.
        settings: Steps and weights of the learning.

    Raises:
        AdapterError: An adapter does not fit the base, or they share no layer of the UNet.
    """
    settings = settings or Zip()
    pair = (subject, style)
    weights = {name: cast(Tensor, layer.weight).detach() for name, layer in names.index(base.parts).items()}
    shared = [
        name
        for name in subject[0].layers
        if name.startswith("unet.") and name in style[0].layers and name in weights and weights[name].dim() > 1
    ]
    if not shared:
        raise AdapterError("ZipLoRA weighs layers of the UNet that both adapters change, and there is none")
    scenes = [_drawn(base, one, prompt, settings) for one, prompt in zip(pair, prompts, strict=True)]
    changes = {name: [one.layers[name].delta(weights[name].cpu()) * weight for one, weight in pair] for name in shared}
    columns, losses = _learned(base.unet, weights, changes, scenes, settings)
    zipped = []
    for position, (adapter, weight) in enumerate(pair):
        layers = {name: (factors, weight) for name, factors in adapter.layers.items()}
        for name in shared:
            layers[name] = _zipped(adapter.layers[name], weight, columns[name][position], changes[name][position])
        zipped += [(Adapter({name: factors}), amount) for name, (factors, amount) in layers.items()]
    weights = {name: weight.cpu() for name, weight in weights.items()}
    extras = {**subject[0].extras, **style[0].extras}
    found = Adapter(combine(zipped, base=weights).adapter.layers, extras, {"lora_vision_combined": "ziplora"})
    true = [(plain(adapter, weights), weight) for adapter, weight in pair]
    return Combined(found, errors_of(found, true)), losses


@torch.no_grad()
def _drawn(base: Base, one: tuple[Adapter, float], prompt: str, settings: Zip) -> _Scenes:
    """Noisy latents that one adapter drew itself, and the noise predictions it makes of them."""
    pipe = base.pipeline()
    blend = Blend(pipe)
    try:
        blend.load(one[0], "one", scale=one[1])
        seeds = [torch.Generator().manual_seed(settings.seed + number) for number in range(settings.pictures)]
        recipe = base.recipe
        side = int(base.unet.config.sample_size) * base.factor
        latents = pipe(
            [prompt] * settings.pictures,
            height=side,
            width=side,
            num_inference_steps=recipe.sample_steps,
            guidance_scale=recipe.guidance,
            generator=seeds,
            output_type="latent",
        ).images
        told = _told(base, prompt, latents)
        generator = torch.Generator().manual_seed(settings.seed)
        inputs, answers = [], []
        for _ in range(settings.steps):
            noise = torch.randn(latents.shape, generator=generator).to(latents)
            levels = torch.randint(base.scheduler.config.num_train_timesteps, (len(latents),), generator=generator)
            levels = levels.to(latents.device)
            inputs.append({"sample": base.scheduler.add_noise(latents, noise, levels), "timestep": levels, **told})
            answers.append(base.unet(**inputs[-1]).sample)
        return _Scenes(inputs, answers)
    finally:
        blend.detach()


def _told(base: Base, prompt: str, latents: Tensor) -> dict[str, Any]:
    """What else the UNet is told about pictures of a prompt."""
    count, factor = len(latents), base.factor
    text = base.encode_text([prompt] * count)
    told: dict[str, Any] = {"encoder_hidden_states": text.states.to(latents)}
    if text.pooled is not None:
        height, width = (side * factor for side in latents.shape[-2:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]] * count).to(latents)
        told["added_cond_kwargs"] = {"text_embeds": text.pooled.to(latents), "time_ids": sizes}
    return told


def _learned(
    unet: Any,
    weights: Mapping[str, Tensor],
    changes: Mapping[str, list[Tensor]],
    scenes: list[_Scenes],
    settings: Zip,
) -> tuple[dict[str, Tensor], list[float]]:
    """A number for each column of each change [2, I] by layer, and the losses."""
    paths = names.paths("unet", unet)
    device = next(unet.parameters()).device
    both = {name: torch.stack(pair).to(device) for name, pair in changes.items()}
    columns = {name: torch.ones(2, pair.shape[2], device=device, requires_grad=True) for name, pair in both.items()}
    optimizer = torch.optim.Adam(columns.values(), lr=settings.learning_rate)
    losses = []
    for step in tqdm(range(settings.steps), "ziplora"):
        merged = {
            f"{paths[name]}.weight": (weights[name] + (pair * _along(columns[name], pair)).sum(0)).to(
                weights[name].dtype
            )
            for name, pair in both.items()
        }
        kept = torch.stack([(ours * theirs).abs().mean() for ours, theirs in columns.values()]).sum()
        loss = settings.overlap * kept
        for scene in scenes:
            answer = functional_call(unet, merged, (), scene.inputs[step]).sample
            loss = loss + F.mse_loss(answer.float(), scene.answers[step].float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return {name: value.detach().cpu() for name, value in columns.items()}, losses


def _along(columns: Tensor, pair: Tensor) -> Tensor:
    """Columns [2, I] against changes [2, O, I(, K, K)]."""
    return columns.view(2, 1, -1, *(1,) * (pair.dim() - 3))


def _zipped(factors: Factors, weight: float, columns: Tensor, change: Tensor) -> tuple[Factors, float]:
    """``m ⊙ ΔW`` and its weight: a pair stays a pair, for a column's number goes into ``down``."""
    low = factors.low_rank()
    if low is None:
        bias = factors.bias_delta()
        diff = change * columns.view(-1, *(1,) * (change.dim() - 2))
        return Full(diff=diff, bias=None if bias is None else bias * weight), 1.0
    down = low.down.float().reshape(low.rank, len(columns), -1) * columns.view(1, -1, 1)
    return LowRank(down.view_as(low.down), low.up, low.alpha, bias=low.bias), weight
