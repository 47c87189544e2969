"""The parts of the ViT job: labelled pictures, variations, the loss, the numbers and their definitions."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path

import pytest
import torch
from sights import picture, write_classes
from torch import Tensor

from lora_vision.errors import DataError
from lora_vision.vit.augment import DRAWS, LEVELS, level, varied
from lora_vision.vit.fitting import Batch, ClassificationLoss, Stream, class_weights
from lora_vision.vit.methods import Run, choose, write
from lora_vision.vit.metrics import auroc, fit_temperature, interval, measure, reliability
from lora_vision.vit.pictures import Dataset, fold, read_dataset, split_dataset
from lora_vision.vit.preprocessing import Preprocessing
from lora_vision.vit.settings import CompareMethodsConfig


def splits(found: Dataset) -> dict[str, str]:
    return {picture.path.name + str(picture.label): picture.split for picture in found.pictures}


def test_class_folders_are_split_by_class_and_content(tmp_path: Path) -> None:
    found = read_dataset(write_classes(tmp_path, 10))
    assert found.labels == ("low", "mid", "top") and len(found.pictures) == 30 and not found.problems
    done = split_dataset(found, 0.2)
    assert done.counts("train") == [8, 8, 8] and done.counts("val") == [2, 2, 2]
    for file in (tmp_path / "low").iterdir():
        file.rename(file.with_name(f"x{file.name}"))
    assert split_dataset(read_dataset(tmp_path), 0.2).fingerprint == done.fingerprint
    assert splits(split_dataset(found, 0.2, seed=1)) != splits(done)
    few = split_dataset(found, 0.2, few=3)
    assert few.counts("train") == [3, 3, 3] and few.counts("val") == [2, 2, 2]
    assert split_dataset(found, 0.0).counts("val") == [0, 0, 0]


def test_folds_cover_every_picture_once(tmp_path: Path) -> None:
    found = read_dataset(write_classes(tmp_path, 7))
    tested = [fold(found, number, 3).of("test") for number in range(3)]
    digests = [picture.digest for part in tested for picture in part]
    assert sorted(digests) == sorted(picture.digest for picture in found.pictures)
    assert all(2 <= count <= 3 for number in range(3) for count in fold(found, number, 3).counts("test"))


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_tables_say_label_and_split(name: str, tmp_path: Path) -> None:
    rows = [("a", "cat", "train"), ("b", "dog", "train"), ("c", "dog", "validation"), ("d", "cat", "test")]
    for at, (stem, _, _) in enumerate(rows):
        picture(at % 3, at).save(tmp_path / f"{stem}.png")
    lines = ["file_name,label,split"] + [f"{stem}.png,{label},{split}" for stem, label, split in rows]
    if name.endswith("jsonl"):
        lines = [json.dumps({"file_name": f"{s}.png", "label": label, "split": split}) for s, label, split in rows]
    (tmp_path / name).write_text("\n".join(lines))
    for place in (tmp_path, tmp_path / name):
        done = split_dataset(read_dataset(place), 0.5)
        assert [(picture.path.stem, picture.split) for picture in done.pictures] == [
            ("a", "train"), ("b", "train"), ("c", "val"), ("d", "test")]  # fmt: skip
        assert done.labels == ("cat", "dog")


def test_what_is_wrong_with_pictures_is_told_and_left_out(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", 4)
    write_classes(tmp_path / "test", 3, first=3)  # the fourth training picture of each class is also a test picture
    (tmp_path / "train" / "low" / "broken.png").write_bytes(b"no picture")
    both = (tmp_path / "train" / "low" / "0.png").read_bytes()
    (tmp_path / "train" / "mid" / "also-low.png").write_bytes(both)
    (tmp_path / "train" / "top" / "again.png").write_bytes((tmp_path / "train" / "top" / "0.png").read_bytes())
    found = read_dataset(tmp_path)
    told = "\n".join(found.problems)
    assert "1 unreadable pictures left out: broken.png" in told
    assert "2 equal pictures under different labels left out: 0.png (low), also-low.png (mid)" in told
    assert "3 pictures that also lie in a split that is measured on left out: 3.png, 3.png, 3.png" in told
    assert "1 pictures are there more than once" in told
    assert split_dataset(found, 0.0).counts("train") == [2, 3, 4] and found.counts("test") == [3, 3, 3]


def test_data_that_cannot_be_learnt_from_is_refused(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "nowhere", "neither a folder nor a table"),
        (write_classes(tmp_path / "one", 2, classes=1), r"1 class \(low\); at least 2"),
    ):
        with pytest.raises(DataError, match=message):
            read_dataset(path)
    empty = write_classes(tmp_path / "empty", 2)
    (empty / "hollow").mkdir()
    with pytest.raises(DataError, match="class 'hollow' .* has no pictures"):
        read_dataset(empty)
    (empty / "hollow" / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match="no readable picture of class hollow"):
        read_dataset(empty)
    mixed = write_classes(tmp_path / "mixed" / "train", 2).parent
    (mixed / "stray").mkdir()
    with pytest.raises(DataError, match=r"splits \(train\) beside other folders \(stray\)"):
        read_dataset(mixed)
    (tmp_path / "t.csv").write_text("file_name,kind\na.png,b\n")
    with pytest.raises(DataError, match="row 1 lacks file_name or label"):
        read_dataset(tmp_path / "t.csv")


@pytest.mark.parametrize("name", LEVELS)
def test_variations_keep_shape_range_and_rows_apart(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels, draws = torch.rand(6, 3, 16, 16, generator=generator), torch.rand(6, DRAWS, generator=generator)
    targets = torch.eye(6)
    seen, told = varied(pixels, targets, LEVELS[name], draws)
    assert seen.shape == pixels.shape and seen.min() >= 0 and seen.max() <= 1
    assert torch.allclose(told.sum(1), torch.ones(6))
    assert torch.equal(seen, pixels) == (name == "none")
    half, shares = varied(pixels[2:4], targets[2:4], LEVELS[name], draws[2:4])
    assert torch.equal(half, seen[2:4]) and torch.equal(shares, told[2:4])


def test_fewer_pictures_are_varied_more() -> None:
    assert [level("auto", count) for count in (5, 100, 1000)] == [LEVELS[n] for n in ("strong", "medium", "light")]


def test_a_stream_shows_every_picture_once_an_epoch_whoever_asks(tmp_path: Path) -> None:
    found = split_dataset(read_dataset(write_classes(tmp_path, 4)), 0.0)
    stream = Stream(found.of("train"), 3, Preprocessing((16, 16), (16, 16)), variation=LEVELS["strong"], seed=3)
    whole = stream(4, 4)
    parts = [stream(4, 2), stream(6, 2)]
    assert torch.equal(whole.pixels, torch.cat([part.pixels for part in parts]))
    plain = Stream(found.of("train"), 3, Preprocessing((16, 16), (16, 16)), seed=3)
    assert torch.equal(plain(0, 12).targets.sum(0), torch.full((3,), 4.0))
    assert sum(len(batch) for batch in plain.fixed(5)) == 12


class Given(torch.nn.Module):
    """Answers with the logits it is given as pixels."""

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels


def test_the_loss_is_smoothed_cross_entropy_with_classes_weighed() -> None:
    logits, labels = (
        torch.randn(12, 3, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0] * 6 + [1] * 4 + [2] * 2),
    )
    batch = Batch(logits, torch.eye(3)[labels])
    mine = ClassificationLoss(Given(), 0.1)(batch)  # type: ignore[arg-type]
    assert torch.allclose(mine, torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1))
    weights = class_weights([6, 4, 2])
    weighed = ClassificationLoss(Given(), 0.0, weights)(batch)  # type: ignore[arg-type]
    each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    by_class = torch.stack([each[labels == at].mean() for at in range(3)])
    assert torch.allclose(weighed, by_class.mean()) and torch.allclose((batch.targets @ weights).mean(), torch.ones(()))


def test_metrics_are_what_their_names_say() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(60, 4, generator=generator), torch.randint(0, 3, (60,), generator=generator)
    found = measure(logits, labels)
    answers = logits.argmax(1)
    assert found.accuracy == pytest.approx(float((answers == labels).double().mean()))
    for at in range(4):
        right = int(((answers == at) & (labels == at)).sum())
        called, there = int((answers == at).sum()), int((labels == at).sum())
        assert found.precision[at] == pytest.approx(right / called)
        assert math.isnan(found.recall[at]) if not there else found.recall[at] == pytest.approx(right / there)
        assert found.f1[at] == pytest.approx(2 * right / (called + there))
        assert found.confusion[at][at] == right
    shares = logits.double().softmax(-1)
    pairs = []
    for at in range(3):
        inside, outside = shares[labels == at, at], shares[labels != at, at]
        wins = [float(a > b) + 0.5 * float(a == b) for a, b in product(inside, outside)]
        pairs.append(sum(wins) / len(wins))
    assert auroc(shares, labels) == pytest.approx(sum(pairs) / 3)
    assert auroc(torch.full((4, 2), 0.5), torch.tensor([0, 1, 1, 0])) == 0.5


def test_calibration_counts_bins_and_the_temperature_is_the_likeliest() -> None:
    sure, right = torch.tensor([0.05, 0.95, 0.96, 1.0]), torch.tensor([False, True, False, True])
    bins = reliability(sure, right, 10)
    assert bins[0][0] == 1 and bins[9] == (3, pytest.approx(0.97), pytest.approx(2 / 3)) and bins[5] == (0, 0.0, 0.0)
    generator = torch.Generator().manual_seed(2)
    true = torch.randn(4000, 3, generator=generator)
    labels = torch.multinomial(true.softmax(-1), 1, generator=generator).squeeze(1)
    assert fit_temperature(3 * true, labels) == pytest.approx(3, rel=0.1)
    assert measure(3 * true, labels).ece > 3 * measure(3 * true, labels, 3.0).ece
    assert interval([0.5, 0.6, 0.7]) == (pytest.approx(0.6), pytest.approx(4.303 * 0.1 / 3**0.5))


def test_the_cheapest_method_within_a_point_is_chosen_and_the_page_says_so(tmp_path: Path) -> None:
    def runs(**accuracies: float) -> list[Run]:
        trained = {"linear probe": 10, "LoRA rank 4": 100, "full fine-tuning": 9000}
        return [
            Run(name, seed, accuracy + 0.001 * seed, accuracy, 0.1, 2.0, 2**20, trained[name], 4 * trained[name], 1.5)
            for name, accuracy in zip(trained, accuracies.values(), strict=True)
            for seed in range(2)
        ]

    assert choose(runs(probe=0.70, lora=0.80, full=0.805))[0] == "LoRA rank 4"
    assert choose(runs(probe=0.80, lora=0.80, full=0.805))[0] == "linear probe"
    chosen, reason = choose(runs(probe=0.70, lora=0.80, full=0.85))
    assert chosen == "full fine-tuning" and "wins here by 5.0 points" in reason
    found = read_dataset(write_classes(tmp_path / "data", 2))
    write(runs(probe=0.70, lora=0.80, full=0.803), found, CompareMethodsConfig(data="data"), tmp_path)
    page = (tmp_path / "methods.md").read_text()
    assert "**LoRA rank 4**" in page and "| full fine-tuning | 0.80" in page and (tmp_path / "methods.png").is_file()
    assert len(json.loads((tmp_path / "methods.json").read_text())["runs"]) == 6
