"""What the commands for vision transformers do: settings in, (what to tell a person, what to tell a program) out.

Torch sleeps until a command runs: everything heavy is imported by its function.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_vision.vit import settings as s


def classify(config: s.ClassifyConfig) -> tuple[str, Any]:
    """The most probable labels of each picture, by each adapter."""
    from lora_vision.data import open_picture
    from lora_vision.vit.backbone import load_backbone
    from lora_vision.vit.classifier import load_classifier, open_domain, ranked
    from lora_vision.vit.domains import Domains
    from lora_vision.vit.pictures import picture_files

    files = picture_files(config.pictures)
    pictures = (open_picture(file) for file in files)
    if len(config.adapter) == 1:
        classifier, domain = load_classifier(config.adapter[0], config.base)
        name = Path(config.adapter[0]).stem
        told = {name: ranked(classifier.answers(pictures, config.batch_size), domain, config.top)}
    else:
        domains = Domains(load_backbone(config.base or open_domain(config.adapter[0])[1].base))
        for adapter in config.adapter:
            domains.load(adapter, Path(adapter).stem)
        logits = domains.answer_all(pictures, config.batch_size)
        told = {name: ranked(logits[name], domains.domains[name], config.top) for name in logits}
    found = [
        {"file": file, "adapter": name, "answers": rows[at]}
        for at, file in enumerate(files)
        for name, rows in told.items()
    ]
    lines = []
    for one in found:
        by = f" ({one['adapter']})" if len(told) > 1 else ""
        answers: Any = one["answers"]
        lines.append(f"{one['file']}{by}: " + ", ".join(f"{a['label']} {a['probability']:.2f}" for a in answers))
    return "\n".join(lines), found


def evaluate(config: s.EvaluateConfig) -> tuple[str, Any]:
    """How good an adapter is on labelled pictures."""
    from lora_vision.errors import DataError
    from lora_vision.vit.classifier import load_classifier
    from lora_vision.vit.evaluation import evaluate
    from lora_vision.vit.pictures import read_dataset

    classifier, domain = load_classifier(config.adapter, config.base)
    found = read_dataset(config.data, labels=domain.labels)
    split = config.split
    if split == "auto":
        split = "test" if found.of("test") else "all"
    pictures = found.pictures if split == "all" else found.of(split)
    if not pictures:
        raise DataError(f"{config.data} has no pictures for {split}; choose another --split")
    folder = Path(config.output)
    numbers = evaluate(classifier, domain, pictures, folder, config.batch_size).summary()
    text = ", ".join(f"{name} {value:.3f}" for name, value in numbers.items())
    return f"{len(pictures)} pictures: {text}; more in {folder}", {
        "pictures": len(pictures),
        "folder": folder,
        **numbers,
    }


def export(config: s.ExportConfig) -> tuple[str, Any]:
    """The folder or file that was written."""
    from lora_vision.vit.export import export_folder, export_onnx

    if config.output.endswith(".onnx"):
        path, away = export_onnx(config.adapter, config.output, config.base)
        return f"wrote {path}; its logits are within {away:.1e} of torch's", {"file": path, "difference": away}
    path = export_folder(config.adapter, config.output, config.base)
    return f"wrote {path}: AutoModelForImageClassification.from_pretrained opens it", {"folder": path}


def compare_methods(config: s.CompareMethodsConfig) -> tuple[str, Any]:
    """Which method to take for these pictures, and the page that says why."""
    from dataclasses import asdict

    from lora_vision.vit.methods import choose, compare_methods

    runs, page = compare_methods(config)
    chosen, reason = choose(runs)
    told = {"page": page, "chosen": chosen, "reason": reason, "runs": [asdict(run) for run in runs]}
    return f"{chosen}: {reason}\nwrote {page}", told
