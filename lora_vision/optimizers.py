"""The optimizers, from the libraries they live in, and the learning rate of each step."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any

import torch
from torch import nn

from lora_vision.config import FitConfig
from lora_vision.errors import LoraVisionError


class TrainingError(LoraVisionError):
    """Training cannot start, continue or go on being useful."""


Groups = list[dict[str, Any]]


def learning_rate(step: int, steps: int, peak: float, warmup: float, *, falling: bool = True) -> float:
    """The rate of step `step` (from 0) of `steps`: a linear rise over the share `warmup`, then a cosine to zero.

    Where the rate is not falling, it stays at its peak.
    """
    rise = max(1, round(steps * warmup))
    if step < rise:
        return peak * (step + 1) / rise
    if not falling:
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def by_rate(parameters: Sequence[nn.Parameter], rates: Sequence[float]) -> Groups:
    """The optimizer's groups: parameters with the same multiplier ("times") of the learning rate, in their order."""
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter, times in zip(parameters, rates or [1.0] * len(parameters), strict=True):
        groups.setdefault(times, []).append(parameter)
    return [{"params": members, "times": times} for times, members in groups.items()]


def make_optimizer(groups: Groups, config: FitConfig, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer that ``config.optimizer`` names, over these groups.

    Each library's own settings for a given learning rate: Adafactor without relative steps and scaling by parameters
    (an up matrix starts at zero), Prodigy with the safeguards its authors advise for diffusion models, and with a first
    guess of the rate ten times its own, from which 150 steps are too few to get away.

    Raises:
        TrainingError: The library is not installed, or the optimizer cannot do what is asked for.
    """
    rate, decay = config.learning_rate or 0.0, config.weight_decay
    plain: dict[str, Any] = {"lr": rate, "weight_decay": decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **plain, fused=device.type in ("cpu", "cuda"))
    if config.optimizer == "adafactor":
        fixed = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
        return _from("transformers.optimization", "Adafactor")(groups, **plain, **fixed)
    if config.optimizer == "adamw8bit":
        return _from("bitsandbytes.optim", "AdamW8bit")(groups, **plain)
    if config.optimizer == "lion":
        return _from("lion_pytorch", "Lion")(groups, **plain)
    if config.optimizer == "schedulefree":
        return _from("schedulefree", "AdamWScheduleFree")(groups, **plain)
    if len({group["times"] for group in groups} - {0.0}) > 1:
        raise TrainingError(
            "--optimizer prodigy finds one learning rate for all layers; leave out --up-rate and rates in --layers, "
            "or take adamw"
        )
    with redirect_stdout(io.StringIO()):  # it prints
        advised = {"safeguard_warmup": True, "use_bias_correction": True}
        return _from("prodigyopt", "Prodigy")(groups, **plain, **advised, d0=1e-5)


def _from(module: str, name: str) -> Callable[..., torch.optim.Optimizer]:
    """The class of that name; its library is imported now and not before."""
    try:
        found: Callable[..., torch.optim.Optimizer] = getattr(import_module(module), name)
    except ImportError as error:
        raise TrainingError(
            f"{name} needs {module.split('.')[0]}, which cannot be imported ({error}); "
            "pip install 'lora-vision[optim]', or take --optimizer adamw"
        ) from error
    return found
