"""Training a style from end to end on random bases: the same file every time, every refusal before the first step."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from models import Family, ldm_checkpoint, tiny_sd, write_pictures
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

import lora_vision as lv
from lora_vision.base import RECIPES
from lora_vision.batches import StyleBatches
from lora_vision.config import StyleConfig
from lora_vision.errors import BaseModelError, DataError
from lora_vision.tools.history import differences, history, settings_of, table
from lora_vision.training import Run, TrainingError
from train_scripts import train_style
from train_scripts.train_style import run

ROOT = Path(__file__).parent.parent
QUERY = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate remembers the first precision it was given for the whole process."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data") / "dots", 6)


@pytest.fixture
def config(tmp_path: Path, sd1_folder: Path, data: Path) -> StyleConfig:
    return StyleConfig(
        data=str(data),
        base=str(sd1_folder),
        output=str(tmp_path / "ink.safetensors"),
        steps=6,
        batch_size=2,
        rank=2,
        targets="attention",
        resolution=32,
        learning_rate=1e-2,
        validate_every=2,
        checkpoint_every=2,
        sample_every=0,
        tracker="none",
    )


def elsewhere(config: StyleConfig, name: str, **changes: Any) -> StyleConfig:
    """The same run with another output."""
    return replace(config, output=str(Path(config.output).with_name(f"{name}.safetensors")), **changes)


def test_a_folder_becomes_an_adapter(config: StyleConfig, data: Path) -> None:
    path = run(replace(config, sample_every=3, trigger="ink"))
    assert path == Path(config.output)
    adapter = lv.load_adapter(path)
    assert QUERY in adapter.layers and all(".attn" in name for name in adapter.layers)
    delta = adapter.layers[QUERY].delta()
    assert delta.shape == (32, 32) and delta.abs().max() > 0 and torch.linalg.matrix_rank(delta) == 2
    folder = path.with_name("ink-training")
    names = {"loss.png", "samples.png", "choices.png", "history.json", "checkpoint.pt"}
    names |= {"best.safetensors", "last.safetensors"}
    assert names <= {file.name for file in folder.iterdir()}
    history = json.loads((folder / "history.json").read_text())
    assert len(history["losses"]) == 6 and sorted(map(int, history["validation"])) == [2, 4, 6]
    assert sorted(file.name[:6] for file in (folder / "samples").glob("*-0.png")) == ["000000", "000003", "000006"]
    drawn = [Image.open(folder / "samples" / f"00000{step}-0.png") for step in (0, 6)]
    assert drawn[0].size == (32, 32) and drawn[0].tobytes() != drawn[1].tobytes()
    assert path.read_bytes() == (folder / "last.safetensors").read_bytes()
    kept = sorted((folder / "samples").glob("*.safetensors"))
    assert [each.stem for each in kept] == ["000003", "000006"]
    assert kept[-1].read_bytes() == path.read_bytes() != kept[0].read_bytes()
    choices = Image.open(folder / "choices.png")
    assert choices.width > 4 * 128 and choices.height > 2 * 128


def test_the_file_says_how_it_was_made(config: StyleConfig, sd1_folder: Path) -> None:
    made = lv.load_adapter(run(replace(config, trigger="ink", alpha=1.0, snr_gamma=3.0))).metadata
    base = lv.load_base(sd1_folder)
    assert made["lora_vision.base_fingerprint"] == base.fingerprint
    assert made["lora_vision.data_fingerprint"] == train_style.read_pictures(config.data, trigger="ink").fingerprint
    settings = json.loads(made["lora_vision.config"])
    assert settings["targets"] == "attention" and settings["snr_gamma"] == 3.0 and settings["seed"] == 0
    assert made["lora_vision.trigger"] == made["modelspec.trigger_phrase"] == "ink"
    assert set(json.loads(made["lora_vision.versions"])) == {"torch", "diffusers", "transformers", "accelerate"}
    assert (made["ss_network_dim"], made["ss_network_alpha"], made["ss_steps"]) == ("2", "1", "6")
    assert made["ss_base_model_version"] == "sd_v1" and made["ss_v2"] == "False"
    counts = json.loads(made["ss_tag_frequency"])["dots"]
    assert len(counts) == 5 and all(caption.startswith("ink, dot") for caption in counts)
    assert str(ROOT.parent) not in str(made) and config.output not in str(made)


def test_the_same_seed_gives_the_same_file(config: StyleConfig) -> None:
    first = run(config).read_bytes()
    assert run(elsewhere(config, "again", sample_every=2, checkpoint_every=0)).read_bytes() == first
    assert run(elsewhere(config, "other", seed=1)).read_bytes() != first


def test_a_longer_run_names_the_adapter_it_went_on_from(config: StyleConfig) -> None:
    output = run(config)
    kept = output.with_name("first.safetensors")
    kept.write_bytes(output.read_bytes())
    run(replace(config, resume=True))
    assert output.read_bytes() == kept.read_bytes(), "nothing was trained: the same file"
    run(replace(config, resume=True, steps=9))
    entries = {entry.file: entry for entry in history(output.parent)}
    first, longer = entries["first.safetensors"], entries["ink.safetensors"]
    assert first.parents == () and longer.parents == ("first.safetensors",)
    assert (first.steps, longer.steps, longer.how, longer.resumed[-1]) == (6, 9, "train", 6)
    assert first.data == longer.data is not None
    assert "resumed from first.safetensors, resumed at step" in table([longer])
    changed = differences(settings_of(kept), settings_of(output))
    assert changed == {"steps": (6, 9), "train resumed at step": (None, 6)}
    once = output.read_bytes()
    assert run(replace(config, resume=True, steps=9)).read_bytes() == once, "nothing was trained: the same file"


LIBRARIES = {
    "adamw8bit": "bitsandbytes",
    "prodigy": "prodigyopt",
    "lion": "lion_pytorch",
    "schedulefree": "schedulefree",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"variant": "dora", "rank_dropout": 0.3, "max_norm": 0.05},
    "pissa": {"variant": "pissa", "module_dropout": 0.2, "up_rate": 4.0},
    "loha": {"variant": "loha", "layers": ("unet.mid_block.*:rank=1,rate=0.5",), "targets": "attention+conv"},
    "lokr": {"variant": "lokr", "rank_dropout": 0.3, "targets": "attention+conv"},
    "objective": {"weighting": "debiased", "huber": "snr", "noise_offset": 0.1, "input_perturbation": 0.1},
    "rslora": {"variant": "rslora", "optimizer": "lion", "ema": 0.8},
    "adamw8bit": {"optimizer": "adamw8bit", "targets": "attention+conv", "rank": 16},
    "adafactor": {"optimizer": "adafactor", "variant": "dora", "ema": 0.9},
    "prodigy": {"optimizer": "prodigy", "learning_rate": None, "rank_dropout": 0.2},
    "schedulefree": {"optimizer": "schedulefree", "keep": "best"},
    "new word": {"new_tokens": 2, "trigger": "inkish", "ema": 0.5},
    "data": {"flip": True, "shuffle_tags": True, "drop_captions": 0.3, "prior": "base", "trigger": "ink"},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_broken_run_resumes_bit_for_bit(kind: str, config: StyleConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(config, **OPTIONS[kind])
    if config.optimizer in LIBRARIES:
        pytest.importorskip(LIBRARIES[config.optimizer])
    whole = run(config).read_bytes()
    real = StyleBatches.__call__

    def stopping(self: StyleBatches, position: int, count: int) -> Any:
        if position >= 3 * count:
            raise KeyboardInterrupt
        return real(self, position, count)

    broken = elsewhere(config, "broken")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StyleBatches, "__call__", stopping)
        run(broken)
    assert not Path(broken.output).exists()
    assert run(replace(broken, resume=True)).read_bytes() == whole
    if kind == "lora":
        with pytest.raises(TrainingError, match=r"of another run: data fingerprint .*rank 2 \(now 4\)"):
            run(replace(broken, resume=True, rank=4, trigger="other"))


@pytest.mark.parametrize("single", [False, True], ids=["folder", "single-file"])
@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_every_base_trains(family: Family, single: bool, config: StyleConfig, tmp_path: Path) -> None:
    folder = tiny_sd(tmp_path / "base", family, second=24)
    changes: dict[str, Any] = {"base": str(folder), "steps": 2, "targets": "style" if family == "sdxl" else "attention"}
    if single:
        save_file(ldm_checkpoint(lv.load_base(folder).pipeline()), tmp_path / "model.safetensors")
        changes |= {"base": str(tmp_path / "model.safetensors"), "base_config": str(folder)}
    adapter = lv.load_adapter(run(replace(config, **changes, validate_every=0, precision="bf16")))
    assert all(factors.delta().abs().max() > 0 for factors in adapter.layers.values())
    assert adapter.metadata["modelspec.prediction_type"] == ("v" if family == "sd2" else "epsilon")
    assert adapter.metadata["ss_base_model_version"] == {"sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}[family]


def test_ranks_are_found_where_they_are_not_given(config: StyleConfig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    path = run(replace(config, rank="auto", steps=12, batch_size=4, keep="best"))
    adapter = lv.load_adapter(path)
    ranks = {factors.rank for factors in adapter.layers.values()}
    assert min(ranks) >= 1 and max(ranks) < 32 and len(ranks) > 1
    (line,) = [record.getMessage() for record in caplog.records if "of the energy kept" in record.getMessage()]
    assert line.startswith(f"ranks {min(ranks)} to {max(ranks)}, ")
    cut, before, base = (float(number) for number in re.findall(r"\d\.\d{5}", line))
    assert before < base and cut <= before + 0.01 * (base - before) + 1e-5
    assert adapter.metadata["ss_network_dim"] == "Dynamic"


def test_what_shall_stay_is_trained_beside_what_is_new(config: StyleConfig, tmp_path: Path) -> None:
    dogs = write_pictures(tmp_path / "dog", 4, captions=False)
    with_folder = train_style.to_learn_from(replace(config, prior=str(dogs)))
    kept = [picture for picture in with_folder.train if picture.prior]
    assert len(kept) == 4 and {picture.caption for picture in kept} == {"dog"} and len(with_folder.train) == 9
    assert run(replace(config, steps=2, prior=str(dogs), prior_weight=0.5)).is_file()
    with pytest.raises(DataError, match="give a --trigger"):
        run(replace(config, prior="base"))


def test_the_bases_answers_stay_without_the_trigger(config: StyleConfig, sd1_folder: Path) -> None:
    settings = replace(config, steps=30, batch_size=4, trigger="ink", validate_every=0, checkpoint_every=0)
    drift = []
    for prior in (None, "base"):
        adapter = lv.load_adapter(run(replace(settings, prior=prior, prior_weight=5.0)))
        base = lv.load_base(sd1_folder)
        x, states = (
            torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0)),
            base.encode_text(["dot 1"] * 4),
        )
        with torch.no_grad():
            before = base.unet(x, 500, states.states).sample
            lv.attach(base.parts, adapter, strict=False)
            drift.append(float((base.unet(x, 500, states.states).sample - before).norm()))
    assert drift[1] < 0.8 * drift[0]


def test_it_learns_and_leaves_the_base_alone(
    config: StyleConfig, monkeypatch: pytest.MonkeyPatch, sd1_folder: Path
) -> None:
    loaded: list[lv.Base] = []

    def load(*words: Any, **options: Any) -> lv.Base:
        loaded.append(lv.load_base(*words, **options))
        return loaded[-1]

    monkeypatch.setattr(train_style, "load_base", load)
    path = run(replace(config, steps=40, batch_size=4, validate_every=5, checkpoint_every=0, keep="best"))
    history = json.loads((path.with_name("ink-training") / "history.json").read_text())
    looks = list(history["validation"].values())
    assert min(looks) < 0.97 * looks[0]
    best = lv.load_adapter(path)
    assert best.metadata["lora_vision.step"] == str(history["best_step"])
    assert path.read_bytes() == (path.with_name("ink-training") / "best.safetensors").read_bytes()
    lv.detach(loaded[0].parts)
    before = lv.load_base(sd1_folder)
    for part, module in {**loaded[0].parts, "vae": loaded[0].vae}.items():
        wanted = {**before.parts, "vae": before.vae}[part].state_dict()
        assert module.state_dict().keys() == wanted.keys()
        assert all(torch.equal(weight, wanted[name]) for name, weight in module.state_dict().items())


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_text_encoders_train_too(config: StyleConfig, family: str, sd1_folder: Path, sdxl_folder: Path) -> None:
    folder = sd1_folder if family == "sd1" else sdxl_folder
    changes = {"train_text": True, "steps": 2, "gradient_checkpointing": True, "accumulate": 2, "targets": "attention"}
    adapter = lv.load_adapter(run(replace(config, base=str(folder), **changes)))
    parts = ("text_encoder", "text_encoder_2", "unet") if family == "sdxl" else ("text_encoder", "unet")
    assert adapter.parts == parts
    for part in parts:
        assert any(f.delta().abs().max() > 0 for name, f in adapter.layers.items() if name.startswith(f"{part}."))


def test_checkpointed_gradients_are_the_same(config: StyleConfig) -> None:
    plain = lv.load_adapter(run(config))
    saving = lv.load_adapter(run(elsewhere(config, "saving", gradient_checkpointing=True)))
    for name, factors in plain.layers.items():
        torch.testing.assert_close(saving.layers[name].delta(), factors.delta(), rtol=1e-4, atol=1e-6)


def test_a_compiled_unet_is_the_same_unet(config: StyleConfig) -> None:
    plain = run(config).read_bytes()
    with torch.compiler.set_stance("force_eager"):  # compiling itself would take minutes
        assert run(elsewhere(config, "compiled", compile=True)).read_bytes() == plain


def test_training_ends_where_nothing_is_gained(config: StyleConfig) -> None:
    path = run(replace(config, steps=40, learning_rate=3.0, validate_every=1, patience=2, keep="best"))
    history = json.loads((path.with_name("ink-training") / "history.json").read_text())
    looks = {int(step): loss for step, loss in history["validation"].items()}
    assert len(history["losses"]) == max(looks) == history["best_step"] + 2 < 40
    assert lv.load_adapter(path).metadata["lora_vision.step"] == str(history["best_step"])


def test_bf16_trains_float32_weights(config: StyleConfig) -> None:
    adapter = lv.load_adapter(run(replace(config, precision="bf16", steps=1, batch_size=1, validate_every=0)))
    assert adapter.layers[QUERY].delta().isfinite().all()


def never(*_: object, **__: object) -> None:
    raise AssertionError("training has begun")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda c, t: {"data": str(t / "absent")}, DataError, "is not a folder"),
        (lambda c, t: {"data": str(write_pictures(t / "few", 2))}, DataError, "expected at least 4"),
        (lambda c, t: {"data": str(broken_picture(t / "broken"))}, DataError, r"01\.png cannot be read"),
        (lambda c, t: {"output": "/proc/nowhere/ink.safetensors"}, DataError, "cannot be written"),
        (lambda c, t: {"base": str(c.data)}, BaseModelError, "model_index.json"),
        (lambda c, t: {"precision": "fp16"}, TrainingError, "fp16 on a CPU"),
        (lambda c, t: {"targets": "attentoin"}, lv.AdapterError, "attention"),
    ],
    ids=["no-folder", "too-few", "broken-picture", "no-access", "no-base", "fp16", "targets"],
)
def test_mistakes_are_refused_before_training(
    config: StyleConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[StyleConfig, Path], dict[str, Any]],
    error: type[Exception],
    words: str,
) -> None:
    monkeypatch.setattr(train_style, "fit", never)
    with pytest.raises(error, match=words):
        run(replace(config, **change(config, tmp_path)))
    assert not Path(config.output).exists()


def broken_picture(folder: Path) -> Path:
    write_pictures(folder, 5)
    (folder / "01.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "--steps 0: at least 1"),
        ({"rank": -1}, "--rank -1: at least 1"),
        ({"output": "ink.bin"}, "ending in .safetensors"),
        ({"learning_rate": float("nan")}, "--learning-rate nan"),
        ({"resolution": 60}, "--resolution 60: a multiple of 8"),
        ({"holdout": 1.0}, "--holdout 1.0: a share below 1"),
        ({"warmup": -0.1}, "--warmup -0.1: at least 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        StyleConfig(**{"data": "d", "output": "ink.safetensors", **changes})


def test_what_the_user_leaves_open_is_the_bases_own() -> None:
    recipe = lv.load_base.__globals__["RECIPES"]["sdxl"]
    config = StyleConfig(data="d", output="o.safetensors", rank=3).filled(recipe)
    assert (config.rank, config.resolution, config.steps) == (3, recipe.resolution, recipe.steps)
    assert config.sample_every == -(-recipe.steps // 4)
    assert StyleConfig(data="d", output="o.safetensors", sample_every=0).filled(recipe).sample_every == 0


def launched(config: StyleConfig, *launcher: str) -> lv.Adapter:
    """The adapter of this run in processes of its own."""
    names = ("data", "base", "output", "steps", "rank", "targets", "resolution", "learning_rate", "batch_size")
    words = [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(config, name)))]
    words += ["--validate-every", "2", "--sample-every", "0", "--checkpoint-every", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", *launcher, str(ROOT / "train_scripts" / "train_style.py"), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return lv.load_adapter(config.output)


def assert_same(one: lv.Adapter, other: lv.Adapter, tolerance: float) -> None:
    assert one.layers.keys() == other.layers.keys()
    for name, factors in one.layers.items():
        torch.testing.assert_close(factors.delta(), other.layers[name].delta(), rtol=tolerance, atol=tolerance * 1e-2)


def test_accelerate_launches_the_script(config: StyleConfig) -> None:
    options = "--cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
    alone = launched(elsewhere(config, "alone", steps=2), "accelerate.commands.launch", *options.split())
    assert_same(alone, lv.load_adapter(run(replace(config, steps=2))), tolerance=1e-4)


def test_two_processes_are_one_with_the_doubled_batch(config: StyleConfig) -> None:
    """Gradients are averaged over gloo, and only the main process writes."""
    halves = elsewhere(config, "halves", steps=3, batch_size=1)
    both = launched(halves, "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert_same(both, lv.load_adapter(run(replace(config, steps=3))), tolerance=1e-2)
    history = json.loads((Path(halves.output).with_name("halves-training") / "history.json").read_text())
    single = json.loads((Path(config.output).with_name("ink-training") / "history.json").read_text())
    assert history["losses"] == pytest.approx(single["losses"], rel=1e-4)


def share_out(rank: int, port: int, config: StyleConfig) -> None:
    """One of two processes that train under FSDP2; Accelerate chooses that on GPUs only, so its choice is made here."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true"}
    os.environ |= {"FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "BasicTransformerBlock,ResnetBlock2D"
    begin, step = AcceleratorState.__init__, Run.step

    def sharded(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    def watched(self: Run) -> float:
        shares = [parameter for parameter in self.model.parameters() if isinstance(parameter, DTensor)]
        assert sum(map(Tensor.numel, shares)) > 0.9 * sum(map(Tensor.numel, self.model.parameters()))
        assert not any(isinstance(parameter, DTensor) for parameter in self.job.parameters)
        return step(self)

    AcceleratorState.__init__, Run.step = sharded, watched  # type: ignore[method-assign]
    run(config)


def test_a_base_shared_out_by_fsdp_trains_the_same_adapter(
    config: StyleConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECIPES, "tiny", replace(RECIPES["tiny"], sample_steps=2))
    shared = elsewhere(config, "shared", steps=4, batch_size=1, accumulate=2, sample_every=4, ema=0.5)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")  # nothing is imported again
    processes = [context.Process(target=share_out, args=(rank, port, shared)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    alone = elsewhere(config, "alone", steps=4, batch_size=2, accumulate=2, ema=0.5)
    assert_same(lv.load_adapter(shared.output), lv.load_adapter(run(alone)), tolerance=1e-2)
    folder = Path(shared.output).with_name("shared-training")
    assert {"samples.png", "choices.png", "checkpoint.pt"} <= {path.name for path in folder.iterdir()}
    losses, single = (
        json.loads((Path(each.output).with_name(f"{name}-training") / "history.json").read_text())
        for each, name in ((shared, "shared"), (alone, "alone"))
    )
    assert losses["losses"] == pytest.approx(single["losses"], rel=1e-4)
    assert losses["validation"] == pytest.approx(single["validation"], rel=1e-4)
