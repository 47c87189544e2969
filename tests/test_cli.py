"""Each command as a new user meets it: right, mistyped, with an empty folder, with a wrong file."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Outcome
from models import write_pictures

from lora_vision import __version__, cli, load_adapter, save_adapter
from lora_vision.adapter import Adapter
from lora_vision.errors import LoraVisionError
from lora_vision.factors import Dora

Run = Callable[..., Outcome]
FEW = "--steps 2 --batch-size 2 --rank 2 --sample-every 0".split()


def failed(outcome: Outcome, *said: str, code: int = 1) -> None:
    """Checks that a command line ended with its code and one clear line."""
    assert outcome.code == code
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    line = outcome.err.removesuffix("\n").split("\n")[-1]
    assert line.startswith("lora-vision")
    for part in said:
        assert part in line


# Finding one's way


@pytest.mark.parametrize("words", ["", *cli.COMMANDS])
def test_help_is_quick(words: str) -> None:
    """Under 0.2 s of CPU, the interpreter's own start included."""
    costs = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "lora_vision", *words.split(), "--help"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        costs.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if costs[-1] < 0.2:
            break
    assert done.stdout.startswith(f"usage: lora-vision {words}")
    assert min(costs) < 0.2


def test_overview_lists_every_command(lora_vision: Run) -> None:
    outcome = lora_vision("--help")
    assert outcome.code == 0
    for name, command in cli.COMMANDS.items():
        assert f"  {name:12} {(command.loaded().config.__doc__ or '').splitlines()[0]}" in outcome.out
    assert lora_vision("--version") == Outcome(0, f"{__version__}\n", "")
    nothing = lora_vision()
    assert (nothing.code, nothing.out) == (2, "")
    assert nothing.err == outcome.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("generat x", "there is no command 'generat': did you mean generate?"),
        ("trian style", "there is no command 'trian': did you mean train?"),
        ("train", "there is no command 'train': choose from train style, train vit"),
        ("train stile", "there is no command 'train stile': did you mean train style?"),
        (
            "--halp",
            f"there is no command '--halp': choose from {', '.join(sorted({n.split()[0] for n in cli.COMMANDS}))}",
        ),
    ],
)
def test_mistyped_commands_are_told_the_nearest(lora_vision: Run, words: str, said: str) -> None:
    failed(lora_vision(*words.split()), said, code=2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("generate x --adaptor y", "unknown flag --adaptor: did you mean --adapter?"),
        ("generate --seed 3", "PROMPTS is missing; see lora-vision generate --help"),
        ("generate x --steps many", "argument --steps: invalid int value: 'many'"),
        ("generate x --output x.jpg", "--output x.jpg: a name ending in .png is needed"),
        ("train style --data x", "--output is missing"),
        ("train style --data x --output y.safetensors --rnak 4", "unknown flag --rnak: did you mean --rank?"),
        ("inspect", "FILE is missing"),
        ("inspect a b", "unexpected word 'b'"),
        ("convert a", "OUTPUT is missing"),
        ("convert a b --format koyha", "invalid choice: 'koyha' (choose from 'kohya', 'diffusers', 'peft')"),
    ],
)
def test_mistyped_flags_are_told_the_nearest(lora_vision: Run, words: str, said: str) -> None:
    failed(lora_vision(*words.split()), said, code=2)


def test_where_finds_what_the_package_brings(lora_vision: Run) -> None:
    from lora_vision.base import EMBEDDED

    assert lora_vision("where", "tiny").out == f"{EMBEDDED['tiny']}\n"
    assert lora_vision("where", "train_style").out == f"{ROOT / 'train_scripts' / 'train_style.py'}\n"
    assert lora_vision("where", "pictures", "--json").json == {
        "name": "pictures",
        "path": str(ROOT / "lora_vision" / "pictures"),
    }
    for style in (ROOT / "lora_vision" / "pictures").glob("*/"):
        assert Path(lora_vision("where", style.name).out.strip()) == style
    failed(lora_vision("where", "trian_style"), "there is no 'trian_style': did you mean train_style?")


