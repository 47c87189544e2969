"""Train a style adapter: a folder of pictures in, one small file out.

    lora-vision train style --data DIR --output ink.safetensors
    accelerate launch "$(lora-vision where train_style)" --data DIR --output ink.safetensors

Beside ink.safetensors lies the folder ink-training: the loss curve (loss.png), sample pictures over the steps
(samples.png), the adapters that drew them (samples/000125.safetensors) and a sheet of these at several weights, to pick
one by eye (choices.png), the numbers (history.json), the adapter after the last step and the one best on the held-out
pictures (last.safetensors, best.safetensors), and the checkpoint from which --resume continues. It may be killed at any
moment: every file there is whole, and what is lost is at most the steps since the last checkpoint.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from lora_vision import names
from lora_vision.adapter import Adapter
from lora_vision.base import Base, TextStates, load_base
from lora_vision.batches import StyleBatch, StyleBatches
from lora_vision.buckets import by_size
from lora_vision.cache import Cache
from lora_vision.captions import Wording
from lora_vision.charts import loss_curve
from lora_vision.choices import choices
from lora_vision.config import ChangeConfig, LoraConfig, StyleConfig
from lora_vision.data import PictureSet, read_pictures
from lora_vision.devices import make_accelerator, precision_of, weight_dtype
from lora_vision.encoding import Encoding, encode, step_of
from lora_vision.errors import DataError
from lora_vision.files import save_adapter
from lora_vision.inject import attach, collect, detach, inject, rates
from lora_vision.losses import DiffusionLoss, NoiseSchedule
from lora_vision.metadata import metadata
from lora_vision.quantised import quantise
from lora_vision.samples import SampleSheet, png
from lora_vision.survey import survey
from lora_vision.tools.card import licence_of, write_card
from lora_vision.tools.history import went_on_from
from lora_vision.tools.resize import Size, resize
from lora_vision.trained import limit_norms, silenced
from lora_vision.training import Fitted, Job, fit, put
from lora_vision.whole import check_writable, write_whole
from lora_vision.words import NewWord

logger = logging.getLogger(__name__)

OUTSIDE = ("data", "output", "base", "base_config", "cache", "resume", "checkpoint_every", "sample_every")
NOT_IN_FILE = (*OUTSIDE, "sample_prompts", "prior", "tracker", "compile")
MAY_CHANGE = (*NOT_IN_FILE, "steps", "validate_every", "patience", "keep", "format")
TOKEN_RATE = 5.0
"""Learning rate of new tokens over that of the adapter (cloneofsimo's pivotal tuning: 5e-4 and 1e-4)."""
ENERGIES = (0.8, 0.9, 0.95, 0.98, 0.99, 0.999)


def run(config: StyleConfig) -> Path:
    """The path of the adapter, trained as the configuration says.

    Raises:
        LoraVisionError: Where the pictures, the base, the settings or the place to write cannot be used (found before
            training), or training diverges.
    """
    output = Path(config.output).expanduser()
    folder = output.with_name(f"{output.stem}-training")
    accelerator = make_accelerator(config, folder=folder, unused_parameters=learns_words(config))
    pictures = to_learn_from(config)
    check_writable(output, folder)
    dtype = weight_dtype(accelerator)
    base = load_base(config.base, dtype=dtype, config=config.base_config).to(accelerator.device, dtype)
    base.vae.float()  # SDXL's overflows in fp16
    if config.quantise:
        quantise(base.unet)
    config = replace(config.filled(base.recipe), precision=precision_of(accelerator))

    schedule = NoiseSchedule(base.scheduler)
    if accelerator.is_main_process:
        tell(config, base, pictures)
    samples, held_out = encoded(config, base, pictures, schedule, accelerator)
    learning = Learning(config, base, pictures.trigger or "")
    made = metadata(config, base, pictures, NOT_IN_FILE)
    prompts = shown_prompts(config, pictures)
    job = Job(
        loss=diffusion_loss(config, base, schedule, learning),
        parameters=learning.parameters,
        rates=learning.rates,
        after_step=partial(limit_norms, names.index(learning.parts), config.max_norm) if config.max_norm else None,
        batch=samples,
        held_out=held_out,
        sample=sampler(config, base, prompts, learning, made, folder, accelerator),
        folder=folder,
        identity=identity(config, base, pictures),
        patience=config.patience,
    )
    fitted = fit(job, config, accelerator)
    if accelerator.is_main_process:
        found = results(learning, fitted)
        if config.rank == "auto":
            with accelerator.autocast():
                found = slimmed(found, learning.parts, job)
        made |= went_on_from(folder / "last.safetensors", output, fitted.extends, config.steps)
        save(config, found, fitted, made, output, folder)
        if config.sample_every:
            learning.end()
            with accelerator.autocast():
                draw_choices(config, base, prompts[0], folder)
    accelerator.wait_for_everyone()
    return output


def learns_words(config: StyleConfig) -> bool:
    """Whether captions are read anew at every step, by text encoders that change."""
    return config.train_text or config.new_tokens > 0


class Learning:
    """What learns: layers of the base and, where asked for, a new word.

    Attributes:
        parts: The parts of the base whose layers learn.
        word: The new word.
        parameters: Everything that learns.
        rates: What the learning rate of each parameter is multiplied by.
    """

    def __init__(self, config: StyleConfig, base: Base, trigger: str) -> None:
        """The base's layers with changes that do nothing yet."""
        self.parts = base.parts if config.train_text else {"unet": base.unet}
        count = config.new_tokens
        self.word = NewWord(base.parts, base.tokenizers, trigger, count) if count else None
        change = lora_config(config, base)
        self.parameters = inject(self.parts, change)
        self.rates = rates(self.parts, change)
        if self.word is not None:
            self.parameters += self.word.parameters()
            self.rates += [1.0 if config.optimizer == "prodigy" else TOKEN_RATE] * len(self.word.rows)

    def adapter(self) -> Adapter:
        """What was learnt, as it is now."""
        adapter = collect(self.parts)
        return adapter if self.word is None else replace(adapter, extras=self.word.extras())

    def end(self) -> None:
        """Leave the base as it was, but for new words in its tables."""
        detach(self.parts)
        if self.word is not None:
            self.word.detach()


def to_learn_from(config: StyleConfig) -> PictureSet:
    """The pictures of the data folder; with their mirror images and those of what shall stay, where asked for."""
    pictures = read_pictures(config.data, trigger=config.trigger, holdout=config.holdout, alpha_mask=config.alpha_mask)
    train = pictures.train
    if config.prior == "base" and not pictures.trigger:
        raise DataError("--prior base keeps the base's answers to captions without the trigger; give a --trigger")
    if config.new_tokens and not pictures.trigger:
        raise DataError("--new-tokens are learnt for the trigger; give a --trigger")
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
        keep_captions=learns_words(config) or wording is not None,
        prior_weight=config.prior_weight,
        plain_of=(pictures.trigger or "") if config.prior == "base" else None,
        cache=Cache(config.cache),
        quiet=not accelerator.is_main_process,
    )
    stream = partial(StyleBatches, timesteps=len(schedule), seed=config.seed, device=accelerator.device)
    samples = stream(
        encode(base, pictures.train, how),
        wording=wording,
        noise_offset=config.noise_offset,
        input_perturbation=config.input_perturbation,
    )
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


