"""Train a style adapter: a folder of pictures in, one small file out.

    lora-vision train style --data DIR --output ink.safetensors
    accelerate launch "$(lora-vision where train_style)" --data DIR --output ink.safetensors

Beside ink.safetensors lies the folder ink-training: the loss curve (loss.png), sample pictures over the steps
(samples.png), the numbers (history.json), the weights after the last step and those best on the held-out pictures
(last.safetensors, best.safetensors), and the checkpoint from which --resume continues.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import lora_vision
from lora_vision.base import Base, load_base
from lora_vision.batches import StyleBatch, StyleBatches, encode
from lora_vision.charts import loss_curve
from lora_vision.config import LoraConfig, StyleConfig
from lora_vision.data import PictureSet, read_pictures
from lora_vision.errors import DataError
from lora_vision.files import save_adapter
from lora_vision.inject import collect, inject
from lora_vision.losses import DiffusionLoss, NoiseSchedule
from lora_vision.samples import SampleSheet
from lora_vision.training import Fitted, Job, fit, make_accelerator, precision_of, weight_dtype

logger = logging.getLogger(__name__)

NOT_IN_FILE = ("data", "output", "base", "base_config", "resume", "checkpoint_every", "sample_every", "sample_prompts")
MAY_CHANGE = (*NOT_IN_FILE, "steps", "validate_every", "keep", "format")
MODEL_NAMES = {
    "sd1": ("sd_v1", "stable-diffusion-v1"),
    "sd2": ("sd_v2", "stable-diffusion-v2-768-v"),
    "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
}


def run(config: StyleConfig) -> Path:
    """The path of the adapter, trained as the configuration says.

    Raises:
        LoraVisionError: Where the pictures, the base, the settings or the place to write cannot be used (found before
            training), or training diverges.
    """
    accelerator = make_accelerator(config, unused_parameters=config.train_text)
    pictures = read_pictures(config.data, trigger=config.trigger, holdout=config.holdout)
    output = Path(config.output).expanduser()
    folder = output.with_name(f"{output.stem}-training")
    check_writable(output, folder)
    dtype = weight_dtype(accelerator)
    base = load_base(config.base, dtype=dtype, config=config.base_config).to(accelerator.device, dtype)
    base.vae.float()  # SDXL's overflows in fp16
    config = replace(config.filled(base.recipe), precision=precision_of(accelerator))

    schedule = NoiseSchedule(base.scheduler)
    samples, held_out = encoded(config, base, pictures, schedule, accelerator)
    adapted = base.parts if config.train_text else {"unet": base.unet}
    parameters = inject(adapted, lora_config(config))
    job = Job(
        loss=diffusion_loss(config, base, schedule),
        parameters=parameters,
        batch=samples,
        held_out=held_out,
        sample=sampler(config, base, pictures, folder, accelerator),
        folder=folder,
        identity=identity(config, base, pictures),
    )
    fitted = fit(job, config, accelerator)
    if accelerator.is_main_process:
        save(config, adapted, parameters, fitted, metadata(config, base, pictures), output, folder)
    accelerator.wait_for_everyone()
    return output


def check_writable(output: Path, folder: Path) -> None:
    """Make the folders and prove that files can be written there.

    Raises:
        DataError: Where they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for place in (folder, output.parent):
            with tempfile.TemporaryFile(dir=place):
                pass
    except OSError as error:
        raise DataError(
            f"{output} cannot be written ({error.strerror}: {error.filename}); choose another place"
        ) from error


def encoded(
    config: StyleConfig, base: Base, pictures: PictureSet, schedule: NoiseSchedule, accelerator: Accelerator
) -> tuple[StyleBatches, list[StyleBatch]]:
    """The stream of training samples and the fixed validation batches."""
    if config.resolution is None or config.batch_size is None:
        raise ValueError("resolution and batch_size are open; StyleConfig.filled() sets them")
    quiet = not accelerator.is_main_process
    read = partial(encode, base, resolution=config.resolution, keep_captions=config.train_text, quiet=quiet)
    stream = partial(StyleBatches, timesteps=len(schedule), seed=config.seed, device=accelerator.device)
    samples = stream(read(pictures.train))
    held_out = stream(read(pictures.held_out)).fixed(config.batch_size) if pictures.held_out else []
    return samples, held_out


def lora_config(config: StyleConfig) -> LoraConfig:
    """Which layers get a pair of what size."""
    if config.rank is None or config.targets is None:
        raise ValueError("rank and targets are open; StyleConfig.filled() sets them")
    targets = f"{config.targets}+text" if config.train_text else config.targets
    return LoraConfig(rank=config.rank, alpha=config.alpha, targets=targets, seed=config.seed)


def diffusion_loss(config: StyleConfig, base: Base, schedule: NoiseSchedule) -> DiffusionLoss:
    """The loss that holds every module with trained weights."""
    if config.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
        base.unet.train()  # diffusers recomputes in training mode only; Stable Diffusion has no dropout
    if not config.train_text:
        return DiffusionLoss(base.unet, schedule, gamma=config.snr_gamma)
    encoders = nn.ModuleDict({name: part for name, part in base.parts.items() if name != "unet"})
    return DiffusionLoss(base.unet, schedule, gamma=config.snr_gamma, encode_text=base.encode_text, encoders=encoders)


