"""The `lora-vision` command: one settings class and one function for each thing it can do.

Answering --help imports no torch: what a command needs is imported by its function.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lora_vision
from lora_vision import config
from lora_vision.arguments import as_json, near, parse
from lora_vision.errors import LoraVisionError

PROGRAM = "lora-vision"
PACKAGE = Path(__file__).parent
MAIN_PROCESS = os.environ.get("RANK", "0") == "0"
"""Whether this process speaks for all those that `accelerate launch` started."""


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        config: The settings class that its flags fill.
        run: Does the work; returns what to tell a person and what to tell a program (--json). Where the latter says
            ``"ok": False``, the work counts as failed, and ``"problem"`` is why.
        positional: The fields given without a flag.
    """

    config: type[Any]
    run: Callable[[Any], tuple[str, Any]]
    positional: tuple[str, ...] = ()

    def loaded(self) -> Command:
        """This command, its settings at hand."""
        return self


@dataclass(frozen=True)
class Later:
    """A command of a package of its own, imported when it is called or listed: --help of another need not wait."""

    package: str
    config: str
    run: str | Callable[[Any], tuple[str, Any]]
    positional: tuple[str, ...] = ()

    def loaded(self) -> Command:
        """This command, its settings at hand."""
        settings = importlib.import_module(f"lora_vision.{self.package}.settings")
        run = self.run
        if isinstance(run, str):
            run = getattr(importlib.import_module(f"lora_vision.{self.package}.commands"), run)
        return Command(getattr(settings, self.config), run, self.positional)


def train_style(settings: config.StyleConfig) -> tuple[str, Any]:
    """The adapter file that was trained, and how the training went."""
    output = script("train_style").run(settings)
    folder = output.with_name(f"{output.stem}-training")
    history = json.loads((folder / "history.json").read_text()) if MAIN_PROCESS else {}
    return str(output), {"file": output, "folder": folder, **history}


def train_vit(settings: Any) -> tuple[str, Any]:
    """The adapter and head that were trained, and how the training went."""
    output = script("train_vit").run(settings)
    folder = output.with_name(f"{output.stem}-training")
    history = json.loads((folder / "history.json").read_text()) if MAIN_PROCESS else {}
    return str(output), {"file": output, "folder": folder, **history}


def generate(settings: config.GenerateConfig) -> tuple[str, Any]:
    """The pictures that were drawn, and how to draw each again."""
    from lora_vision.generate import generate

    pictures = generate(settings)
    return "\n".join(str(picture["file"]) for picture in pictures), pictures


def inspect(settings: config.InspectConfig) -> tuple[str, Any]:
    """What is in an adapter file."""
    from lora_vision.report import inspect

    report = inspect(settings.file, scan=settings.scan, allow_pickle=settings.allow_pickle)
    return str(report), report.to_dict()


def convert(settings: config.ConvertConfig) -> tuple[str, Any]:
    """The adapter file that was written, and what was lost."""
    from lora_vision.files import convert
    from lora_vision.voices import refuse_overwriting

    refuse_overwriting(settings.output, settings.input)
    options: dict[str, Any] = {"approximate": settings.approximate, "allow_pickle": settings.allow_pickle}
    if settings.base is not None:
        from lora_vision import names
        from lora_vision.base import load_base

        layers = names.index(load_base(settings.base).parts)
        options["base"] = {name: layer.weight for name, layer in layers.items()}
    done = convert(settings.input, settings.output, format=settings.format, **options)
    return str(done), done.to_dict()


def merge(settings: config.MergeConfig) -> tuple[str, Any]:
    """The adapter file that was made of several, and how far it is from their true weighted sum."""
    from lora_vision.combining import merge

    done = merge(settings)
    return str(done), done.to_dict()


def where(settings: config.WhereConfig) -> tuple[str, Any]:
    """The path of a script, a base or a picture set."""
    places = {"tiny": PACKAGE / "tiny" / "base", "pictures": PACKAGE / "pictures"}
    places["fashion"] = PACKAGE / "vit" / "fashion"
    if (tiny_vit := PACKAGE / "tiny" / "vit").is_dir():
        places["tiny-vit"] = tiny_vit
    places |= {folder.name: folder for folder in places["pictures"].glob("*/")}
    for door in ("train_scripts", "pipelines"):
        places |= {file.stem: file for file in _folder(door).glob("[!_]*.py")}
    if settings.name not in places:
        raise LoraVisionError(f"there is no {settings.name!r}: {near(settings.name, places)}")
    path = str(places[settings.name])
    return path, {"name": settings.name, "path": path}


