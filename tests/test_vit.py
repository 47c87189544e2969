"""Adapting vision transformers: every kind of model, the whole job from folders to answers, every refusal."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState
from sights import KINDS, config, picture, write_classes, write_model
from torch import nn

import lora_vision as lv
from lora_vision import names
from lora_vision.adapter import Adapter
from lora_vision.errors import AdapterError, BaseModelError, DataError
from lora_vision.targets import select
from lora_vision.tools.history import history, settings_of
from lora_vision.vit.backbone import Qkv, join_qkv, load_backbone, split_qkv
from lora_vision.vit.classifier import CARD, Classifier, batches, load_classifier, open_domain
from lora_vision.vit.domains import Domains
from lora_vision.vit.export import export_folder
from lora_vision.vit.fitting import Batch, ClassificationLoss, Stream, learners
from lora_vision.vit.pictures import read_dataset, split_dataset
from lora_vision.vit.preprocessing import Preprocessing
from lora_vision.vit.settings import VitConfig
from train_scripts.train_vit import run

ROOT = Path(__file__).parent.parent
GIVEN = ("data", "base", "output", "rank", "steps", "batch_size", "learning_rate", "validate_every", "augment", "keep")
GIVEN += ("patience", "checkpoint_every")


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate remembers the first precision it was given for the whole process."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bars")
    write_classes(folder / "train", 8)
    write_classes(folder / "test", 4, first=50)
    return folder


@pytest.fixture(scope="module")
def settings(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> VitConfig:
    return VitConfig(
        data=str(data), base=str(model), output=str(tmp_path_factory.mktemp("out") / "bars.safetensors"), rank=4,
        steps=60, batch_size=6, learning_rate=1e-2, validate_every=20, checkpoint_every=20, augment="light",
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(settings: VitConfig) -> Path:
    """An adapter that has learnt to tell the bars apart."""
    path = run(settings)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    return path


def pixels(rows: int = 4, side: int = 16) -> torch.Tensor:
    return torch.rand(rows, 3, side, side, generator=torch.Generator().manual_seed(5))


def moved(parts: dict[str, nn.Module], targets: str = "attention", seed: int = 0) -> Adapter:
    """An adapter far from zero; the model carries none afterwards."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in lv.inject(parts, lv.LoraConfig(rank=2, targets=targets)):
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    adapter = lv.collect(parts)
    lv.detach(parts)
    return adapter


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_transformer_is_adapted_under_its_true_names(kind: str, tmp_path: Path) -> None:
    backbone = load_backbone(write_model(tmp_path, kind))
    layers = names.index(backbone.parts)
    attention, qv = select("attention", layers), select("qv", layers)
    assert len(attention) == 2 * len(qv) == 8 and set(qv) < set(attention)
    assert len(select("attention+ff", layers)) == len(attention) + 4 == len(select("vit", layers))
    before = backbone.features(pixels())
    assert before.shape == (4, backbone.width)
    adapter = moved(backbone.parts, "attention+ff")
    assert torch.equal(backbone.features(pixels()), before)
    lv.attach(backbone.parts, adapter)
    assert (backbone.features(pixels()) - before).abs().max() > 1e-3
    assert load_backbone(tmp_path).fingerprint == backbone.fingerprint


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_vision_tower_alone_is_the_same_backbone(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tower: Any = transformers.AutoModel.from_config(config(kind).vision_config)
    tower.save_pretrained(tmp_path)
    backbone = load_backbone(tmp_path)
    own = tower.eval()(backbone.preprocessing.normalised(pixels())).last_hidden_state
    mean = own[:, 1:].mean(1) if kind == "clip" else own.mean(1)
    assert torch.allclose(backbone.features(pixels()), mean, atol=1e-6)


PROCESSORS = {
    "vit": ("ViTImageProcessor", {"size": {"height": 16, "width": 16}}),
    "clip": ("CLIPImageProcessor", {"size": {"shortest_edge": 18}, "crop_size": 16}),
    "dinov2": ("BitImageProcessor", {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}}),
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_pictures_are_prepared_as_transformers_does(kind: str, tmp_path: Path) -> None:
    name, options = PROCESSORS[kind]
    theirs = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    processor = theirs(**options)
    processor.save_pretrained(tmp_path)
    how = Preprocessing.from_transformers(json.loads((tmp_path / "preprocessor_config.json").read_text()), 16)
    drawn = picture(1, 0, 40).resize((40, 30))
    expected = torch.as_tensor(processor(drawn, return_tensors="pt")["pixel_values"])
    assert torch.allclose(how.normalised(how.cut(drawn)[None].float() / 255), expected, atol=1e-5)
    assert Preprocessing.from_dict(json.loads(json.dumps(how.to_dict()))) == how


def test_folders_become_one_file_with_adapter_head_labels_and_preprocessing(trained: Path, data: Path) -> None:
    adapter, domain, weight, bias = open_domain(trained)
    assert domain.labels == ("low", "mid", "top") and weight.shape == (3, 16) and bias.shape == (3,)
    assert all(name.startswith("vit.encoder.layer.") for name in adapter.layers) and len(adapter.layers) == 8
    assert domain.preprocessing.size == (16, 16)
    folder = trained.with_name("bars-training")
    assert sorted(path.name for path in trained.parent.iterdir()) == ["bars-training", "bars.safetensors"]
    for split in ("validation", "test"):
        numbers = json.loads((folder / split / "metrics.json").read_text())
        assert numbers["accuracy"] > 0.8 and {"macro_f1", "auroc", "ece", "classes"} <= numbers.keys()
        assert {"confusion.png", "reliability.png", "predictions.csv"} <= {p.name for p in (folder / split).iterdir()}
    assert "pipeline_tag: image-classification" in (folder / "README.md").read_text()
    rows = (folder / "test" / "predictions.csv").read_text().splitlines()
    assert len(rows) == 13 and rows[0].startswith("file_name,label,answer,probability,p(low)")


def test_the_file_gives_the_runs_own_logits_bit_for_bit(settings: VitConfig, trained: Path, model: Path) -> None:
    """The trainable pairs with the file's values, as training leaves them, answer as the file does when loaded."""
    from lora_vision.vit.fitting import learners

    adapter, _, weight, bias = open_domain(trained)
    live = Classifier(load_backbone(model), 3)
    learners(live, "lora", lv.LoraConfig(rank=4))
    layers: dict[str, Any] = names.index(live.backbone.parts)
    with torch.no_grad():
        for name, factors in adapter.layers.items():
            layers[name].lora_down.copy_(factors.tensors()["down"])
            layers[name].lora_up.copy_(factors.tensors()["up"])
        live.head.weight.copy_(weight)
        live.head.bias.copy_(bias)
    reloaded, _ = load_classifier(trained, str(model))
    assert torch.equal(live.eval()(pixels()), reloaded(pixels()))


def test_the_same_run_gives_the_same_file_and_resumes_to_it(settings: VitConfig, trained: Path, tmp_path: Path) -> None:
    half = replace(settings, output=str(tmp_path / "bars.safetensors"), steps=20)
    kept = shutil.copy(run(half), tmp_path / "first.safetensors")
    longer = replace(half, steps=60, resume=True, patience=0, keep="last")
    again = run(longer)
    assert again.read_bytes() != trained.read_bytes()  # the rate falls to zero twice: another run
    entries = {entry.file: entry for entry in history(tmp_path)}
    assert entries["bars.safetensors"].parents == ("first.safetensors",) and not entries["first.safetensors"].parents
    assert (entries["first.safetensors"].steps, entries["bars.safetensors"].steps) == (20, 60)
    assert entries["bars.safetensors"].resumed == (20,) and settings_of(kept)["steps"] == 20
    once = again.read_bytes()
    assert run(longer).read_bytes() == once, "nothing was trained: the same file, parent and all"
    whole = run(replace(settings, output=str(tmp_path / "whole.safetensors")))
    assert whole.read_bytes() == trained.read_bytes()


def test_a_run_that_broke_off_is_resumed_bit_for_bit(
    settings: VitConfig, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = replace(settings, output=str(tmp_path / "bars.safetensors"))
    calls, forward = count(1), ClassificationLoss.forward

    def failing(self: ClassificationLoss, batch: Batch) -> torch.Tensor:
        if next(calls) > 50:
            raise KeyboardInterrupt
        return forward(self, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ClassificationLoss, "forward", failing)
        run(mine)
    assert not Path(mine.output).exists()
    assert run(replace(mine, resume=True)).read_bytes() == trained.read_bytes()


def test_merged_export_is_the_live_model_and_plain_transformers_opens_it(
    trained: Path, model: Path, tmp_path: Path
) -> None:
    live, domain = load_classifier(trained, str(model))
    export_folder(trained, tmp_path, str(model))
    kind: Any = transformers.AutoModelForImageClassification
    plain = kind.from_pretrained(tmp_path).eval()
    seen = domain.preprocessing.normalised(pixels())
    with torch.no_grad():
        assert torch.allclose(plain(seen).logits, live(pixels()), atol=1e-5)
    assert [plain.config.id2label[at] for at in range(3)] == ["low", "mid", "top"]
    how = Preprocessing.from_transformers(json.loads((tmp_path / "preprocessor_config.json").read_text()), 16)
    assert how == domain.preprocessing


def test_onnx_gives_the_same_logits(trained: Path, model: Path, tmp_path: Path) -> None:
    for extra in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(extra)
    import onnxruntime

    from lora_vision.vit.export import export_onnx

    path, away = export_onnx(trained, tmp_path / "bars.onnx", str(model))
    live, domain = load_classifier(trained, str(model))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    seen = domain.preprocessing.normalised(pixels(5))
    found = torch.from_numpy(session.run(None, {"pixel_values": seen.numpy()})[0])
    assert away < 1e-4 and torch.allclose(found, live(pixels(5)), atol=1e-4)
    assert [file.name for file in tmp_path.iterdir()] == ["bars.onnx"]


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_a_mixed_batch_is_answered_by_each_rows_own_domain(kind: str, tmp_path: Path) -> None:
    from lora_vision.vit.classifier import Domain, with_head

    backbone = load_backbone(write_model(tmp_path, kind))
    untouched = backbone.features(pixels())
    made = {}
    for number, name in enumerate(("clothes", "fungi")):
        head = nn.Linear(backbone.width, 2 + number)
        labels = tuple(f"{name}-{at}" for at in range(2 + number))
        domain = Domain(labels, str(tmp_path), backbone.fingerprint, backbone.preprocessing)
        made[name] = with_head(moved(backbone.parts, seed=number), head, domain, {})
    domains = Domains(backbone)
    for name, adapter in made.items():
        assert domains.load(adapter, name).labels[0] == f"{name}-0"
    order = ["fungi", "clothes", "clothes", "fungi"]
    mixed = domains.answers(pixels(), order)
    domains.detach()
    assert torch.equal(backbone.features(pixels()), untouched)
    for name, adapter in made.items():
        alone, _ = load_classifier(adapter, backbone=backbone)
        expected = alone(pixels())
        lv.detach(backbone.parts)
        for row, each in enumerate(order):
            if each == name:
                assert torch.allclose(mixed[row], expected[row], atol=1e-5)


def test_rank_auto_cuts_layers_to_what_they_need(settings: VitConfig, tmp_path: Path) -> None:
    chosen = replace(settings, output=str(tmp_path / "auto.safetensors"), rank="auto", steps=20, energy=0.9)
    adapter, _, _, _ = open_domain(run(chosen))
    ranks = [factors.rank for factors in adapter.layers.values()]
    assert max(ranks) <= 16 and min(ranks) < 8
    told = json.loads((tmp_path / "auto-training" / "history.json").read_text())["ranks"]
    assert list(told.values()) == ranks


class Attention(nn.Module):
    """Stands for timm's attention: one fused projection, then the output's."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(6, 18), nn.Linear(6, 6)


def fused() -> tuple[nn.Module, nn.Linear]:
    torch.manual_seed(0)
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Module()])
    model.blocks[0].attn = Attention()
    return model, model.blocks[0].attn.qkv


def test_fused_slices_are_three_linears_and_k_stays_bit_equal() -> None:
    model, whole = fused()
    x = torch.randn(2, 5, 6)
    before = whole(x)
    assert split_qkv(model) == 1
    parts = {"vit": model}
    slices = model.blocks[0].attn.qkv
    three = torch.cat([nn.functional.linear(x, whole.weight[a : a + 6], whole.bias[a : a + 6]) for a in (0, 6, 12)], -1)
    assert torch.equal(slices(x), three) and torch.allclose(three, before, atol=1e-6)
    layers = names.index(parts)
    assert select("qv", layers) == [f"vit.blocks.0.attn.qkv.{name}" for name in "qv"]
    assert len(select("attention", layers)) == 4
    adapter = moved(parts, "qv")
    lv.attach(parts, adapter)
    after = slices(x)
    assert torch.equal(after[..., 6:12], three[..., 6:12])
    for at, name in ((0, "q"), (12, "v")):
        change = adapter.layers[f"vit.blocks.0.attn.qkv.{name}"].delta()
        assert torch.allclose(after[..., at : at + 6], three[..., at : at + 6] + x @ change.T, atol=1e-5)
    lv.detach(parts)
    join_qkv(model)
    assert isinstance(model.blocks[0].attn.qkv, nn.Linear) and not isinstance(model.blocks[0].attn.qkv, Qkv)
    assert torch.equal(model.blocks[0].attn.qkv.weight, whole.weight)


def test_a_fused_projection_used_without_its_layer_is_refused_whole() -> None:
    """timm's BEiT and EVA call F.linear with qkv.weight and a bias joined of q_bias, 0 and v_bias."""
    model = nn.ModuleDict({"plain": nn.Module(), "beit": nn.Module()})
    for name in model:
        model[name].attn = nn.Module()
        model[name].attn.qkv = nn.Linear(4, 12, bias=False)
    model["beit"].attn.q_bias = nn.Parameter(torch.zeros(4))
    with pytest.raises(BaseModelError, match=r"beit\.attn\.qkv is used without its layer"):
        split_qkv(model)
    assert all(isinstance(model[name].attn.qkv, nn.Linear) for name in model)


def test_timm_transformers_are_adapted_by_slice() -> None:
    pytest.importorskip("torchvision", reason="timm needs it")
    timm = pytest.importorskip("timm")
    from lora_vision.vit.backbone import of_timm

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, patch_size=8, pretrained=False)
    seen = torch.rand(2, 3, 32, 32)
    expected = model.eval().forward_head(model.forward_features(seen), pre_logits=True)
    backbone = of_timm(model, "timm:vit_tiny_patch16_224")
    found = backbone.model(seen)
    assert torch.allclose(found, expected, atol=1e-5) and len(select("qv", names.index(backbone.parts))) == 4


def test_what_does_not_belong_together_is_refused(trained: Path, model: Path, tmp_path: Path, data: Path) -> None:
    with pytest.raises(BaseModelError, match="weights differ"):
        load_classifier(trained, str(write_model(tmp_path / "other", seed=1)))
    with pytest.raises(BaseModelError, match=r"features, but .* gives"):
        load_classifier(trained, str(write_model(tmp_path / "dino", "dinov2")))
    with pytest.raises(BaseModelError, match="there is no vision transformer"):
        load_backbone(tmp_path / "nowhere.safetensors")
    adapter = lv.load_adapter(trained)
    card = json.loads(adapter.metadata[CARD]) | {"labels": ["low", "mid"]}
    with pytest.raises(AdapterError, match="2 labels for a head of 3"):
        open_domain(replace(adapter, metadata={CARD: json.dumps(card)}))
    with pytest.raises(AdapterError, match="no labels and preprocessing"):
        open_domain(replace(adapter, metadata={}))
    with pytest.raises(AdapterError, match="no head"):
        layers = {name: factors for name, factors in adapter.layers.items() if name != "vit.classifier"}
        open_domain(replace(adapter, layers=layers, extras={}))
    write_classes(tmp_path / "strange" / "left", 1)
    with pytest.raises(DataError, match="labels the head does not know"):
        read_dataset(tmp_path / "strange", labels=("low", "mid", "top"))


def test_the_commands_answer(
    trained: Path, model: Path, data: Path, tmp_path: Path, lora_vision: Callable[..., Any]
) -> None:
    shown = data / "test" / "mid" / "50.png"
    done = lora_vision("classify", shown, "--adapter", trained, "--base", model)
    assert done.code == 0 and done.out.startswith(f"{shown}: mid ")
    twin = tmp_path / "twin.safetensors"
    twin.write_bytes(trained.read_bytes())
    both = lora_vision("classify", data / "test", "--adapter", trained, "--adapter", twin, "--base", model, "--json")
    assert len(both.json) == 24 and {row["adapter"] for row in both.json} == {"bars", "twin"}
    words = ("--adapter", trained, "--base", model, "--output")
    numbers = lora_vision("evaluate", "--data", data, *words, tmp_path / "eval", "--json").json
    assert numbers["pictures"] == 12 and numbers["accuracy"] > 0.8
    assert lora_vision("export", *words, tmp_path / "whole").code == 0
    wrong = lora_vision("classify", shown, "--adapter", trained)
    assert wrong.code == 1 and "there is no vision transformer" in wrong.err


def test_few_pictures_a_class_behave(settings: VitConfig, tmp_path: Path) -> None:
    few = replace(settings, output=str(tmp_path / "few.safetensors"), few=2, steps=8, batch_size=None, augment="auto")
    _, domain, _, _ = open_domain(run(few))
    assert 0 <= domain.numbers["accuracy"] <= 1


def test_peft_learns_the_same(model: Path, data: Path) -> None:
    """The same transformer, first values, pictures, order and steps: the same answers, and so the same accuracy."""
    import peft

    found = split_dataset(read_dataset(data), 0.0)
    ours, theirs = (Classifier(load_backbone(model), 3) for _ in range(2))
    parameters, _ = learners(ours, "lora", lv.LoraConfig(rank=4, alpha=8))
    layers: dict[str, Any] = names.index(ours.backbone.parts)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    wrapped = peft.get_peft_model(theirs.body, config)  # type: ignore[arg-type]
    with torch.no_grad():
        for path, module in wrapped.base_model.model.named_modules():
            if hasattr(module, "lora_A"):
                module.lora_A["default"].weight.copy_(layers[f"vit.{names.classic('vit', path)}"].lora_down)
    others = [p for p in theirs.parameters() if p.requires_grad]
    assert sum(p.numel() for p in others) == sum(p.numel() for p in parameters)
    stream = Stream(found.of("train"), 3, ours.backbone.preprocessing, seed=1)
    for classifier, learning in ((ours, parameters), (theirs, others)):
        loss, optimizer = ClassificationLoss(classifier, 0.1), torch.optim.AdamW(learning, lr=1e-2)
        for step in range(12):
            loss(stream(6 * step, 6)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.allclose(ours(pixels()), theirs(pixels()), atol=1e-4)


def launched(config: VitConfig, *launcher: str) -> Adapter:
    """The adapter that the training script wrote as a program of its own."""
    words = [f"--{f.name.replace('_', '-')}={getattr(config, f.name)}" for f in fields(config) if f.name in GIVEN]
    command = [sys.executable, *launcher, str(ROOT / "train_scripts" / "train_vit.py"), *words]
    surroundings = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return lv.load_adapter(config.output)


def test_two_processes_are_one_with_the_doubled_batch(settings: VitConfig, tmp_path: Path) -> None:
    """Gradients are averaged over gloo, and only the main process writes."""
    short = replace(settings, steps=4, patience=0, keep="last", augment="strong", batch_size=8)
    one = launched(replace(short, output=str(tmp_path / "one.safetensors")))
    halves = replace(short, output=str(tmp_path / "two.safetensors"), batch_size=4)
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    two = launched(halves, "-m", "accelerate.commands.launch", *options.split())
    for name in one.layers:
        if name != "vit.classifier":
            assert torch.allclose(one.layers[name].delta(), two.layers[name].delta(), rtol=1e-2, atol=1e-4)


def test_batches_cover_every_picture_once() -> None:
    how = Preprocessing((16, 16), (16, 16))
    found = list(batches((picture(at % 3, at) for at in range(5)), how, 2))
    assert [len(batch) for batch in found] == [2, 2, 1]