def sampler(
    config: StyleConfig, base: Base, pictures: PictureSet, folder: Path, accelerator: Accelerator
) -> Callable[[int], None] | None:
    """What draws sample pictures: of the prompts asked for, else of held-out captions."""
    if not config.sample_every or config.resolution is None:
        return None
    captions = dict.fromkeys(picture.caption for picture in (*pictures.held_out, *pictures.train))
    prompts = config.sample_prompts or tuple(captions)[:4]
    samples = SampleSheet(
        base, prompts, folder, seed=config.seed, resolution=config.resolution, fresh=not config.resume
    )

    def sample(step: int) -> None:
        with accelerator.autocast():
            samples(step)

    return sample


def identity(config: StyleConfig, base: Base, pictures: PictureSet) -> dict[str, object]:
    """What makes this run this run, and no other: a checkpoint of another is not continued."""
    mine = {name: value for name, value in asdict(config).items() if name not in MAY_CHANGE and value is not None}
    return mine | {"base fingerprint": base.fingerprint, "data fingerprint": pictures.fingerprint}


def metadata(config: StyleConfig, base: Base, pictures: PictureSet) -> dict[str, str]:
    """How the adapter was made, for lora_vision and, as ss_ and modelspec., for readers of kohya's, A1111 and ComfyUI.

    Holds neither dates nor paths: the same run gives the same file.
    """
    settings = {name: value for name, value in asdict(config).items() if name not in NOT_IN_FILE}
    versions = {name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate")}
    counts: dict[str, int] = {}
    for picture in pictures.train:
        counts[picture.caption] = counts.get(picture.caption, 0) + 1
    name, architecture = MODEL_NAMES[base.family]
    if base.family == "sd2" and base.prediction == "epsilon":
        architecture = "stable-diffusion-v2-512"
    alpha = config.rank if config.alpha is None else config.alpha
    return {
        "lora_vision.version": lora_vision.__version__,
        "lora_vision.versions": json.dumps(versions, sort_keys=True),
        "lora_vision.config": json.dumps(settings, sort_keys=True),
        "lora_vision.base": base.source if base.source == "tiny" else Path(base.source).name,
        "lora_vision.base_fingerprint": base.fingerprint,
        "lora_vision.data_fingerprint": pictures.fingerprint,
        "lora_vision.pictures": f"{len(pictures.train)} trained on, {len(pictures.held_out)} held out",
        "lora_vision.trigger": pictures.trigger or "",
        "ss_base_model_version": name,
        "ss_v2": str(base.family == "sd2"),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.rank),
        "ss_network_alpha": f"{alpha:g}",
        "ss_learning_rate": f"{config.learning_rate:g}",
        "ss_lr_scheduler": "cosine",
        "ss_optimizer": "torch.optim.adamw.AdamW",
        "ss_max_train_steps": str(config.steps),
        "ss_batch_size_per_device": str(config.batch_size),
        "ss_gradient_accumulation_steps": str(config.accumulate),
        "ss_mixed_precision": config.precision.replace("fp32", "no"),
        "ss_min_snr_gamma": f"{config.snr_gamma:g}",
        "ss_num_train_images": str(len(pictures.train)),
        "ss_resolution": f"({config.resolution}, {config.resolution})",
        "ss_seed": str(config.seed),
        "ss_tag_frequency": json.dumps({Path(config.data).name: counts}, sort_keys=True),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.trigger_phrase": pictures.trigger or "",
        "modelspec.prediction_type": {"v_prediction": "v"}.get(base.prediction, base.prediction),
        "modelspec.resolution": f"{config.resolution}x{config.resolution}",
    }


def save(
    config: StyleConfig,
    adapted: dict[str, nn.Module],
    parameters: Sequence[nn.Parameter],
    fitted: Fitted,
    made: dict[str, str],
    output: Path,
    folder: Path,
) -> None:
    """Write the adapter, its loss curve and its numbers."""

    def write(path: Path, step: int | None) -> None:
        extra = {"lora_vision.step": str(step), "ss_steps": str(step)}
        save_adapter(replace(collect(adapted), metadata=made | extra), path, format=config.format)

    history = fitted.history
    write(folder / "last.safetensors", len(history.losses))
    if config.keep == "last":
        write(output, len(history.losses))
    if fitted.best is not None:
        put(parameters, fitted.best)
        write(folder / "best.safetensors", history.best_step)
        if config.keep == "best":
            write(output, history.best_step)
    loss_curve(history.losses, history.validation).save(folder / "loss.png")
    losses = [loss if math.isfinite(loss) else None for loss in history.losses]  # JSON knows no NaN
    numbers = asdict(history) | {"losses": losses, "best_step": history.best_step}
    (folder / "history.json").write_text(json.dumps(numbers) + "\n")
    logger.info("wrote %s; loss curve and samples are in %s", output, folder)


@torch.no_grad()
def put(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Set the parameters to these values."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of `lora-vision train style` with these arguments (default: the program's own)."""
    from lora_vision.cli import main as command

    return command(["train", "style", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