COMMANDS: Mapping[str, Command | Later] = {
    "train style": Command(config.StyleConfig, train_style),
    "train vit": Later("vit", "VitConfig", train_vit),
    "classify": Later("vit", "ClassifyConfig", "classify", ("pictures",)),
    "evaluate": Later("vit", "EvaluateConfig", "evaluate"),
    "export": Later("vit", "ExportConfig", "export"),
    "compare-methods": Later("vit", "CompareMethodsConfig", "compare_methods"),
    "generate": Command(config.GenerateConfig, generate, ("prompts",)),
    "inspect": Command(config.InspectConfig, inspect, ("file",)),
    "convert": Command(config.ConvertConfig, convert, ("input", "output")),
    "extract": Later("tools", "ExtractConfig", "extract", ("tuned", "base")),
    "resize": Later("tools", "ResizeConfig", "resize", ("file",)),
    "bake": Later("tools", "BakeConfig", "bake"),
    "merge": Command(config.MergeConfig, merge, ("adapters",)),
    "compare": Later("tools", "CompareConfig", "compare", ("a", "b")),
    "report": Later("tools", "ReportConfig", "report", ("file",)),
    "verify": Later("tools", "VerifyConfig", "verify", ("file",)),
    "history": Later("tools", "HistoryConfig", "history", ("folder",)),
    "card": Later("tools", "CardConfig", "card", ("file",)),
    "push": Later("tools", "PushConfig", "push", ("file", "repo")),
    "where": Command(config.WhereConfig, where, ("name",)),
}


def _folder(door: str) -> Path:
    """The folder of the training scripts or pipelines: inside the package once installed, beside it in a checkout."""
    installed = PACKAGE / door
    return installed if installed.is_dir() else PACKAGE.parent / door


def script(name: str) -> Any:
    """The module of a training script, from this very package: another checkout may be installed as editable."""
    spec = importlib.util.find_spec("lora_vision.train_scripts")
    ours = spec is not None and str(_folder("train_scripts")) in (spec.submodule_search_locations or ())
    return importlib.import_module(f"{'lora_vision.' if ours else ''}train_scripts.{name}")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of a command line: 0 done, 1 the work failed, 2 wrong use."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = next((name for name in (" ".join(words[:2]), *words[:1]) if name in COMMANDS), None)
    if name is None:
        return _overview(words)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of torchvision, which nothing here needs
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger(lora_vision.__name__).setLevel(logging.INFO)
    command = COMMANDS[name].loaded()
    settings, switches = parse(
        command.config,
        words[len(name.split()) :],
        prog=f"{PROGRAM} {name}",
        positional=command.positional,
        readers={".png": _read_recipe} if name == "generate" else None,
        switches={"json": "tell the outcome as JSON"},
    )
    data: Any = None
    try:
        text, data = command.run(settings)
        if MAIN_PROCESS:
            sys.stdout.write((as_json(data) if "json" in switches else text) + "\n")
        if not (isinstance(data, dict) and data.get("ok") is False):
            return 0
        problem = str(data.get("problem", "failed"))
    except LoraVisionError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{error.filename or ''}: {error.strerror or error}".lstrip(": ")
    except KeyboardInterrupt:
        problem = "stopped by the keyboard"
    except Exception as error:
        if not (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"):
            raise
        problem = f"out of memory ({error}); smaller pictures, smaller batches or a lower precision need less"
    problem = " ".join(problem.split())
    if data is None and "json" in switches and MAIN_PROCESS:
        sys.stdout.write(as_json({"ok": False, "problem": problem}) + "\n")
    sys.stderr.write(f"{PROGRAM} {name}: {problem}\n")
    return 1


def _overview(words: Sequence[str]) -> int:
    """The exit code of a command line that names no command: help and version are fine, the rest is wrong use."""
    if words[:1] == ["--version"]:
        sys.stdout.write(lora_vision.__version__ + "\n")
        return 0
    if words and words[0] not in ("--help", "-h"):
        family = [name for name in COMMANDS if name.split()[0] == words[0]]
        found = " ".join(words[: 2 if family else 1])
        choices = family or {name.split()[0] for name in COMMANDS}
        hint = f"choose from {', '.join(family)}" if family and len(words) == 1 else near(found, choices)
        sys.stderr.write(f"{PROGRAM}: there is no command {found!r}: {hint}\n")
        return 2
    lines = [
        f"  {name:12} {(command.loaded().config.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()
    ]
    text = "\n".join([f"usage: {PROGRAM} COMMAND ...", "", *lines, "", f"{PROGRAM} COMMAND --help tells more."])
    (sys.stdout if words else sys.stderr).write(text + "\n")
    return 0 if words else 2


def _read_recipe(path: Path) -> Mapping[str, Any]:
    """The settings with which a picture was drawn, so that `generate --config picture.png` draws it again."""
    from lora_vision.generate import read_recipe

    settings: Mapping[str, Any] = read_recipe(path)["config"]
    return settings
