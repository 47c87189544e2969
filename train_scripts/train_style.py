"""Train a style adapter: a folder of pictures in, one small file out.

    lora-vision train style --data DIR --output ink.safetensors
    accelerate launch "$(lora-vision where train_style)" --data DIR --output ink.safetensors

Beside ink.safetensors lies the folder ink-training: the loss curve (loss.png), sample pictures over the steps
(samples.png), the numbers (history.json), the weights after the last step and those best on the held-out pictures
(last.safetensors, best.safetensors), and the checkpoint from which --resume continues. It may be killed at any moment:
every file there is whole, and what is lost is at most the steps since the last checkpoint.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import lora_vision
from lora_vision import lineage, names
from lora_vision.adapter import Adapter
from lora_vision.base import Base, load_base
from lora_vision.batches import StyleBatch, StyleBatches
from lora_vision.buckets import by_size
from lora_vision.cache import Cache
from lora_vision.captions import Wording
from lora_vision.charts import loss_curve
from lora_vision.config import ChangeConfig, LoraConfig, StyleConfig
from lora_vision.data import PictureSet, read_pictures
from lora_vision.encoding import Encoding, encode, step_of
from lora_vision.errors import AdapterError, DataError
from lora_vision.files import header, save_adapter
from lora_vision.inject import attach, collect, detach, inject, rates
from lora_vision.losses import DiffusionLoss, NoiseSchedule
from lora_vision.samples import SampleSheet, png
from lora_vision.survey import survey
from lora_vision.tools.card import licence_of, write_card
from lora_vision.tools.resize import Size, resize
from lora_vision.trained import limit_norms, silenced
from lora_vision.training import Fitted, Job, fit, make_accelerator, precision_of, weight_dtype
from lora_vision.whole import check_writable, write_whole

logger = logging.getLogger(__name__)

OUTSIDE = ("data", "output", "base", "base_config", "cache", "resume", "checkpoint_every", "sample_every")
NOT_IN_FILE = (*OUTSIDE, "sample_prompts", "prior")
MAY_CHANGE = (*NOT_IN_FILE, "steps", "validate_every", "keep", "format")
ENERGIES = (0.8, 0.9, 0.95, 0.98, 0.99, 0.999)
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
    pictures = to_learn_from(config)
    output = Path(config.output).expanduser()
    folder = output.with_name(f"{output.stem}-training")
    check_writable(output, folder)
    dtype = weight_dtype(accelerator)
    base = load_base(config.base, dtype=dtype, config=config.base_config).to(accelerator.device, dtype)
    base.vae.float()  # SDXL's overflows in fp16
    config = replace(config.filled(base.recipe), precision=precision_of(accelerator))

    schedule = NoiseSchedule(base.scheduler)
    if accelerator.is_main_process:
        tell(config, base, pictures)
    samples, held_out = encoded(config, base, pictures, schedule, accelerator)
    adapted = base.parts if config.train_text else {"unet": base.unet}
    change = lora_config(config, base)
    parameters = inject(adapted, change)
    job = Job(
        loss=diffusion_loss(config, base, schedule, adapted),
        parameters=parameters,
        rates=rates(adapted, change),
        after_step=partial(limit_norms, names.index(adapted), config.max_norm) if config.max_norm else None,
        batch=samples,
        held_out=held_out,
        sample=sampler(config, base, pictures, folder, accelerator),
        folder=folder,
        identity=identity(config, base, pictures),
    )
    fitted = fit(job, config, accelerator)
    if accelerator.is_main_process:
        found = results(adapted, parameters, fitted)
        if config.rank == "auto":
            with accelerator.autocast():
                found = slimmed(found, adapted, job)
        made = metadata(config, base, pictures) | parent(fitted, output, folder)
        save(config, found, fitted, made, output, folder)
    accelerator.wait_for_everyone()
    return output


def to_learn_from(config: StyleConfig) -> PictureSet:
    """The pictures of the data folder; with their mirror images and those of what shall stay, where asked for."""
    pictures = read_pictures(config.data, trigger=config.trigger, holdout=config.holdout, alpha_mask=config.alpha_mask)
    train = pictures.train
    if config.prior == "base" and not pictures.trigger:
        raise DataError("--prior base keeps the base's answers to captions without the trigger; give a --trigger")
    if config.prior not in (None, "base"):
        kept = read_pictures(config.prior, holdout=0).train
        often = max(1, round(len(train) / len(kept)))  # half of what is shown, as DreamBooth has it
        train += tuple(replace(picture, prior=True) for picture in kept) * often
    if config.flip:
        train += tuple(replace(picture, flipped=True) for picture in train)
    return replace(pictures, train=train)


def tell(config: StyleConfig, base: Base, pictures: PictureSet) -> None:
    """Log what there is to learn from, and what its owner may want to change."""
    assert config.resolution is not None  # filled() was asked
    every = (*pictures.train, *pictures.held_out)
    groups = by_size(every, config.resolution, step_of(base), upscale=config.upscale)
    report = survey(pictures, groups, config.resolution, base.tokenizers)
    for fact in report.facts:
        logger.info("%s", fact)
    for doubt in report.doubts:
        logger.warning("%s", doubt)


def encoded(
    config: StyleConfig, base: Base, pictures: PictureSet, schedule: NoiseSchedule, accelerator: Accelerator
) -> tuple[StyleBatches, list[StyleBatch]]:
    """The stream of training samples and the fixed validation batches."""
    if config.resolution is None or config.batch_size is None:
        raise ValueError("resolution and batch_size are open; StyleConfig.filled() sets them")
    wording = Wording.of(config, pictures.trigger)
    how = Encoding(
        resolution=config.resolution,
        upscale=config.upscale,
        keep_captions=config.train_text or wording is not None,
        prior_weight=config.prior_weight,
        plain_of=(pictures.trigger or "") if config.prior == "base" else None,
        cache=Cache(config.cache),
        quiet=not accelerator.is_main_process,
    )
    stream = partial(StyleBatches, timesteps=len(schedule), seed=config.seed, device=accelerator.device)
    shaken = {"noise_offset": config.noise_offset, "input_perturbation": config.input_perturbation}
    samples = stream(encode(base, pictures.train, how), wording=wording, **shaken)
    held_out = stream(encode(base, pictures.held_out, how)).fixed(config.batch_size) if pictures.held_out else []
    return samples, held_out


def lora_config(config: StyleConfig, base: Base) -> LoraConfig:
    """Which layers get a change of what kind and size; where the rank is to be found, from twice the base's own."""
    if config.rank is None or config.targets is None:
        raise ValueError("rank and targets are open; StyleConfig.filled() sets them")
    return LoraConfig(
        rank=config.rank if isinstance(config.rank, int) else 2 * base.recipe.rank,
        targets=f"{config.targets}+text" if config.train_text else config.targets,
        **{field.name: getattr(config, field.name) for field in fields(ChangeConfig)},
        seed=config.seed,
    )