def diffusion_loss(config: StyleConfig, base: Base, schedule: NoiseSchedule, learning: Learning) -> DiffusionLoss:
    """The loss that holds every module with trained weights."""
    if config.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
        base.unet.train()  # diffusers recomputes in training mode only; Stable Diffusion has no dropout
    if config.compile:
        base.unet.compile()
    encoders = nn.ModuleDict({name: part for name, part in learning.parts.items() if name != "unet"})
    word = learning.word
    if word is not None:
        encoders["new word"] = word

    def encode_text(captions: Sequence[str]) -> TextStates:
        return base.encode_text(captions if word is None else [word.spell(caption) for caption in captions])

    return DiffusionLoss(
        base.unet,
        schedule,
        objective=config,
        encode_text=encode_text,
        encoders=encoders,
        prior_weight=config.prior_weight,
        silenced=partial(silenced, learning.parts),
    )


def sampler(
    config: StyleConfig,
    base: Base,
    prompts: Sequence[str],
    learning: Learning,
    made: dict[str, str],
    folder: Path,
    accelerator: Accelerator,
) -> Callable[[int], None] | None:
    """What draws sample pictures and keeps the adapter that draws them beside them."""
    if not config.sample_every or config.resolution is None:
        return None
    samples = SampleSheet(
        base, prompts, folder, seed=config.seed, resolution=config.resolution, fresh=not config.resume
    )

    def sample(step: int) -> None:
        with accelerator.autocast():
            samples(step)
        if step:
            path = folder / "samples" / f"{step:06}.safetensors"
            save_adapter(with_step(learning.adapter(), made, step), path, format=config.format)

    return sample


