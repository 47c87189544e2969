"""Adapter files on disk: whole or not at all, the same bytes for the same adapter, and clear refusals."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapters import LINEAR, NORM, TEXT, Maker, assert_same, every_kind
from safetensors.torch import load_file, save_file

from lora_vision import files
from lora_vision.adapter import Adapter
from lora_vision.approximate import approximate
from lora_vision.errors import AdapterError
from lora_vision.files import convert, load_adapter, save_adapter


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft"])
def test_the_same_adapter_gives_the_same_bytes(format: str, tmp_path: Path) -> None:
    one, two = every_kind()["lora"], every_kind()["lora"]
    two = Adapter(dict(reversed(two.layers.items())), {}, dict(two.metadata))
    if format == "peft":
        one, two = (replace(a, layers={LINEAR: a.layers[LINEAR]}) for a in (one, two))
    first = save_adapter(one, tmp_path / "1.safetensors", format).read_bytes()
    (tmp_path / "adapter_config.json").unlink(missing_ok=True)
    assert save_adapter(two, tmp_path / "2.safetensors", format).read_bytes() == first


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_adapter(every_kind()["lora"], tmp_path / "a.safetensors")
    before = path.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(AdapterError, match="cannot be written: No space left"):
        save_adapter(every_kind()["loha"], path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_an_adapter_can_be_saved_over_the_file_it_was_read_from(tmp_path: Path) -> None:
    path = save_adapter(every_kind()["lora"], tmp_path / "a.safetensors")
    adapter = load_adapter(path)
    save_adapter(adapter, path)
    assert_same(load_adapter(path), every_kind()["lora"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"PK\x03\x04" + bytes(40), "torch pickle"),
        (b"", "no safetensors file"),
        (struct.pack("<Q", 10**9) + b"{}", "at most"),
        (struct.pack("<Q", 400) + b'{"a":1}', "cut short"),
        (struct.pack("<Q", 2) + b"{}", "no tensors at all"),
    ],
)
def test_what_is_no_adapter_file(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(AdapterError, match=message):
        load_adapter(tmp_path / "a.safetensors")


def test_a_file_cut_short_says_so(tmp_path: Path) -> None:
    path = save_adapter(every_kind()["lora"], tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(AdapterError, match=r"cut short.*download it again"):
        load_adapter(path)


def _with_header(text: str, size: int) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode() + bytes(size)


_DOWN, _UP = (f"lora_unet_mid_block_attentions_0_proj_in.lora_{side}.weight" for side in ("down", "up"))
_PAIR = f'"{_DOWN}":{{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}},'
_PAIR += f'"{_UP}":{{"dtype":"F32","shape":[2,1],"data_offsets":[8,16]}}'


@pytest.mark.parametrize("space", ["", " "])
def test_strings_stand_anywhere_in_a_header_but_once(space: str, tmp_path: Path) -> None:
    file, strings = tmp_path / "a.safetensors", f'"__metadata__":{space}{{"a":"b"}}'
    for text in (f"{{{strings},{space}{_PAIR}}}", f"{{{_PAIR},{strings}}}"):
        file.write_bytes(_with_header(text, 16))
        assert load_adapter(file).metadata == {"a": "b"}
    file.write_bytes(_with_header(f"{{{strings},{_PAIR},{strings}}}", 16))
    with pytest.raises(AdapterError, match="__metadata__' twice"):
        load_adapter(file)


@pytest.mark.parametrize("shape", ["[0,1180591620717411303424]", "[4611686018427387904,4611686018427387904,0]"])
def test_empty_shapes_that_torch_cannot_count_are_refused(shape: str, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(_with_header(f"{{{_PAIR.replace('[1,2]', shape).replace('[0,8]', '[0,0]')}}}", 16))
    with pytest.raises(AdapterError, match="do not agree"):
        load_adapter(file)


@pytest.mark.parametrize("path", ["nowhere.safetensors", "", "\0"])
def test_a_missing_file_is_named(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterError, match=r"no such file|cannot be opened|name the one to load") as told:
        load_adapter(path)
    assert ("no such file" in str(told.value)) + ("cannot be opened" in str(told.value)) < 2


@pytest.mark.parametrize(("path", "format"), [("a.txt", "kohya"), ("folder", "diffusers"), ("a.safetensors", "native")])
def test_wrong_names_and_formats_are_refused(path: str, format: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"ending in \.safetensors|expected one of kohya, diffusers, peft"):
        save_adapter(every_kind()["lora"], tmp_path / path, format)
    assert not list(tmp_path.iterdir())


def test_a_peft_folder_for_each_part(tmp_path: Path) -> None:
    save_adapter(every_kind()["lora"], tmp_path / "a", "peft")
    assert {str(p.relative_to(tmp_path / "a")) for p in (tmp_path / "a").rglob("*.*")} == {
        f"{part}/{name}"
        for part in ("unet", "text_encoder")
        for name in ("adapter_model.safetensors", "adapter_config.json")
    }
    assert_same(load_adapter(tmp_path / "a"), every_kind()["lora"])


def test_a_peft_file_keeps_other_peoples_settings(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    adapter = Adapter({LINEAR: Maker().lora()})
    with pytest.raises(AdapterError, match="belongs to another adapter"):
        save_adapter(adapter, tmp_path / "a.safetensors", "peft")
    assert (tmp_path / "adapter_config.json").read_text() == "{}"
    assert not (tmp_path / "a.safetensors").exists()


def test_a_peft_file_without_settings_is_refused(tmp_path: Path) -> None:
    tensors = {f"base_model.model.{LINEAR[5:]}.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"no adapter_config\.json"):
        load_adapter(tmp_path)


def test_alpha_that_float32_would_round_stays_exact(tmp_path: Path) -> None:
    path = save_adapter(every_kind()["lora-ranks"], tmp_path / "a.safetensors")
    alphas = {key: value for key, value in load_file(path).items() if key.endswith("alpha")}
    assert {value.dtype for value in alphas.values()} == {torch.float64}
    assert {value.item() for value in alphas.values()} == {3.3, 0.1}


@pytest.mark.parametrize("kind", ["tucker", "loha", "lokr", "dora"])
def test_approximate_prints_the_error_it_costs(kind: str, tmp_path: Path) -> None:
    adapter = every_kind()[kind]
    save_adapter(adapter, tmp_path / "a.safetensors")
    shapes = {name: (f.size or (16, 16)) for name, f in adapter.layers.items()}
    base = {name: Maker(5).tensor(*shape) for name, shape in shapes.items()} if kind == "dora" else None
    if kind == "dora":
        with pytest.raises(AdapterError, match="multiplies the base"):
            convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", format="diffusers", approximate=3)
        base = {LINEAR: Maker(5).tensor(16, 12), "unet.down_blocks.1.resnets.0.conv1": Maker(6).tensor(16, 8, 3, 3)}
    done = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", format="diffusers", approximate=3, base=base)
    found = load_adapter(tmp_path / "b.safetensors")
    assert set(done.errors) == set(adapter.layers)
    for name, factors in adapter.layers.items():
        change = factors.delta(None if base is None else base[name])
        lost = (found.layers[name].delta().flatten() - change.flatten()).norm() / change.norm()
        assert lost.item() == pytest.approx(done.errors[name], abs=2e-6)
        assert found.layers[name].rank is not None and found.layers[name].rank <= 4
    assert "approximated" in str(done) if any(done.errors.values()) else True


def test_approximate_leaves_pairs_alone_and_refuses_what_is_no_matrix() -> None:
    adapter = every_kind()["lora"]
    assert approximate(adapter, 1) == (replace(adapter), {}) or approximate(adapter, 1)[1] == {}
    with pytest.raises(AdapterError, match=f"{NORM}.*bias"):
        approximate(every_kind()["norm"], 4)
    with pytest.raises(AdapterError, match="expected at least 1"):
        approximate(adapter, 0)


def test_convert_is_lossless_or_refuses(tmp_path: Path) -> None:
    save_adapter(every_kind()["loha"], tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="LoHa has no spelling in diffusers"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", format="diffusers")
    assert not (tmp_path / "b.safetensors").exists()
    save_adapter(every_kind()["lora"], tmp_path / "c.safetensors")
    done = convert(tmp_path / "c.safetensors", tmp_path / "d.safetensors", format="diffusers")
    assert done.errors == {} and done.layers == 2 and "without loss" in str(done)
    assert TEXT in load_adapter(tmp_path / "d.safetensors").layers