def diffusion_loss(
    config: StyleConfig, base: Base, schedule: NoiseSchedule, adapted: dict[str, nn.Module]
) -> DiffusionLoss:
    """The loss that holds every module with trained weights."""
    if config.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
        base.unet.train()  # diffusers recomputes in training mode only; Stable Diffusion has no dropout
    encoders = nn.ModuleDict({name: part for name, part in adapted.items() if name != "unet"})
    return DiffusionLoss(
        base.unet,
        schedule,
        objective=config,
        encode_text=base.encode_text,
        encoders=encoders,
        prior_weight=config.prior_weight,
        silenced=partial(silenced, adapted),
    )


def sampler(
    config: StyleConfig, base: Base, pictures: PictureSet, folder: Path, accelerator: Accelerator
) -> Callable[[int], None] | None:
    """What draws sample pictures: of the prompts asked for, else of held-out captions."""
    if not config.sample_every or config.resolution is None:
        return None
    shown = (picture for picture in (*pictures.held_out, *pictures.train) if not picture.prior)
    captions = dict.fromkeys(picture.caption for picture in shown)
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
    mine["keeps the base's answers"] = config.prior == "base"
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
        "ss_lr_scheduler": "cosine",
        "ss_optimizer": "torch.optim.adamw.AdamW",
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


