"""A folder that says how good a classifier is on labelled pictures: numbers, plots, predictions, worst mistakes."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from lora_vision.sheet import sheet
from lora_vision.vit.classifier import Classifier, Domain, probabilities
from lora_vision.vit.metrics import Metrics, measure
from lora_vision.vit.pictures import Labelled, open_all
from lora_vision.vit.plots import confusion_matrix, reliability_plot

WORST = 24
ACROSS = 6


def evaluate(
    classifier: Classifier, domain: Domain, pictures: Sequence[Labelled], folder: Path, batch_size: int = 32
) -> Metrics:
    """The metrics on these pictures; afterwards ``folder`` holds them and what they come from.

    ``metrics.json``, ``confusion.png``, ``reliability.png``, ``predictions.csv`` and, if there are any, the most
    confident wrong answers in ``mistakes.png``.
    """
    logits = classifier.answers(open_all(pictures), batch_size)
    labels = torch.tensor([picture.label for picture in pictures])
    found = measure(logits, labels, domain.temperature)
    folder.mkdir(parents=True, exist_ok=True)
    _write_numbers(found, domain, len(pictures), folder / "metrics.json")
    confusion_matrix(found.confusion, domain.labels).save(folder / "confusion.png")
    title = f"expected calibration error {found.ece:.3f}, temperature {domain.temperature:.2f}"
    reliability_plot(found.bins, title).save(folder / "reliability.png")
    _write_predictions(logits, pictures, domain, folder / "predictions.csv")
    mistakes = mistakes_sheet(logits, pictures, domain)
    (folder / "mistakes.png").unlink(missing_ok=True)
    if mistakes is not None:
        mistakes.save(folder / "mistakes.png")
    return found


def mistakes_sheet(logits: Tensor, pictures: Sequence[Labelled], domain: Domain) -> Image.Image | None:
    """The most confident wrong answers on one page, the worst first; None where every answer is right."""
    confidence, answers = probabilities(logits, domain.temperature).max(-1)
    wrong = [at for at, picture in enumerate(pictures) if int(answers[at]) != picture.label]
    worst = sorted(wrong, key=lambda at: -float(confidence[at]))[:WORST]
    if not worst:
        return None
    side = 160
    rows: list[list[Image.Image]] = []
    captions: list[str] = []
    for start in range(0, len(worst), ACROSS):
        chosen = worst[start : start + ACROSS]
        line = [image.resize((side, side)) for image in open_all(pictures[at] for at in chosen)]
        rows.append(line + [Image.new("RGB", (side, side), "white")] * (ACROSS - len(line)))
        told = [
            f"{at + start + 1}: {domain.labels[pictures[row].label]}, not {domain.labels[int(answers[row])]}"
            for at, row in enumerate(chosen)
        ]
        captions.append("\n".join(told))
    return sheet(rows, captions, [""] * ACROSS)


def _write_numbers(found: Metrics, domain: Domain, pictures: int, path: Path) -> None:
    """Numbers as JSON, which knows no NaN."""

    def plain(values: Sequence[float]) -> list[float | None]:
        return [round(value, 4) if math.isfinite(value) else None for value in values]

    by_class = zip(domain.labels, plain(found.precision), plain(found.recall), plain(found.f1), strict=True)
    content = {
        "pictures": pictures,
        **found.summary(),
        "temperature": round(domain.temperature, 4),
        "classes": {name: {"precision": p, "recall": r, "f1": f} for name, p, r, f in by_class},
        "confusion": found.confusion,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def _write_predictions(logits: Tensor, pictures: Sequence[Labelled], domain: Domain, path: Path) -> None:
    """One row a picture: its file, the right label, the answer, its probability, and every class's."""
    shares = probabilities(logits, domain.temperature)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "label", "answer", "probability", *(f"p({name})" for name in domain.labels)])
        for picture, row in zip(pictures, shares, strict=True):
            answer = int(row.argmax())
            numbers = [f"{value:.4f}" for value in (row[answer], *row)]
            table.writerow([picture.path, domain.labels[picture.label], domain.labels[answer], *numbers])
