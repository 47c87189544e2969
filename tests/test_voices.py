"""What users write about adapters is read as they mean it, or refused with what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest
from kinds import adapter
from torch import nn

from lora_vision.arguments import parse
from lora_vision.config import GenerateConfig
from lora_vision.errors import AdapterError
from lora_vision.schedules import Moment
from lora_vision.voices import read_schedules, read_shelf, read_sweeps, read_tags, read_voices, with_named


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of these names, in the working folder and in one below it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shelf" / "below").mkdir(parents=True)
    here = ["ink.safetensors", "with:colon", r"C:\styles\gold.safetensors", "a@b.safetensors"]
    for name in [*here, "shelf/oil.safetensors", "shelf/below/chalk.pt", "shelf/chalk.safetensors", "shelf/notes.txt"]:
        Path(name).write_bytes(name.encode())
    return tmp_path


def test_adapters_are_named_by_file_and_scale() -> None:
    texts = ["ink.safetensors", "ink.safetensors:0.8", "ink.safetensors:-1e-1", "with:colon", "with:colon:2"]
    voices = read_voices([*texts, r"C:\styles\gold.safetensors", r"C:\styles\gold.safetensors:.5"])
    assert [voice.scale for voice in voices] == [1, 0.8, -0.1, 1, 2, 1, 0.5]
    assert [voice.file for voice in voices[:5]] == ["ink.safetensors"] * 3 + ["with:colon"] * 2
    assert [voice.file for voice in voices[5:]] == [r"C:\styles\gold.safetensors"] * 2
    assert len({voice.name for voice in voices}) == 7
    assert [voice.name for voice in voices[:3]] == ["ink", "ink-2", "ink-3"]
    assert voices[0].sha256 == voices[1].sha256 != voices[3].sha256


def test_layers_may_have_scales_of_their_own() -> None:
    texts = ["ink.safetensors:0.8@unet.up_blocks.*=0.5@text_encoder=0", "a@b.safetensors:2", "a@b.safetensors@unet=-1"]
    first, second, third = read_voices(texts)
    assert first.weight() == {"*": 0.8, "unet.up_blocks.*": 0.5, "text_encoder": 0}
    assert first.weight(0.1) == {"*": 0.1, "unet.up_blocks.*": 0.5, "text_encoder": 0}
    assert second.weight() == 2 and third.weight() == {"*": 1, "unet": -1} and third.file == "a@b.safetensors"


def test_files_of_a_folder_are_called_by_name() -> None:
    shelf = read_shelf("shelf")
    assert set(shelf) == {"oil", "chalk"}
    (oil,) = read_voices(["oil:0.5@unet=1"], shelf)
    assert (oil.file, oil.scale, oil.name) == (str(Path("shelf/oil.safetensors")), 0.5, "oil")
    assert [voice.name for voice in with_named([oil], ["oil", "oil"], shelf)] == ["oil"]
    for call in (lambda: read_voices(["chalk"], shelf), lambda: with_named([], ["chalk"], shelf)):
        with pytest.raises(AdapterError, match="2 files are called 'chalk'"):
            call()
    with pytest.raises(AdapterError, match="did you mean oil"):
        with_named([], ["oli"], shelf)


@pytest.mark.parametrize(
    "text",
    ["ink.safetensors:high", "ink.safetensors:", "ink.safetensors:nan", "absent:0.5", "x", "ink.safetensors@unet", "@"],
)
def test_wrong_adapters_are_named(text: str) -> None:
    with pytest.raises(AdapterError, match=f"--adapter {text}: "):
        read_voices([text])


def test_tags_are_taken_out_of_the_prompt() -> None:
    assert read_tags("a fox") == ("a fox", {})
    assert read_tags("<lora:ink:0.8>a fox, <lora:old gold>red") == ("a fox, red", {"ink": 0.8, "old gold": 1})
    for wrong in ("<lora:ink:high>", "<lora:>", "<lora:ink:1:2>", "<lora:ink:1> <lora:ink:2>"):
        with pytest.raises(AdapterError, match="<lora:ink:0.8>"):
            read_tags(f"a fox {wrong}")


def test_sweeps_are_lists_with_dots() -> None:
    assert read_sweeps(["ink=0,0.25,...,1"]) == {"ink": [0, 0.25, 0.5, 0.75, 1]}
    assert read_sweeps(["ink=1,0.5,…,-1 gold=0,2"]) == {"ink": [1, 0.5, 0, -0.5, -1], "gold": [0, 2]}
    for wrong in ("ink", "=1", "ink=", "ink=0,much", "ink=0,...,1", "ink=0,0.3,...,1", "ink=1,1,...,1", "ink=0 ink=1"):
        with pytest.raises(AdapterError, match="expected NAME=SCALE"):
            read_sweeps([wrong])
    with pytest.raises(AdapterError, match="two sides"):
        read_sweeps(["a=0", "b=0 c=0"])


def test_a_sweep_takes_several_words() -> None:
    words = ["a fox", "--sweep", "ink=0,0.5,...,1", "gold=0,1", "--seed", "3"]
    settings, _ = parse(GenerateConfig, words, positional=("prompts",))
    assert (settings.prompts, settings.sweep) == (("a fox",), ("ink=0,0.5,...,1", "gold=0,1"))
    assert read_sweeps(settings.sweep) == {"ink": [0, 0.5, 1], "gold": [0, 1]}


def test_schedules_are_told_by_name_or_for_all() -> None:
    layers = {"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": nn.Linear(8, 8)}
    adapters = {name: adapter(layers, seed=seed) for seed, name in enumerate(["ink", "gold"])}
    first, last = Moment(0, 5), Moment(4, 5)
    found = read_schedules(["ink=linear:0:2", "gold=cosine"], adapters)
    assert [found["ink"](m) for m in (first, last)] == [0, 2] and [found["gold"](m) for m in (first, last)] == [1, 0]
    found = read_schedules(["window:0:0.5", "ink=list:3:4"], adapters)
    assert [found[name](last) for name in adapters] == [4, 0]
    found = read_schedules(["switch:2"], adapters)
    assert [found["ink"](Moment(step, 5)) for step in range(5)] == [1, 1, 0, 0, 1]
    assert set(read_schedules(["klora"], adapters)) == set(adapters)
    for wrong in (
        "ink=liner",
        "inc=linear",
        "linear:1",
        "ink=window",
        "list",
        "switch:0",
        "ink=switch",
        "constant:inf",
    ):
        with pytest.raises(AdapterError, match=f"--schedule {wrong}: "):
            read_schedules([wrong], adapters)
    with pytest.raises(AdapterError, match="exactly two adapters"):
        read_schedules(["klora"], {"ink": adapters["ink"]})
