"""What a linear probe, LoRA and full fine-tuning each cost and give on the user's own pictures, on one page."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from lora_vision.config import FitConfig, LoraConfig
from lora_vision.devices import make_accelerator
from lora_vision.training import Job, fit, put
from lora_vision.vit.augment import level
from lora_vision.vit.backbone import load_backbone
from lora_vision.vit.classifier import Classifier
from lora_vision.vit.fitting import Batch, ClassificationLoss, Method, Stream, class_weights, learners
from lora_vision.vit.metrics import fit_temperature, interval, measure
from lora_vision.vit.pictures import Dataset, fold, open_all, read_dataset, split_dataset
from lora_vision.vit.plots import bars
from lora_vision.vit.settings import CompareMethodsConfig, VitConfig

logger = logging.getLogger(__name__)

CLOSE = 0.01
"""Accuracies this near to the best count as equal: the cheapest of them is chosen."""


@dataclass(frozen=True)
class Run:
    """One training of one method.

    Attributes:
        method: Its name, as "LoRA rank 16".
        seed: Draws head, adapters, order and variations.
        accuracy, macro_f1, ece: On the test pictures.
        seconds: Of training.
        memory: Bytes at the peak of a training step: on a GPU as the device counts, else weights, gradients, AdamW's
            moments and what autograd keeps for the backward pass.
        trained: How many numbers learn.
        file: Bytes of what has to be kept, in fp32.
        latency: Milliseconds for one picture, alone in its batch.
    """

    method: str
    seed: int
    accuracy: float
    macro_f1: float
    ece: float
    seconds: float
    memory: int
    trained: int
    file: int
    latency: float


def compare_methods(config: CompareMethodsConfig) -> tuple[list[Run], Path]:
    """Every run, and the page written: methods.md, beside it methods.png and methods.json.

    Raises:
        LoraVisionError: The pictures or the backbone cannot be used.
    """
    accelerator = make_accelerator(FitConfig(precision=config.precision))
    found = read_dataset(config.data)
    plans: list[tuple[str, Method, int]] = [("linear probe", "probe", 1)]
    plans += [(f"LoRA rank {rank}", "lora", rank) for rank in sorted(config.ranks)]
    plans += [("full fine-tuning", "full", 1)]
    runs: list[Run] = []
    for seed in range(config.seeds):
        pictures = split_dataset(fold(found, seed, max(3, config.seeds)), config.holdout, seed, config.few)
        for name, method, rank in plans:
            runs.append(train_once(config, accelerator, pictures, name, method, rank, seed))
            logger.info("%s, seed %d: accuracy %.3f in %.0f s", name, seed, runs[-1].accuracy, runs[-1].seconds)
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    write(runs, found, config, folder)
    return runs, folder / "methods.md"


def train_once(
    config: CompareMethodsConfig,
    accelerator: Accelerator,
    pictures: Dataset,
    name: str,
    method: Method,
    rank: int,
    seed: int,
) -> Run:
    """One method trained on one split, best weights on validation kept, measured on the test pictures."""
    backbone = load_backbone(config.base)
    train, classes, device = pictures.of("train"), len(pictures.labels), accelerator.device
    settings = VitConfig(
        data=config.data, output=".safetensors", steps=config.steps, batch_size=config.batch_size, seed=seed,
        learning_rate=config.learning_rate, head_learning_rate=config.head_learning_rate, precision=config.precision,
    ).filled(len(train), backbone.width)  # fmt: skip
    rate = settings.learning_rate or 1.0
    settings = replace(settings, validate_every=max(1, (settings.steps or 1) // 10), checkpoint_every=0)
    classifier = Classifier(backbone, classes, seed).to(device)
    lora = LoraConfig(rank=rank, targets=config.targets, seed=seed)
    body = (config.full_learning_rate or rate / 4) / rate if method == "full" else 1.0
    rates = {"head": (settings.head_learning_rate or rate) / rate, "body": body}
    parameters, times = learners(classifier, method, lora, rates)
    weights = class_weights(pictures.counts("train")) if config.class_weights else None
    loss = ClassificationLoss(classifier, config.label_smoothing, weights).to(device).train()
    variation = level(config.augment, len(train) / classes)
    how = backbone.preprocessing
    samples = Stream(train, classes, how, variation=variation, mirror=config.mirror, seed=seed, device=device)
    held_out = Stream(pictures.of("val"), classes, how, device=device).fixed(settings.batch_size or 1)
    memory = step_memory(loss, samples(0, settings.batch_size or 1))
    began = time.perf_counter()
    fitted = fit(Job(loss, parameters, samples, held_out, rates=times), settings, accelerator)
    seconds = time.perf_counter() - began
    if fitted.best is not None:
        put(parameters, fitted.best)
    trained = sum(parameter.numel() for parameter in parameters)
    quality = assess(classifier, pictures)
    return Run(name, seed, *quality, seconds, memory, trained, 4 * trained, latency(classifier))


def assess(classifier: Classifier, pictures: Dataset) -> tuple[float, float, float]:
    """Accuracy, macro-F1 and calibration error on the test pictures, the temperature fitted on validation."""
    logits: dict[str, Tensor] = {}
    labels: dict[str, Tensor] = {}
    for split in ("val", "test"):
        logits[split] = classifier.answers(open_all(pictures.of(split)))
        labels[split] = torch.tensor([picture.label for picture in pictures.of(split)], dtype=torch.long)
    temperature = fit_temperature(logits["val"], labels["val"]) if len(labels["val"]) else 1.0
    found = measure(logits["test"], labels["test"], temperature)
    return found.accuracy, found.macro_f1, found.ece


def step_memory(loss: ClassificationLoss, batch: Batch) -> int:
    """Bytes at the peak of one training step; weights and gradients are afterwards what they were before."""
    if batch.pixels.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss(batch).backward()
    learning = sum(p.numel() * 4 for p in loss.parameters() if p.requires_grad)
    loss.zero_grad(set_to_none=True)
    if batch.pixels.is_cuda:
        return int(torch.cuda.max_memory_allocated() + 2 * learning)
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in loss.parameters()}
    return sum((held | kept).values()) + 3 * learning


@torch.no_grad()
def latency(classifier: Classifier, times: int = 10) -> float:
    """The median of a few milliseconds one picture takes, alone in its batch."""
    classifier.eval()
    pixels = torch.rand(1, 3, *classifier.backbone.preprocessing.size, device=classifier.head.weight.device)
    spent = []
    for _ in range(times):
        began = time.perf_counter()
        classifier(pixels).cpu()
        spent.append(1000 * (time.perf_counter() - began))
    return sorted(spent)[times // 2]


def choose(runs: Sequence[Run]) -> tuple[str, str]:
    """The method to take, and why: the one with the fewest trained numbers within a point of the best."""
    names = list(dict.fromkeys(run.method for run in runs))
    mean = {name: interval([run.accuracy for run in runs if run.method == name])[0] for name in names}
    cost = {run.method: run.trained for run in runs}
    best = max(names, key=lambda name: mean[name])
    chosen = min((name for name in names if mean[name] >= mean[best] - CLOSE), key=lambda name: cost[name])
    smaller = [name for name in names if name not in ("full fine-tuning",)]
    behind = mean["full fine-tuning"] - max(mean[name] for name in smaller) if "full fine-tuning" in mean else 0.0
    reason = f"{mean[chosen]:.3f} with {cost[chosen]:,} trained numbers; the best mean is {best}'s {mean[best]:.3f}."
    if behind > CLOSE:
        reason += f" Full fine-tuning wins here by {100 * behind:.1f} points: take it if you can keep a whole model."
    else:
        reason += " Full fine-tuning gives no more than a point here, and costs a copy of the model for each domain."
    return chosen, reason


def write(runs: Sequence[Run], found: Dataset, config: CompareMethodsConfig, folder: Path) -> None:
    """The page, its picture, and the numbers behind both."""
    names = list(dict.fromkeys(run.method for run in runs))
    chosen, reason = choose(runs)
    test = "the given test pictures" if found.of("test") else f"{max(3, config.seeds)} folds in turn"
    lines = [
        f"# Which method for {Path(config.data).name}?",
        "",
        f"**{chosen}**: {reason}",
        "",
        f"{len(found.pictures)} pictures, {len(found.labels)} classes; {config.base}; measured on {test}; "
        f"{config.seeds} seeds; mean and 95 % interval. The same steps, batches and variations for every method.",
        "",
        "| method | accuracy | macro-F1 | calibration error | seconds | memory a step | trained | file | a picture |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    means: list[float] = []
    errors: list[float] = []
    for name in names:
        mine = [run for run in runs if run.method == name]
        accuracy, half = interval([run.accuracy for run in mine])
        means.append(accuracy)
        errors.append(half)
        f1, ece, seconds, memory, latency_ = (
            sum(getattr(run, field) for run in mine) / len(mine)
            for field in ("macro_f1", "ece", "seconds", "memory", "latency")
        )
        lines.append(
            f"| {name} | {accuracy:.3f} ± {half:.3f} | {f1:.3f} | {ece:.3f} | {seconds:.0f} | {memory / 2**20:.0f} MiB "
            f"| {mine[0].trained:,} | {mine[0].file / 2**20:.2f} MiB | {latency_:.1f} ms |"
        )
    lines += ["", "![accuracy](methods.png)", ""]
    (folder / "methods.md").write_text("\n".join(lines))
    title = f"accuracy, {config.seeds} seeds, 95 % interval"
    bars(names, means, errors, title, names.index(chosen)).save(folder / "methods.png")
    rows = [asdict(run) for run in runs]
    (folder / "methods.json").write_text(
        json.dumps({"chosen": chosen, "reason": reason, "runs": rows}, indent=1) + "\n"
    )
