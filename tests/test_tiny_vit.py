"""The embedded vision transformer: what is shipped is whole and sees, and its making repeats and resumes."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import ViTForImageClassification

import lora_vision
from lora_vision.data import open_picture, read_pictures
from lora_vision.tiny import classifier
from lora_vision.tiny.classifier import KEPT, telling_patches, train_vit, write_vit
from lora_vision.tiny.drawings import augmented, composed
from lora_vision.vit.backbone import EMBEDDED, load_backbone
from lora_vision.vit.settings import VitConfig
from train_scripts.train_vit import run

PACKAGE = Path(lora_vision.__file__).parent
FASHION = PACKAGE / "vit" / "fashion"


def test_plain_transformers_opens_it_and_it_is_small() -> None:
    folder = EMBEDDED["tiny-vit"]
    assert sum(file.stat().st_size for file in folder.rglob("*")) <= 12_000_000
    model, found = ViTForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert len(model.config.id2label) == model.classifier.out_features


def test_it_names_drawings_in_a_style_it_never_saw() -> None:
    backbone = load_backbone("tiny-vit")
    assert backbone.old_head is not None
    pictures, labels = read_pictures(PACKAGE / "pictures" / "blueprint", holdout=0).train, backbone.old_labels
    nouns = [p.caption.split(",")[0].removeprefix("an ").removeprefix("a ") for p in pictures]
    known = [(p, labels.index(noun)) for p, noun in zip(pictures, nouns, strict=True) if noun in labels]
    seen = torch.stack([backbone.preprocessing.cut(open_picture(p.path)) for p, _ in known]).float() / 255
    with torch.no_grad():
        answers = backbone.old_head(backbone.features(seen)).argmax(1)
    right = [int(answer) == label for answer, (_, label) in zip(answers, known, strict=True)]
    assert len(right) >= 20 and sum(right) / len(right) > 0.3  # of 820 names


def test_a_few_photographs_of_each_class_teach_it_clothes(tmp_path: Path) -> None:
    """Another domain, photographs instead of drawings: ten classes, chance is 0.1."""
    output = tmp_path / "fashion.safetensors"
    run(VitConfig(data=str(FASHION), output=str(output), few=8, steps=30, batch_size=16, validate_every=15))
    table = (tmp_path / "fashion-training" / "test" / "predictions.csv").read_text().splitlines()[1:]
    rows = [line.split(",") for line in table]
    assert len(rows) == 1000 and sum(row[1] == row[2] for row in rows) > 500


def test_no_drawing_is_lost_on_its_ground() -> None:
    rgba = torch.zeros(64, 4, 64, 64)
    rgba[:, 3, 20:44, 20:44] = 1
    rgba[:, :3, 20:44, 20:44] = 0.1
    pixels = augmented(rgba, torch.Generator().manual_seed(0))
    assert pixels.shape == (64, 3, 64, 64) and pixels.abs().max() <= 1
    inside, outside = pixels[..., 28:36, 28:36].mean((1, 2, 3)), pixels[..., :4, :4].mean((1, 2, 3))
    assert (inside - outside).abs().min() > 0.1


def test_patches_that_show_something_are_kept() -> None:
    rgba = torch.zeros(32, 4, 64, 64)
    rgba[:, 3, 16:48, 16:48] = torch.rand(32, 1, 1)
    rgba[:, 3, 16:48:2, 16:48] = 0
    kept = telling_patches(composed(rgba, torch.ones(32, 3)), torch.Generator().manual_seed(0))
    assert kept.shape == (32, KEPT) and all(len(set(row)) == KEPT for row in kept.tolist())
    middle = [8 * row + column for row in range(2, 6) for column in range(2, 6)]
    assert torch.isin(kept, torch.tensor(middle)).float().sum(1).mean() > 12  # of 16


def test_its_making_repeats_and_goes_on_where_it_broke_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = np.random.default_rng(0)
    drawn = {
        "pixels": numbers.integers(0, 255, (6, 64, 64, 4), dtype=np.uint8),
        "subjects": np.array([0, 0, 1, 1, 2, 2]),
        "held_out": np.array([False, False, False, False, False, True]),
        "names": np.array(["fox", "red-apple", "car"]),
    }
    monkeypatch.setattr(classifier, "BATCH", 2)

    def made(work: Path) -> dict[str, Tensor]:
        train_vit(work, 4, 2)
        write_vit(work, work / "vit")
        state: dict[str, Tensor] = ViTForImageClassification.from_pretrained(work / "vit").state_dict()
        return state

    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "drawings.npz", **drawn)
    rates, rate = count(1), classifier.rate

    def interrupted(step: int, total: int) -> float:
        if next(rates) == 3:
            raise KeyboardInterrupt
        return rate(step, total)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(classifier.Run, "due", lambda self: True)
        patch.setattr(classifier, "rate", interrupted)
        train_vit(tmp_path / "broken", 4, 2)
    whole, broken = made(tmp_path / "whole"), made(tmp_path / "broken")
    assert all(torch.equal(value, broken[name]) for name, value in whole.items())
    assert load_backbone(tmp_path / "whole" / "vit").old_labels == ("fox", "red apple", "car")