def shown_prompts(config: StyleConfig, pictures: PictureSet) -> tuple[str, ...]:
    """What sample pictures show: the prompts asked for, else captions of held-out pictures."""
    shown = (picture for picture in (*pictures.held_out, *pictures.train) if not picture.prior)
    return config.sample_prompts or tuple(dict.fromkeys(picture.caption for picture in shown))[:4]


def draw_choices(config: StyleConfig, base: Base, prompt: str, folder: Path) -> None:
    """Draw the sheet of the adapters kept on the way, each at several weights."""
    assert config.resolution is not None  # filled() was asked
    picture = choices(base, folder / "samples", prompt, seed=config.seed, resolution=config.resolution)
    write_whole(folder / "choices.png", png(picture))


def identity(config: StyleConfig, base: Base, pictures: PictureSet) -> dict[str, object]:
    """What makes this run this run, and no other: a checkpoint of another is not continued."""
    mine = {name: value for name, value in asdict(config).items() if name not in MAY_CHANGE and value is not None}
    mine["keeps the base's answers"] = config.prior == "base"
    return mine | {"base fingerprint": base.fingerprint, "data fingerprint": pictures.fingerprint}


def results(learning: Learning, fitted: Fitted) -> dict[str, tuple[Adapter, int]]:
    """The adapter after the last step and the best one on held-out pictures, each with its number of steps."""
    found = {"last": (learning.adapter(), len(fitted.history.losses))}
    if fitted.best is not None and fitted.history.best_step is not None:
        put(learning.parameters, fitted.best)
        found["best"] = (learning.adapter(), fitted.history.best_step)
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


def save(
    config: StyleConfig,
    found: dict[str, tuple[Adapter, int]],
    fitted: Fitted,
    made: dict[str, str],
    output: Path,
    folder: Path,
) -> None:
    """Write the adapters, the loss curve, its numbers and a model card; last what went_on_from() looks for."""
    history = fitted.history
    places = {output: found.get(config.keep, found["last"])}
    places |= {folder / f"{name}.safetensors": found[name] for name in ("best", "last") if name in found}
    for path, (adapter, step) in places.items():
        save_adapter(with_step(adapter, made, step), path, format=config.format)
    write_whole(folder / "loss.png", png(loss_curve(history.losses, history.validation)))
    write_whole(folder / "history.json", (json.dumps(fitted.numbers()) + "\n").encode())
    write_card(output, licence_of(config.data))
    logger.info("wrote %s; loss curve and samples are in %s", output, folder)


def with_step(adapter: Adapter, made: dict[str, str], step: int) -> Adapter:
    """The adapter with the header of this run after so many steps."""
    return replace(adapter, metadata=made | {"lora_vision.step": str(step), "ss_steps": str(step)})


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of `lora-vision train style` with these arguments (default: the program's own)."""
    from lora_vision.cli import main as command

    return command(["train", "style", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