# The main job


def test_train_then_generate(lora_vision: Run, sd1_folder: Path, tmp_path: Path) -> None:
    pictures, ink, picture = write_pictures(tmp_path / "in"), tmp_path / "ink.safetensors", tmp_path / "out.png"
    few = tmp_path / "few.toml"
    few.write_text(f"base = '{sd1_folder}'\nsteps = 9\nrank = 2\nbatch-size = 2\nsample-every = 0\n")
    files = ["--data", pictures, "--output", ink, "--config", few]
    trained = lora_vision("train", "style", *files, "--steps", 2, "--json")
    assert trained.code == 0, trained.err
    assert trained.json["file"] == str(ink)
    assert len(trained.json["losses"]) == 2
    assert ink.is_file()

    asked = ["--base", sd1_folder, "--adapter", f"{ink}:0.8", "--steps", 2, "--output", picture]
    drawn = lora_vision("generate", "a fox", *asked)
    assert (drawn.code, drawn.out) == (0, f"{picture}\n"), drawn.err
    again = lora_vision("generate", "--config", picture, "--output", tmp_path / "again.png", "--json")
    assert again.json[0]["config"]["adapter"] == [f"{ink}:0.8"]
    assert (tmp_path / "again.png").read_bytes() == picture.read_bytes()
    lora_vision("generate", "--config", picture, "--output", tmp_path / "other.png", "--seed", 1)
    assert (tmp_path / "other.png").read_bytes() != picture.read_bytes()


