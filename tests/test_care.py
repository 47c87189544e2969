"""Care over time: verify finds what was broken, history who begat whom, the card what made a file."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import LINEAR, TEXT, Maker
from PIL import Image

from lora_vision import AdapterError, LoraVisionError, lineage, load_adapter, save_adapter
from lora_vision.adapter import Adapter
from lora_vision.base import load_base
from lora_vision.factors import LowRank
from lora_vision.tools import card
from lora_vision.tools.history import history
from lora_vision.tools.verify import sign_off, verify

Run = Callable[..., Any]


@pytest.fixture
def ink(tmp_path: Path) -> Path:
    """An adapter file with kohya's hashes."""
    make = Maker()
    metadata = {"ss_steps": "12", "lora_vision.config": json.dumps({"rank": 4, "seed": 0}), "lora_vision.base": "tiny"}
    metadata |= {"lora_vision.version": "0.1.0", "lora_vision.data_fingerprint": "d" * 64}
    return save_adapter(Adapter({LINEAR: make.lora(), TEXT: make.lora()}, {}, metadata), tmp_path / "ink.safetensors")


def found(path: Path, **options: Any) -> dict[str, bool | None]:
    return {check.name: check.ok for check in verify(path, **options).checks}


def edited(path: Path, change: Callable[[dict[str, Any], bytearray], None]) -> None:
    """Changes a file's header or data, and writes it back."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])
    change(header, data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_a_good_file_passes(ink: Path) -> None:
    assert found(ink) == {"readable": True, "finite": True, "alive": True, "hash": True, "sign-off": None}
    assert verify(ink).ok


def test_a_flipped_bit_is_found_by_the_hash(ink: Path) -> None:
    edited(ink, lambda header, data: data.__setitem__(3, data[3] ^ 1))
    assert found(ink)["hash"] is False
    assert "its tensors have" in verify(ink).problem


def test_nan_silence_and_strangers_are_named(tmp_path: Path) -> None:
    down = torch.ones(2, 16)
    broken = LowRank(down * float("nan"), torch.ones(16, 2), 2.0)
    silent = LowRank(down, torch.zeros(16, 2), 2.0)
    path = save_adapter(Adapter({LINEAR: broken, TEXT: silent}), tmp_path / "x.safetensors")
    assert found(path)["finite"] is False and found(path)["alive"] is None
    assert LINEAR in verify(path).problem
    (tmp_path / "no.safetensors").write_text("this is no adapter at all")
    assert found(tmp_path / "no.safetensors") == {"readable": False}
    with pytest.raises(AdapterError, match="no such file"):
        verify(tmp_path / "absent.safetensors")


def test_the_base_it_was_made_for_is_known(
    sd1_folder: Path, sdxl_folder: Path, sd1_adapters: tuple[Path, Path]
) -> None:
    base, other = load_base(sd1_folder), load_base(sdxl_folder)
    told = found(sd1_adapters[0], base=base)
    assert told["shapes"] is True and told["base"] is None
    stated = {"lora_vision.base_fingerprint": base.fingerprint, "lora_vision.base": "sd1"}
    made = replace(load_adapter(sd1_adapters[0]), metadata=stated)
    path = save_adapter(made, sd1_adapters[0].with_name("made.safetensors"))
    assert found(path, base=base)["base"] is True
    told = found(path, base=other)
    assert told["shapes"] is False and told["base"] is False
    assert "made for sd1" in verify(path, other).problem


def test_a_sign_off_ends_with_any_change(ink: Path) -> None:
    before = {name: factors.delta() for name, factors in load_adapter(ink).layers.items()}
    sign_off(ink, "Ada")
    assert found(ink)["sign-off"] is True and found(ink)["hash"] is True
    assert all(torch.equal(factors.delta(), before[name]) for name, factors in load_adapter(ink).layers.items())
    assert load_adapter(ink).metadata["ss_steps"] == "12"
    edited(ink, lambda header, data: header["__metadata__"].__setitem__("ss_steps", "9000"))
    assert "changed since Ada" in verify(ink).problem
    sign_off(ink, "Bob")
    assert verify(ink).ok


def test_only_the_key_renews_a_keyed_sign_off(ink: Path) -> None:
    sign_off(ink, "Ada", b"secret")
    assert found(ink, key=b"secret")["sign-off"] is True
    assert found(ink)["sign-off"] is True
    assert found(ink, key=b"guess")["sign-off"] is False
    edited(ink, lambda header, data: header["__metadata__"].__setitem__("ss_steps", "9000"))
    sign_off(ink, "Ada")  # anybody can renew the digest
    assert found(ink, key=b"secret")["sign-off"] is False
    assert "not with this key" in verify(ink, key=b"secret").problem


def test_the_command_fails_where_a_check_fails(lora_vision: Run, ink: Path, tmp_path: Path) -> None:
    assert lora_vision("verify", ink).out.startswith(f"{ink}: all is well")
    (tmp_path / "key").write_text("secret\n")
    signed = lora_vision("verify", ink, "--sign-off", "Ada", "--key", tmp_path / "key", "--json")
    assert signed.code == 0 and signed.json["checks"][-1]["detail"] == "signed off by Ada with this key"
    edited(ink, lambda header, data: data.__setitem__(3, data[3] ^ 1))
    told = lora_vision("verify", ink, "--json")
    assert told.code == 1 and told.json["ok"] is False
    assert "hash" in told.err and told.err.count("\n") == 1
    again = lora_vision("verify", ink, "--sign-off", "Bob")
    assert again.code == 1 and "changed since Ada" in again.out, "what is broken is not signed off"


def test_history_knows_parents_by_their_hash(lora_vision: Run, ink: Path, tmp_path: Path) -> None:
    training = tmp_path / "ink-training"
    training.mkdir()
    told = {"losses": [3.0, None, 1.0], "validation": {"1": 0.5, "2": 0.7}}
    (training / "history.json").write_text(json.dumps(told))
    small = tmp_path / "small.safetensors"
    assert lora_vision("resize", ink, "--rank", 2, "--output", small).code == 0
    ink.rename(tmp_path / "renamed.safetensors")
    training.rename(tmp_path / "renamed-training")
    (tmp_path / "text.safetensors").write_text("no adapter")
    entries = {entry.file: entry for entry in history(tmp_path)}
    assert set(entries) == {"renamed.safetensors", "small.safetensors"}
    parent, child = entries["renamed.safetensors"], entries["small.safetensors"]
    assert (parent.how, parent.steps, parent.base, parent.version) == ("train", 12, "tiny", "0.1.0")
    assert parent.scores == {"loss": 2.0, "held-out loss": 0.7, "best held-out loss": 0.5, "at step": 1}
    assert (child.how, child.parents, child.data) == ("resize", ("renamed.safetensors",), "d" * 64)
    shutil.copy(tmp_path / "renamed.safetensors", tmp_path / "copy.safetensors")
    shutil.copy(tmp_path / "renamed.safetensors", ink)
    assert {entry.file: entry.parents for entry in history(tmp_path)}["small.safetensors"] == (ink.name,)
    for name in ("renamed", "copy", "ink"):
        (tmp_path / f"{name}.safetensors").unlink()
    assert history(tmp_path)[0].parents == ("ink.safetensors (not here)",)
    listed = lora_vision("history", tmp_path)
    assert "of ink.safetensors (not here)" in listed.out
    assert lora_vision("history", tmp_path / "absent").code == 1
    (tmp_path / "empty").mkdir()
    assert lora_vision("history", tmp_path / "empty").out.startswith(f"{tmp_path / 'empty'}: no adapters")
    assert lora_vision("history", tmp_path / "empty", "--json").json == []


def test_two_runs_settings_are_diffed(lora_vision: Run, ink: Path) -> None:
    other = replace(load_adapter(ink), metadata={"lora_vision.config": json.dumps({"rank": 4, "seed": 7, "steps": 3})})
    save_adapter(other, ink.with_name("other.safetensors"))
    words = ["history", ink.parent, "--diff", "ink.safetensors", "--diff", "other.safetensors"]
    told = lora_vision(*words, "--json").json["settings"]
    assert told["seed"] == [0, 7] and told["steps"] == [None, 3] and "rank" not in told
    assert "seed: 0 | 7" in lora_vision(*words).out
    assert lora_vision(*words[:4]).code == 2


def test_lineage_survives_its_own_words() -> None:
    told = lineage.record({"ss_network_dim": "4", "x": "y"}, "merge", [{"file": "a", "sha256": "1"}], {"how": "svd"})
    assert "ss_network_dim" not in told and told["x"] == "y"
    assert lineage.read(told) == lineage.Lineage("merge", ({"file": "a", "sha256": "1"},), {"how": "svd"})
    for nonsense in ("", "[]", "{}", '{"how": 1, "parents": 3, "settings": {}}'):
        assert lineage.read({lineage.KEY: nonsense}) is None


def test_the_card_tells_what_made_the_file(lora_vision: Run, ink: Path, tmp_path: Path) -> None:
    training = tmp_path / "ink-training"
    training.mkdir()
    Image.new("RGB", (8, 8)).save(training / "samples.png")
    told = lora_vision("card", ink, "--licence", "cc-by-4.0")
    assert told.out == f"wrote {training / 'README.md'}\n"
    text = (training / "README.md").read_text()
    front = text.split("---\n")[1]
    assert "license: cc-by-4.0\n" in front and "library_name: diffusers\n" in front
    assert "![Samples over the training steps](samples.png)" in text and "loss.png" not in text
    assert "| rank | 4 |" in text and lineage.sha256_of(ink) in text
    push = lora_vision("push", ink, "ada/ink", "--dry-run", "--json")
    assert push.json == {"repo": "ada/ink", "files": ["README.md", "ink.safetensors", "samples.png"]}
    assert card.bundle(ink)["README.md"] == training / "README.md"
    assert b"license: mit" in card.bundle(ink, "mit")["README.md"]


def test_a_stranger_s_readme_is_not_overwritten(lora_vision: Run, ink: Path) -> None:
    readme = ink.with_name("README.md")
    readme.write_text("# My project\n")
    told = lora_vision("card", ink)
    assert told.code == 1 and "--output" in told.err
    assert readme.read_text() == "# My project\n"


def test_the_licence_of_the_bundled_pictures_is_known(tmp_path: Path) -> None:
    from conftest import ROOT

    for folder in (ROOT / "lora_vision" / "pictures").glob("*/LICENSE"):
        assert card.licence_of(folder.parent) == "apache-2.0"
    assert card.licence_of(tmp_path) is None
    (tmp_path / "LICENSE.txt").write_text("Creative Commons\nAttribution 4.0 International")
    assert card.licence_of(tmp_path) == "cc-by-4.0"


def test_pushing_without_a_login_or_a_network_says_so(ink: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(LoraVisionError, match="you have to be logged in: `hf auth login`"):
        card.push(ink, "ada/ink")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    with pytest.raises(LoraVisionError, match="the Hub did not take ada/ink"):
        card.push(ink, "ada/ink")
    for wrong in ("ink", "ada/my ink", "ada/b/ink", "ada/"):
        with pytest.raises(LoraVisionError, match="USER/NAME"):
            card.push(ink, wrong)