def results(
    adapted: dict[str, nn.Module], parameters: Sequence[nn.Parameter], fitted: Fitted
) -> dict[str, tuple[Adapter, int]]:
    """The adapter after the last step and the best one on held-out pictures, each with its number of steps."""
    found = {"last": (collect(adapted), len(fitted.history.losses))}
    if fitted.best is not None and fitted.history.best_step is not None:
        put(parameters, fitted.best)
        found["best"] = (collect(adapted), fitted.history.best_step)
    return found


@torch.no_grad()
def slimmed(
    found: dict[str, tuple[Adapter, int]], adapted: dict[str, nn.Module], job: Job
) -> dict[str, tuple[Adapter, int]]:
    """The adapters with each layer's rank cut by its singular values, to the same share of their energy.

    It is the smallest share of ENERGIES that costs at most 1 % of what training gained on the held-out pictures.
    Afterwards nothing is trained in the model any more.
    """
    if not job.held_out:
        logger.warning("no held-out pictures to confirm a rank on: each layer keeps 95 % of its energy")
        return {name: (resize(adapter, Size(energy=0.95)).adapter, step) for name, (adapter, step) in found.items()}

    def loss(adapter: Adapter | None) -> float:
        detach(adapted)
        if adapter is not None:
            attach(adapted, adapter)
        losses = [len(batch) * float(job.loss(batch)) for batch in job.held_out]
        return sum(losses) / sum(len(batch) for batch in job.held_out)

    whole, _ = found.get("best", found["last"])
    before, after = loss(None), loss(whole)
    for energy in ENERGIES:
        small = resize(whole, Size(energy=energy))
        if (now := loss(small.adapter)) <= after + 0.01 * max(before - after, 0):
            break
    ranks = [rank for _, rank in small.ranks.values()]
    logger.info("%s", small)
    logger.info(
        "ranks %d to %d, %d KiB of %d: %.3g of the energy kept, held-out loss %.5f (before the cut %.5f, base %.5f)",
        *(min(ranks), max(ranks), small.adapter.nbytes // 1024, whole.nbytes // 1024, energy, now, after, before),
    )
    return {name: (resize(adapter, Size(energy=energy)).adapter, step) for name, (adapter, step) in found.items()}


def parent(fitted: Fitted, output: Path, folder: Path) -> dict[str, str]:
    """The header string that names the finished adapter this run went on from; nothing where there was none.

    A run that broke off and was resumed has none: its file is that of an unbroken run.
    """
    before = folder / "last.safetensors"
    if fitted.extends is None or not before.is_file():
        return {}
    try:
        if header(before)[1].get("lora_vision.step") != str(fitted.extends):
            return {}
    except AdapterError:
        return {}
    told = lineage.parent_of(before, step=fitted.extends)
    same = output.is_file() and lineage.sha256_of(output) == told["sha256"]
    told["file"] = output.name if same else f"{folder.name}/{before.name}"
    return lineage.record({}, "train", [told], {"resumed at step": fitted.extends})


def save(
    config: StyleConfig,
    found: dict[str, tuple[Adapter, int]],
    fitted: Fitted,
    made: dict[str, str],
    output: Path,
    folder: Path,
) -> None:
    """Write the adapters, the loss curve, its numbers and a model card; last what parent() looks for."""
    history = fitted.history
    places = {output: found.get(config.keep, found["last"])}
    places |= {folder / f"{name}.safetensors": found[name] for name in ("best", "last") if name in found}
    for path, (adapter, step) in places.items():
        extra = {"lora_vision.step": str(step), "ss_steps": str(step)}
        save_adapter(replace(adapter, metadata=made | extra), path, format=config.format)
    write_whole(folder / "loss.png", png(loss_curve(history.losses, history.validation)))
    losses = [loss if math.isfinite(loss) else None for loss in history.losses]  # JSON knows no NaN
    numbers = asdict(history) | {"losses": losses, "best_step": history.best_step, "resumed": list(fitted.resumed)}
    write_whole(folder / "history.json", (json.dumps(numbers) + "\n").encode())
    write_card(output, licence_of(config.data))
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
