"""What an adapter file tells of its making, in its header: for us, kohya's tools, A1111 and ComfyUI."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import lora_vision
from lora_vision.base import Base
from lora_vision.config import StyleConfig
from lora_vision.data import PictureSet

MODEL_NAMES = {
    "sd1": ("sd_v1", "stable-diffusion-v1"),
    "sd2": ("sd_v2", "stable-diffusion-v2-768-v"),
    "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
}
OPTIMIZERS = {
    "adamw": "torch.optim.adamw.AdamW",
    "adamw8bit": "bitsandbytes.optim.adamw.AdamW8bit",
    "adafactor": "transformers.optimization.Adafactor(scale_parameter=False,relative_step=False,warmup_init=False)",
    "prodigy": "prodigyopt.prodigy.Prodigy(safeguard_warmup=True,use_bias_correction=True,d0=1e-05)",
    "lion": "lion_pytorch.lion_pytorch.Lion",
    "schedulefree": "schedulefree.adamw_schedulefree.AdamWScheduleFree",
}


def metadata(config: StyleConfig, base: Base, pictures: PictureSet, left_out: Sequence[str]) -> dict[str, str]:
    """How the adapter was made, for lora_vision and, as ss_ and modelspec., for readers of kohya's, A1111 and ComfyUI.

    Holds neither dates nor paths: the same run gives the same file.

    Args:
        config: All settings.
        base: What it was made for.
        pictures: What it was made of.
        left_out: Settings that say nothing of the adapter.
    """
    settings = {name: value for name, value in asdict(config).items() if name not in left_out}
    versions = {name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate")}
    counts: dict[str, int] = {}
    for picture in pictures.train:
        counts[picture.caption] = counts.get(picture.caption, 0) + 1
    name, architecture = MODEL_NAMES[base.family]
    if base.family == "sd2" and base.prediction == "epsilon":
        architecture = "stable-diffusion-v2-512"
    rank = config.rank if isinstance(config.rank, int) else 2 * base.recipe.rank
    alpha = rank if config.alpha is None else config.alpha
    pair = 2 if config.variant == "pissa" else 1  # written as the difference of two pairs
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
        **networks(config.variant),
        "ss_network_dim": "Dynamic" if config.rank == "auto" else str(pair * rank),
        "ss_network_alpha": "Dynamic" if config.rank == "auto" else f"{pair * alpha:g}",
        "ss_learning_rate": f"{config.learning_rate:g}",
        "ss_lr_scheduler": "constant_with_warmup" if config.optimizer == "schedulefree" else "cosine",
        "ss_optimizer": OPTIMIZERS[config.optimizer],
        "ss_max_train_steps": str(config.steps),
        "ss_batch_size_per_device": str(config.batch_size),
        "ss_gradient_accumulation_steps": str(config.accumulate),
        "ss_mixed_precision": config.precision.replace("fp32", "no"),
        **objective(config),
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


def networks(variant: str) -> dict[str, str]:
    """How kohya's tools are told which kind of adapter this is."""
    algorithm = {"dora": {"algo": "lora", "dora_wd": "True"}, "loha": {"algo": "loha"}, "lokr": {"algo": "lokr"}}
    if variant not in algorithm:
        return {"ss_network_module": "networks.lora"}
    return {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps(algorithm[variant])}


def objective(config: StyleConfig) -> dict[str, str]:
    """How kohya's tools are told what counted as an error."""
    told = {
        "ss_min_snr_gamma": f"{config.snr_gamma:g}" if config.weighting == "min-snr" else "None",
        "ss_debiased_estimation": str(config.weighting == "debiased"),
        "ss_noise_offset": f"{config.noise_offset:g}" if config.noise_offset else "None",
        "ss_ip_noise_gamma": f"{config.input_perturbation:g}" if config.input_perturbation else "None",
    }
    if config.huber is None:
        return told | {"ss_loss_type": "l2"}
    return told | {"ss_loss_type": "huber", "ss_huber_schedule": config.huber, "ss_huber_c": f"{config.huber_c:g}"}