def test_inspect_tells_what_is_inside(lora_vision: Run, sd1_adapters: tuple[Path, Path], tmp_path: Path) -> None:
    ink, _ = sd1_adapters
    told = lora_vision("inspect", ink)
    assert told.code == 0
    assert told.out.startswith(f"{ink}: ")
    assert "rank 2" in told.out
    assert lora_vision("inspect", ink, "--json").json["algorithms"] == {"LoRA": 32}
    script = (
        f"from lora_vision.cli import main; main(['inspect', {str(ink)!r}]); import sys; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
    text = tmp_path / "text.safetensors"
    text.write_text("this is no adapter at all")
    failed(lora_vision("inspect", text), str(text))
    failed(lora_vision("inspect", tmp_path / "absent.safetensors"), "no such file")


@pytest.mark.parametrize("format", ["diffusers", "peft"])
def test_convert_loses_nothing(lora_vision: Run, sd1_adapters: tuple[Path, Path], tmp_path: Path, format: str) -> None:
    ink, _ = sd1_adapters
    other, back = tmp_path / "other.safetensors", tmp_path / "back.safetensors"
    told = lora_vision("convert", ink, other, "--format", format)
    assert (told.code, told.out) == (0, f"wrote {other}: 32 layers, {format} format, without loss\n"), told.err
    assert lora_vision("inspect", other, "--json").json["format"] == format
    assert lora_vision("convert", other, back, "--json").json["errors"] == {}
    failed(lora_vision("convert", back, back, "--format", format), "would overwrite what it is made of")
    first, last = load_adapter(ink), load_adapter(back)
    assert first.layers.keys() == last.layers.keys()
    assert all(torch.equal(first.layers[name].delta(), last.layers[name].delta()) for name in first.layers)


def test_convert_approximates_only_when_asked(
    lora_vision: Run, sd1_folder: Path, sd1_adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    """DoRA multiplies the base's weights: only with them it becomes a pair, and not without loss."""
    layers = load_adapter(sd1_adapters[0]).layers
    dora = {name: Dora(inner=layer, magnitude=torch.ones(layer.delta().shape[0])) for name, layer in layers.items()}
    save_adapter(Adapter(dora, {}, {}), tmp_path / "dora.safetensors")
    words = ["convert", tmp_path / "dora.safetensors", tmp_path / "pairs.safetensors", "--approximate", 2]
    failed(lora_vision(*words), "base")
    assert not (tmp_path / "pairs.safetensors").exists()
    told = lora_vision(*words, "--base", sd1_folder, "--json")
    assert told.code == 0, told.err
    assert set(told.json["errors"]) == set(layers)
    assert lora_vision("inspect", tmp_path / "pairs.safetensors", "--json").json["algorithms"] == {"LoRA": 32}


# What goes wrong


def test_training_is_refused_before_it_starts(lora_vision: Run, sd1_folder: Path, tmp_path: Path) -> None:
    def train(data: Path, output: object = tmp_path / "ink.safetensors", base: object = sd1_folder) -> Outcome:
        return lora_vision("train", "style", "--data", data, "--output", output, "--base", base, *FEW)

    empty = tmp_path / "empty"
    empty.mkdir()
    failed(train(empty), str(empty))
    failed(train(tmp_path / "absent"), str(tmp_path / "absent"))
    pictures = write_pictures(tmp_path / "pictures")
    failed(train(pictures, base="absent"), "there is no base 'absent'")
    failed(train(pictures, base=pictures), str(pictures), "model_index.json")
    (tmp_path / "file").write_text("no folder")
    failed(train(pictures, tmp_path / "file" / "ink.safetensors"), "cannot be written")
    broken = pictures / "zz.png"
    broken.write_bytes(b"no picture")
    failed(train(pictures), "zz.png")
    assert not (tmp_path / "ink.safetensors").exists()


def test_generating_with_a_wrong_file_names_it(lora_vision: Run, sd1_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.safetensors"
    text.write_text("this is no adapter at all")
    failed(lora_vision("generate", "a fox", "--base", sd1_folder, "--adapter", text), str(text))
    failed(lora_vision("generate", "a fox", "--adapter", "absent.safetensors:0.5"), "there is no such file")
    failed(lora_vision("generate", "a fox", "--base", text), str(text))
    failed(lora_vision("generate", "--config", text), "a file ending in .toml, .json, .png", code=2)
    failed(lora_vision("generate", "a fox", "--config", "absent.png"), "absent.png is no picture", code=2)


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (LoraVisionError("found this\nexpected that"), "found this expected that"),
        (PermissionError(13, "Permission denied", "ink.safetensors"), "ink.safetensors: Permission denied"),
        (OSError("the disk is full"), "the disk is full"),
        (MemoryError("no 3 GB"), "out of memory (no 3 GB)"),
        (KeyboardInterrupt(), "stopped by the keyboard"),
    ],
)
def test_what_fails_is_one_line(
    lora_vision: Run, monkeypatch: pytest.MonkeyPatch, problem: BaseException, said: str
) -> None:
    monkeypatch.setitem(cli.COMMANDS, "where", cli.Command(cli.config.WhereConfig, raiser(problem), ("name",)))
    outcome = lora_vision("where", "x")
    failed(outcome, said)
    assert outcome.err.count("\n") == 1
    told = lora_vision("where", "x", "--json").json
    assert told["ok"] is False and outcome.err == f"lora-vision where: {told['problem']}\n"


def test_our_own_mistakes_keep_their_traceback(lora_vision: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    command = cli.Command(cli.config.WhereConfig, raiser(RuntimeError("a bug")), ("name",))
    monkeypatch.setitem(cli.COMMANDS, "where", command)
    with pytest.raises(RuntimeError, match="a bug"):
        lora_vision("where", "x")


def raiser(problem: BaseException) -> Callable[[Any], tuple[str, Any]]:
    def run(settings: object) -> tuple[str, Any]:
        raise problem

    return run


def test_one_of_several_processes_speaks(lora_vision: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "MAIN_PROCESS", False)
    assert lora_vision("where", "tiny") == Outcome(0, "", "")


def test_a_script_run_by_itself_is_the_command() -> None:
    script = ROOT / "train_scripts" / "train_style.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script, "--data", "x"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "lora-vision train style: --output is missing; see lora-vision train style --help\n"
