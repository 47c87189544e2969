"""Command lines and configuration files become settings, or one clear line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from lora_vision.arguments import as_json, documentation, near, parse


@dataclass(frozen=True, kw_only=True)
class Parent:
    """What both need."""

    seed: int = 7
    """Where chance begins."""


@dataclass(frozen=True, kw_only=True)
class Settings(Parent):
    """Boil an egg."""

    eggs: tuple[str, ...]
    """Which eggs."""
    pot: str
    """Which pot, 100 % clean."""
    minutes: float = 4.5
    """How long."""
    salt: bool = True
    """Whether the water is salted."""
    heat: Literal["low", "high"] = "low"
    """How hot."""
    guests: str | tuple[str, ...] | None = None
    """Who eats."""
    spoons: int | None = None
    """How many spoons."""

    def __post_init__(self) -> None:
        if self.minutes <= 0:
            raise ValueError(f"--minutes {self.minutes}: more than 0 are needed")


def boil(*words: str) -> Settings:
    return parse(Settings, words, prog="boil", positional=["eggs"], switches={"json": "as JSON"})[0]


def complaint(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that wrong use ends with."""
    with pytest.raises(SystemExit) as stop:
        boil(*words)
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err.removesuffix("\n")


def test_defaults_and_every_kind_of_value() -> None:
    assert boil("a", "--pot", "p") == Settings(eggs=("a",), pot="p")
    words = [
        "a",
        "--minutes",
        "3",
        "b",
        "--no-salt",
        "--heat",
        "high",
        "--guests",
        "x",
        "--guests",
        "y",
        "--spoons",
        "2",
        "--seed",
        "1",
        "--pot",
        "p",
        "c",
    ]
    assert boil(*words) == Settings(
        eggs=("a", "b", "c"), pot="p", minutes=3.0, salt=False, heat="high", guests=("x", "y"), spoons=2, seed=1
    )
    assert boil("a", "--pot", "p", "--guests", "x").guests == "x"


def test_switches_are_told_apart_from_settings() -> None:
    words = ["a", "--pot", "p"]
    assert parse(Settings, words, positional=["eggs"], switches={"json": ""})[1] == set()
    assert parse(Settings, [*words, "--json"], positional=["eggs"], switches={"json": ""})[1] == {"json"}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("a --pto p", "boil: unknown flag --pto: did you mean --pot?"),
        ("a", "boil: --pot is missing; see boil --help"),
        ("--pot p", "boil: EGGS is missing; see boil --help"),
        ("a --pot p --spoons two", "boil: argument --spoons: invalid int value: 'two'"),
        ("a --pot p --heat hot", "boil: argument --heat: invalid choice: 'hot' (choose from "),
        ("a --pot p --minutes 0", "boil: --minutes 0.0: more than 0 are needed"),
        ("a --pot p --config boil.ini", "boil: --config boil.ini: a file ending in .toml, .json is needed"),
        ("a --pot p --config absent.toml", "boil: [Errno 2] No such file or directory: 'absent.toml'"),
    ],
)
def test_wrong_use_is_one_line(capsys: pytest.CaptureFixture[str], words: str, line: str) -> None:
    assert complaint(capsys, *words.split()).startswith(line)


@pytest.mark.parametrize("flag", ["--minute", "--sed", "--xyz"])
def test_flags_are_never_guessed(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    assert f"unknown flag {flag}" in complaint(capsys, "a", "--pot", "p", flag, "3")


def test_help_names_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        boil("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "usage: boil EGGS [--flag VALUE ...] Boil an egg." in text
    assert "--pot TEXT Which pot, 100 % clean. (required)" in text
    assert "--seed N Where chance begins. (default: 7)" in text
    assert "--salt, --no-salt Whether the water is salted. (default: yes)" in text
    assert "--guests TEXT Who eats. (may be repeated)" in text


def test_documentation_is_the_text_below_the_field() -> None:
    texts = documentation(Settings)
    assert texts["seed"] == "Where chance begins."
    assert texts["eggs"] == "Which eggs."
    assert len(texts) == 8


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_a_file_supplies_what_the_command_line_does_not(tmp_path: Path) -> None:
    toml = write(tmp_path, "boil.toml", 'eggs = ["a", "b"]\npot = "p"\nminutes = 3\nguests = ["x", "y"]\nsalt = false')
    expected = Settings(eggs=("a", "b"), pot="p", minutes=3, guests=("x", "y"), salt=False)
    assert boil("--config", toml) == expected
    values: dict[str, Any] = {"eggs": ["a", "b"], "pot": "p", "minutes": 3.0, "guests": ["x", "y"], "salt": False}
    assert boil("--config", write(tmp_path, "boil.json", json.dumps({**values, "spoons": None}))) == expected
    assert boil("c", "--config", toml, "--pot", "q", "--salt").pot == "q"
    assert boil("c", "--config", toml).eggs == ("c",)


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("boil.toml", 'pott = "p"', "unknown setting 'pott': did you mean pot?"),
        ("boil.toml", 'minutes = "3"', "minutes = '3', but float is needed"),
        ("boil.toml", "spoons = 1.5", "spoons = 1.5, but int is needed"),
        ("boil.toml", "spoons = true", "spoons = True, but int is needed"),
        ("boil.toml", 'heat = "hot"', "heat = 'hot', but low | high is needed"),
        ("boil.toml", 'eggs = "a"', "eggs = 'a', but a list of str is needed"),
        ("boil.toml", "eggs = [1]", "eggs = [1], but a list of str is needed"),
        ("boil.toml", "pot = ", "is no TOML: "),
        ("boil.json", "{", "is no JSON: "),
        ("boil.json", "[1]", "a JSON object of settings is needed, found list"),
    ],
)
def test_a_wrong_file_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, text: str, line: str
) -> None:
    said = complaint(capsys, "--config", write(tmp_path, name, text))
    assert f"{tmp_path / name}" in said
    assert line in said


def test_further_kinds_of_files_have_their_reader(tmp_path: Path) -> None:
    words = ["--config", write(tmp_path, "eggs.txt", "a b")]
    readers = {".txt": lambda path: {"eggs": path.read_text().split(), "pot": "p"}}
    assert parse(Settings, words, positional=["eggs"], readers=readers)[0].eggs == ("a", "b")


def test_outcomes_are_json_that_every_reader_takes() -> None:
    told = as_json({"loss": [1.5, float("nan")], "by step": {3: float("-inf")}, "file": Path("a"), "of": ("b", None)})
    assert json.loads(told, parse_constant=lambda word: pytest.fail(f"{word} is no JSON")) == {
        "loss": [1.5, None],
        "by step": {"3": None},
        "file": "a",
        "of": ["b", None],
    }


def test_near_suggests_or_lists() -> None:
    assert near("--adaptor", ["--adapter", "--base"]) == "did you mean --adapter?"
    assert near("zzz", ["b", "a"]) == "choose from a, b"


@dataclass(frozen=True, kw_only=True)
class Oven:
    """Bake."""

    heat: int | Literal["auto"] | None = None
    """How hot."""


def test_a_number_may_have_a_word_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, wanted in (("180", 180), ("auto", "auto")):
        assert parse(Oven, ["--heat", text])[0].heat == wanted
        assert parse(Oven, ["--config", write(tmp_path, "oven.json", json.dumps({"heat": wanted}))])[0].heat == wanted
    with pytest.raises(SystemExit):
        parse(Oven, ["--heat", "hot"])
    assert "invalid int value: 'hot'" in capsys.readouterr().err
