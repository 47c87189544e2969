"""What the processes of a run are told: devices, precision, trackers, and who holds the base where FSDP shares it out.

Under FSDP2 only the frozen base is shared out. What learns is small and stays whole on every process, so that
optimizers, checkpoints and adapters are what they are without; its gradients are averaged after each step's last batch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lora_vision.config import FitConfig, Precision
from lora_vision.optimizers import TrainingError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_accelerator(config: FitConfig, *, folder: Path | None = None, unused_parameters: bool = False) -> Accelerator:
    """The Accelerator for this precision and tracker and whatever `accelerate launch` has set up.

    Args:
        config: Precision and tracker.
        folder: Where trackers that keep files may do so; without one nothing is tracked.
        unused_parameters: Whether some that learn may take no part in a step.

    Raises:
        TrainingError: For fp16 on a CPU, or a tracker that is not there.
    """
    names = [] if folder is None else trackers(config.tracker)
    tracked: dict[str, Any] = {"log_with": names, "project_dir": folder} if names else {}
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if config.precision != "auto":
        chosen = config.precision.replace("fp32", "no")
    elif torch.cuda.is_available() and launched == "no":
        chosen = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    else:
        chosen = launched
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=unused_parameters)]
    try:
        accelerator = Accelerator(mixed_precision=chosen, kwargs_handlers=handlers, **tracked)
    except ValueError as error:
        raise TrainingError(f"precision {chosen} is not possible here: {error}; use --precision fp32") from error
    if chosen == "fp16" and accelerator.device.type == "cpu":
        raise TrainingError("found precision fp16 on a CPU, which cannot train in it; use --precision fp32 or bf16")
    return accelerator


def trackers(name: str) -> list[str]:
    """The trackers that are meant, as Accelerate calls them.

    Raises:
        TrainingError: There is none of that name, or it is not installed.
    """
    there = [str(each) for each in get_available_trackers()]
    if name == "none" or (name == "auto" and "tensorboard" not in there):
        return []
    if name not in ("auto", *there):
        known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
        advice = "install it" if name in LOGGER_TYPE_TO_CLASS else f"choose auto, none or one of {known}"
        raise TrainingError(f"--tracker {name} is not there; {advice}")
    return ["tensorboard" if name == "auto" else name]


def precision_of(accelerator: Accelerator) -> Precision:
    """The precision this Accelerator computes in: "fp32", "bf16" or "fp16"."""
    return cast(Precision, accelerator.mixed_precision.replace("no", "fp32"))


def weight_dtype(accelerator: Accelerator) -> torch.dtype:
    """The dtype for frozen weights under this Accelerator's precision."""
    return DTYPES[precision_of(accelerator)]


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether Accelerate shares the model out among the processes (FSDP)."""
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def share_out(accelerator: Accelerator, parameters: Sequence[nn.Parameter]) -> None:
    """Have Accelerate share out everything but these parameters, when it prepares the model.

    Raises:
        TrainingError: It was set up for FSDP 1, whose flat parameters cannot leave some out.
    """
    plugin = accelerator.state.fsdp_plugin
    version = getattr(plugin, "fsdp_version", 1)
    if version != 2:
        raise TrainingError(f"found FSDP {version}; set fsdp_version: 2 in Accelerate's configuration")
    plugin.ignored_modules = [nn.ParameterList(parameters)]
    plugin.cpu_ram_efficient_loading = False  # every process has loaded the base


def check_whole(model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Nothing, if what learns is what it was before Accelerate prepared the model.

    Raises:
        TrainingError: It was shared out, too.
    """
    if not {id(each) for each in parameters} <= {id(each) for each in model.parameters()}:
        raise TrainingError(
            "found what learns shared out among the processes; this torch or Accelerate cannot leave parameters out of "
            "FSDP: torch 2.13 with Accelerate 1.15 can"
        )


def average(accelerator: Accelerator, parameters: Sequence[nn.Parameter]) -> None:
    """Give every process the mean of all processes' gradients."""
    for parameter in parameters:
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = accelerator.reduce(gradient, "mean")


def gather(model: nn.Module, whole: bool) -> None:
    """Give every process the whole model, so that one may use it alone, or let each keep only its share again."""
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.set_reshard_after_forward(not whole, recurse=False)
            unit.unshard() if whole else unit.reshard()
