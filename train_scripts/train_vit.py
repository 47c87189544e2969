"""Adapt a vision transformer to a domain: pictures in class folders in, one file with adapter and head out.

    lora-vision train vit --data DIR --output fungi.safetensors
    accelerate launch "$(lora-vision where train_vit)" --data DIR --output fungi.safetensors

Beside fungi.safetensors lies the folder fungi-training: the loss curve (loss.png), the numbers (history.json), what it
answers on the pictures it never learnt from (validation/, and test/ where test pictures are given), and the checkpoint
from which --resume continues.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import nn

import lora_vision
from lora_vision.charts import loss_curve
from lora_vision.config import LoraConfig
from lora_vision.devices import make_accelerator, precision_of, weight_dtype
from lora_vision.inject import collect
from lora_vision.tools.card import licence_of, write_card
from lora_vision.tools.history import went_on_from
from lora_vision.training import Fitted, Job, fit, put
from lora_vision.vit.augment import level
from lora_vision.vit.backbone import Backbone, load_backbone
from lora_vision.vit.classifier import Classifier, Domain, load_classifier, save, with_head
from lora_vision.vit.evaluation import evaluate, mistakes_sheet
from lora_vision.vit.fitting import ClassificationLoss, Stream, class_weights, learners
from lora_vision.vit.metrics import fit_temperature, measure
from lora_vision.vit.pictures import Dataset, open_all, read_dataset, split_dataset
from lora_vision.vit.ranks import GENEROUS, cut
from lora_vision.vit.settings import VitConfig
from lora_vision.whole import check_writable

logger = logging.getLogger(__name__)

NOT_IN_FILE = ("data", "output", "base", "resume", "checkpoint_every", "sample_every", "tracker")
MAY_CHANGE = (*NOT_IN_FILE, "steps", "validate_every", "keep", "patience", "energy")


def run(config: VitConfig) -> Path:
    """The path of the adapter, trained as the configuration says.

    Raises:
        LoraVisionError: Where the pictures, the base, the settings or the place to write cannot be used (found before
            training), or training diverges.
    """
    output = Path(config.output).expanduser()
    folder = output.with_name(f"{output.stem}-training")
    accelerator = make_accelerator(config, folder=folder)
    check_writable(output, folder)
    pictures = split_dataset(read_dataset(config.data), config.holdout, config.seed, config.few)
    backbone = load_backbone(config.base)
    config = replace(config.filled(len(pictures.of("train")), backbone.width), precision=precision_of(accelerator))

    classifier, loss, parameters, rates = learner(config, backbone, pictures, accelerator)
    samples, held_out = streams(config, backbone, pictures, accelerator)
    job = Job(
        loss=loss,
        parameters=parameters,
        batch=samples,
        held_out=held_out.fixed(config.batch_size or 1),
        sample=sampler(config, classifier, pictures, folder),
        folder=folder,
        identity=identity(config, backbone, pictures),
        rates=rates,
        patience=config.patience,
    )
    fitted = fit(job, config, accelerator)
    if accelerator.is_main_process:
        keep_best(config, parameters, fitted)
        finish(config, classifier.cpu().float(), pictures, fitted, output, folder)
    accelerator.wait_for_everyone()
    return output


def learner(
    config: VitConfig, backbone: Backbone, pictures: Dataset, accelerator: Accelerator
) -> tuple[Classifier, ClassificationLoss, list[nn.Parameter], list[float]]:
    """The classifier with adapters and a fresh head, its loss, what learns, and how fast."""
    classifier = Classifier(backbone, len(pictures.labels), config.seed)
    if config.gradient_checkpointing and hasattr(classifier.body, "gradient_checkpointing_enable"):
        cast(Any, classifier.body).gradient_checkpointing_enable({"use_reentrant": False})
    classifier.body.to(accelerator.device, weight_dtype(accelerator))
    classifier.head.to(accelerator.device)
    rank = config.rank if isinstance(config.rank, int) else GENEROUS
    lora = LoraConfig(rank=rank, alpha=config.alpha, targets=config.targets, seed=config.seed)
    head = (config.head_learning_rate or 1.0) / (config.learning_rate or 1.0)
    parameters, rates = learners(classifier, "lora", lora, {"head": head})
    weights = class_weights(pictures.counts("train")) if config.class_weights else None
    loss = ClassificationLoss(classifier, config.label_smoothing, weights).to(accelerator.device).train()
    return classifier, loss, parameters, rates


def streams(
    config: VitConfig, backbone: Backbone, pictures: Dataset, accelerator: Accelerator
) -> tuple[Stream, Stream]:
    """The training samples, varied, and the validation pictures, as they are."""
    train, classes = pictures.of("train"), len(pictures.labels)
    variation = level(config.augment, len(train) / classes)
    device = accelerator.device
    samples = Stream(
        train,
        classes,
        backbone.preprocessing,
        variation=variation,
        mirror=config.mirror,
        seed=config.seed,
        device=device,
    )
    return samples, Stream(pictures.of("val"), classes, backbone.preprocessing, device=device)


def sampler(config: VitConfig, classifier: Classifier, pictures: Dataset, folder: Path) -> Callable[[int], None] | None:
    """What draws the held-out pictures that the classifier gets most wrong."""
    held_out = pictures.of("val")
    if not config.sample_every or not held_out:
        return None
    domain = domain_of(config, classifier.backbone, pictures)

    def sample(step: int) -> None:
        page = mistakes_sheet(classifier.answers(open_all(held_out)), held_out, domain)
        if page is not None:
            page.save(folder / f"mistakes-{step:06}.png")

    return sample


def domain_of(config: VitConfig, backbone: Backbone, pictures: Dataset) -> Domain:
    """What the head will mean."""
    base = backbone.source if not Path(backbone.source).exists() else Path(backbone.source).name
    return Domain(pictures.labels, base, backbone.fingerprint, backbone.preprocessing)


def identity(config: VitConfig, backbone: Backbone, pictures: Dataset) -> dict[str, object]:
    """What makes this run this run, and no other: a checkpoint of another is not continued."""
    mine = {name: value for name, value in asdict(config).items() if name not in MAY_CHANGE and value is not None}
    return mine | {"base fingerprint": backbone.fingerprint, "data fingerprint": pictures.fingerprint}


def keep_best(config: VitConfig, parameters: Sequence[nn.Parameter], fitted: Fitted) -> None:
    """Go back to the weights that were best on the held-out pictures, if so asked."""
    if config.keep == "best" and fitted.best is not None:
        put(parameters, fitted.best)


def finish(
    config: VitConfig, classifier: Classifier, pictures: Dataset, fitted: Fitted, output: Path, folder: Path
) -> None:
    """Write the adapter with its head, its loss curve, numbers, model card, and its answers on pictures held out."""
    history = fitted.history
    adapter, held_out = collect(classifier.backbone.parts), pictures.of("val")
    domain = domain_of(config, classifier.backbone, pictures)
    ranks: dict[str, int] = {}
    if config.rank == "auto":
        adapter, ranks = cut(adapter, classifier, held_out, config.energy)
    if held_out:
        logits = classifier.answers(open_all(held_out))
        labels = torch.tensor([picture.label for picture in held_out])
        temperature = fit_temperature(logits, labels)
        domain = replace(domain, temperature=temperature, numbers=measure(logits, labels, temperature).summary())
    best = config.keep == "best" and fitted.best is not None
    made = metadata(config, pictures, history.best_step if best else len(history.losses))
    made |= went_on_from(output, output, fitted.extends, config.steps)
    path = save(with_head(adapter, classifier.head, domain, made), output)
    reloaded, domain = load_classifier(path, backbone=load_backbone(config.base))
    for split, name in (("val", "validation"), ("test", "test")):
        if pictures.of(split):
            found = evaluate(reloaded, domain, pictures.of(split), folder / name)
            logger.info("%s: accuracy %.3f, calibration error %.3f", name, found.accuracy, found.ece)
    loss_curve(history.losses, history.validation).save(folder / "loss.png")
    more = {"ranks": ranks, "problems": pictures.problems, "domain": json.loads(domain.to_json())}
    (folder / "history.json").write_text(json.dumps(fitted.numbers() | more) + "\n")
    write_card(output, licence_of(config.data))
    logger.info("wrote %s; loss curve and answers are in %s", output, folder)


def metadata(config: VitConfig, pictures: Dataset, step: int | None) -> dict[str, str]:
    """How the adapter was made; neither dates nor paths: the same run gives the same file."""
    settings = {name: value for name, value in asdict(config).items() if name not in NOT_IN_FILE}
    versions = {name: version(name) for name in ("torch", "transformers", "accelerate")}
    counts = dict(zip(pictures.labels, pictures.counts("train"), strict=True))
    return {
        "lora_vision.version": lora_vision.__version__,
        "lora_vision.versions": json.dumps(versions, sort_keys=True),
        "lora_vision.config": json.dumps(settings, sort_keys=True),
        "lora_vision.data_fingerprint": pictures.fingerprint,
        "lora_vision.pictures": json.dumps(counts, sort_keys=True),
        "lora_vision.step": str(step),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of `lora-vision train vit` with these arguments (default: the program's own)."""
    from lora_vision.cli import main as command

    return command(["train", "vit", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
