"""inspect tells what is in a file, from its header, without torch."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapters import CONV, LINEAR, TEXT, Maker, every_kind
from safetensors.torch import load_file, save_file

from lora_vision.adapter import Adapter
from lora_vision.errors import AdapterError
from lora_vision.factors import LowRank
from lora_vision.files import save_adapter
from lora_vision.report import _trigger_words, inspect

SCRIPT = """
import sys, time
from lora_vision.report import inspect
text = str(inspect(sys.argv[1]))
print(time.process_time(), sorted({"torch", "safetensors", "diffusers", "transformers"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("kind", "algorithms"),
    [
        ("lora", {"LoRA": 2}),
        ("locon", {"LoCon": 1, "LoRA": 1}),
        ("tucker", {"LoCon Tucker": 1}),
        ("loha", {"LoHa": 2}),
        ("lokr", {"LoKr": 1}),
        ("dora", {"LoRA + DoRA": 1, "LoCon + DoRA": 1}),
        ("ia3", {"(IA)3": 2}),
        ("full", {"full difference": 2}),
        ("norm", {"norm": 1}),
    ],
)
def test_algorithms(kind: str, algorithms: dict[str, int], tmp_path: Path) -> None:
    report = inspect(save_adapter(every_kind()[kind], tmp_path / "a.safetensors"))
    assert report.algorithms == algorithms
    assert (report.format, report.problem, report.family, report.unknown) == ("kohya", None, "sd", [])
    assert json.loads(json.dumps(report.to_dict()))["algorithms"] == algorithms


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft"])
def test_ranks_and_alphas_of_each_group(format: str, tmp_path: Path) -> None:
    make = Maker()
    layers = {LINEAR: make.lora(rank=4, alpha=2.0), CONV: make.locon(rank=3, alpha=6.0)}
    report = inspect(save_adapter(Adapter(layers), tmp_path / "a.safetensors", format))
    assert report.format == format
    assert report.groups == {
        "unet attention": {"layers": 1, "ranks": {"4": 1}, "alphas": {"2": 1}},
        "unet resnets and convolutions": {"layers": 1, "ranks": {"3": 1}, "alphas": {"6": 1}},
    }


def test_shapes_not_words_decide_the_family(tmp_path: Path) -> None:
    name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    adapter = Adapter({name: Maker().lora(320, 1024)}, {}, {"ss_base_model_version": "sd_v1"})
    report = inspect(save_adapter(adapter, tmp_path / "a.safetensors"))
    assert (report.family, report.stated_family) == ("sd2", "sd_v1")


def test_words_settings_and_hashes(tmp_path: Path) -> None:
    tags = json.dumps({"10_ink": {"ink drawing": 30, "tree": 4}, "5_x": {"tree": 40}})
    metadata = {"ss_tag_frequency": tags, "ss_learning_rate": "1e-4", "ss_seed": "None"}
    path = save_adapter(Adapter(every_kind()["lora"].layers, {}, metadata), tmp_path / "a.safetensors")
    report = inspect(path)
    assert report.trigger_words == ["tree", "ink drawing"]
    assert report.settings["ss_learning_rate"] == "1e-4" and "ss_seed" not in report.settings
    assert report.hashes["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert report.hashes["model_hash"] == report.hashes["sshs_model_hash"]
    phrased = {**metadata, "modelspec.trigger_phrase": "inky"}
    path = save_adapter(Adapter(every_kind()["lora"].layers, {}, phrased), tmp_path / "b.safetensors")
    assert inspect(path).trigger_words == ["inky"]
    assert _trigger_words({**metadata, "lora_vision.trigger": ""}) == [], "the trainer says that there is none"
    assert inspect(path, scan=False).hashes.keys() == {"sshs_model_hash", "sshs_legacy_hash"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_broken_and_silent_layers(dtype: torch.dtype, tmp_path: Path) -> None:
    make = Maker(dtype=dtype)
    good = make.lora()
    nan = LowRank(good.down.clone(), good.up.clone(), 4.0)
    nan.up[3, 1] = math.nan
    infinite = LowRank(good.down.clone(), good.up.clone(), 4.0)
    infinite.down[0, 0] = -math.inf
    silent = LowRank(good.down, torch.zeros_like(good.up), 4.0)
    block = LINEAR.rpartition("transformer_blocks")[0] + "transformer_blocks.0.attn2."
    layers = {LINEAR: nan, TEXT: infinite, block + "to_q": silent, block + "to_k": LowRank(good.down, good.up, 0.0)}
    layers[block + "to_v"] = good
    report = inspect(save_adapter(Adapter(layers), tmp_path / "a.safetensors"))
    assert set(report.broken) == {LINEAR, TEXT}
    assert set(report.silent) == {block + "to_q", block + "to_k"}


def test_a_file_that_cannot_be_loaded_is_still_told_apart(tmp_path: Path) -> None:
    save_file({"lora_unet_conv_in.oft_blocks": torch.ones(2, 4, 4)}, tmp_path / "a.safetensors")
    report = inspect(tmp_path / "a.safetensors")
    assert report.algorithms == {"OFT or BOFT": 1} and "not supported" in str(report.problem)
    (tmp_path / "b.safetensors").write_bytes(b"version https://git-lfs")
    with pytest.raises(AdapterError, match="LFS"):
        inspect(tmp_path / "b.safetensors")


def test_a_pickle_is_inspected_only_with_permission(tmp_path: Path) -> None:
    path = save_adapter(Adapter(every_kind()["lora"].layers), tmp_path / "a.safetensors")
    torch.save(load_file(path), tmp_path / "a.pt")
    with pytest.raises(AdapterError, match="--allow-pickle"):
        inspect(tmp_path / "a.pt")
    whole, pickled = inspect(path), inspect(tmp_path / "a.pt", allow_pickle=True)
    assert pickled.file == str(tmp_path / "a.pt") and pickled.bytes == (tmp_path / "a.pt").stat().st_size
    assert (pickled.algorithms, pickled.groups, pickled.family) == (whole.algorithms, whole.groups, whole.family)
    assert pickled.hashes == {"sha256": hashlib.sha256((tmp_path / "a.pt").read_bytes()).hexdigest()}


def test_nothing_in_a_file_can_play_with_the_terminal(tmp_path: Path) -> None:
    metadata = {"ss_sd_model_name": "a\x1b[31mred\u202e"}
    path = save_adapter(Adapter(every_kind()["lora"].layers, {}, metadata), tmp_path / "a.safetensors")
    text = str(inspect(path))
    assert "\x1b" not in text and "\u202e" not in text and "red" in text


def test_a_big_file_needs_no_torch_and_no_time(tmp_path: Path) -> None:
    make = Maker(dtype=torch.float16)
    up, down = torch.zeros(1280, 128, dtype=torch.float16), make.tensor(128, 1280)
    names = [
        f"unet.up_blocks.{b}.attentions.{a}.transformer_blocks.{t}."
        for b in range(2)
        for a in range(3)
        for t in range(10)
    ]
    layers = {
        f"{stem}attn1.{p}": LowRank(down, up, 64.0) for stem in names for p in ("to_q", "to_k", "to_v", "to_out.0")
    }
    path = save_adapter(Adapter(dict(list(layers.items())[:305])), tmp_path / "big.safetensors")
    assert path.stat().st_size > 150e6
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(path)], capture_output=True, text=True, check=True)
    seconds, modules = done.stdout.split(maxsplit=1)
    assert modules.strip() == "[]"
    assert float(seconds) < 0.6, "0.3 s, and as much again for a busy machine"
