"""Command lines from frozen dataclasses: a field is a flag, the text below it the help line, a file may hold values.

Their outcomes are told as JSON.

argparse carries it: tyro, jsonargparse and simple-parsing need 0.21 to 0.3 s of CPU to print the help of one class of
30 fields, twice what a whole command may take here.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import json
import math
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

Config = TypeVar("Config")
Reader = Callable[[Path], Mapping[str, Any]]


class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are one line: what was found, what to do; exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with the message on stderr and exit code 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def near(word: str, choices: Iterable[str]) -> str:
    """The end of an error message: the nearest choice to a mistyped word, or all of them."""
    choices = sorted(choices)
    match = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f"did you mean {match[0]}?" if match else f"choose from {', '.join(choices)}"


def documentation(config: type) -> dict[str, str]:
    """The text below each field of a dataclass and its bases, by field name."""
    texts: dict[str, str] = {}
    for owner in reversed(config.__mro__[:-1]):
        source = Path(sys.modules[owner.__module__].__file__ or "").read_text(encoding="utf-8")
        body = next(n.body for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == owner.__name__)
        for field, text in pairwise(body):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(line))):
                    texts[name] = line
    return texts


def parse(
    config: type[Config],
    argv: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    positional: Sequence[str] = (),
    readers: Mapping[str, Reader] | None = None,
    switches: Mapping[str, str] | None = None,
) -> tuple[Config, set[str]]:
    """The configuration that a command line describes, and which of the switches were given.

    A file named by ``--config`` (.toml or .json, keys as the fields) supplies what the command line does not.
    Wrong use ends the program with one line on stderr and exit code 2.

    Args:
        config: The dataclass to fill.
        argv: The words after the program's name (default: the program's own).
        prog: How the program calls itself in help and errors.
        positional: The fields that take the words without a flag.
        readers: Further kinds of ``--config`` files, by file name suffix.
        switches: Flags that are no fields, with their help lines.
    """
    readers = {".toml": _read_toml, ".json": _read_json, **(readers or {})}
    switches = switches or {}
    parser = _parser(config, prog, positional, readers, switches)
    hints = get_type_hints(config)
    given, unknown = parser.parse_known_intermixed_args(argv)
    values = vars(given)
    flags = [flag for flag in parser._option_string_actions if flag.startswith("--")]
    if unknown:
        word = unknown[0].split("=")[0]
        if not word.startswith("-"):
            parser.error(f"unexpected word {word!r}: every value follows its flag; see {parser.prog} --help")
        parser.error(f"unknown flag {word}: {near(word, flags)}")
    chosen = {name for name in switches if values.pop(name, False)}
    try:
        if path := values.pop("config", None):
            values = {**_from_file(Path(path), readers, hints), **values}
        values = {name: _plain(value, hints[name]) for name, value in values.items()}
        if missing := [name for name in _required(config) if name not in values]:
            parser.error(f"{', '.join(_flag(n, positional) for n in missing)} is missing; see {parser.prog} --help")
        return config(**values), chosen
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _parser(
    config: type,
    prog: str | None,
    positional: Sequence[str],
    readers: Mapping[str, Reader],
    switches: Mapping[str, str],
) -> Parser:
    """The parser of a dataclass; values nobody gives are left out of its namespace."""
    words = " ".join(["%(prog)s", *(name.upper() for name in positional), "[--flag VALUE ...]"])
    parser = Parser(prog, words, config.__doc__, argument_default=argparse.SUPPRESS, allow_abbrev=False, add_help=False)
    hints, texts = get_type_hints(config), documentation(config)
    required = _required(config)
    for field in sorted(dataclasses.fields(config), key=lambda field: field.name not in required):
        kind, several = _kind(hints[field.name])
        if field.name in positional:
            word, nargs = field.name.upper(), "*" if several else "?"
            parser.add_argument(field.name, nargs=nargs, type=kind, help=texts[field.name], metavar=word)
            continue
        options = {} if kind is bool else {"type": _reader(kind, _words(hints[field.name])), "metavar": _metavar(kind)}
        if get_origin(kind) is Literal:
            options = {"choices": get_args(kind)}
        action: Any = argparse.BooleanOptionalAction if kind is bool else "append" if several else "store"
        if field.metadata.get("several"):
            action, options = "extend", {**options, "nargs": "+"}
        text = " ".join(texts[field.name].split()).replace("%", "%%") + (" (may be repeated)" if several else "")
        if field.name in required:
            text += " (required)"
        elif field.default not in (None, "", ()) and field.default is not False:
            text += f" (default: {'yes' if field.default is True else field.default})"
        parser.add_argument(_flag(field.name), action=action, help=text, dest=field.name, **options)
    parser.add_argument("--config", metavar="FILE", help=f"read values from a file ({', '.join(readers)})")
    for name, text in switches.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parser.add_argument("--help", "-h", action="help", help="show this help and exit")
    return parser


def _flag(name: str, positional: Sequence[str] = ()) -> str:
    return name.upper() if name in positional else "--" + name.replace("_", "-")


def _required(config: type) -> list[str]:
    return [f.name for f in dataclasses.fields(config) if f.default is f.default_factory is dataclasses.MISSING]


def _kind(hint: Any) -> tuple[Any, bool]:
    """The type of one value of a field, and whether the field takes several."""
    options = [hint]
    if get_origin(hint) in (types.UnionType, Union):
        options = [option for option in get_args(hint) if option is not type(None)]
    several = [option for option in options if get_origin(option) is tuple]
    return (get_args(several[0])[0], True) if several else (options[0], False)


def _words(hint: Any) -> tuple[str, ...]:
    """The words that a number's field takes too: "auto" of int | Literal["auto"] | None."""
    options = get_args(hint)
    return tuple(w for o in options if int in options and get_origin(o) is Literal for w in get_args(o))


def _reader(kind: Any, words: tuple[str, ...]) -> Any:
    """What reads one value: the type itself, or the type unless it is one of the words."""
    if not words:
        return kind

    def read(text: str) -> Any:
        return text if text in words else kind(text)

    read.__name__ = kind.__name__  # argparse names it when it complains
    return read


def _metavar(kind: Any) -> str:
    return {int: "N", float: "X"}.get(kind, "TEXT")


def _plain(value: Any, hint: Any) -> Any:
    """A value as its field wants it: a tuple, or for a field that may be either, a lone value."""
    if not isinstance(value, list):
        return value
    return value[0] if len(value) == 1 and get_origin(hint) is not tuple else tuple(value)


def _from_file(path: Path, readers: Mapping[str, Reader], hints: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a configuration file, each checked against its field's type."""
    if path.suffix.lower() not in readers:
        raise ValueError(f"--config {path}: a file ending in {', '.join(readers)} is needed")
    values = {}
    for key, value in readers[path.suffix.lower()](path).items():
        name = key.replace("-", "_")
        if name not in hints:
            raise ValueError(f"{path}: unknown setting {key!r}: {near(name, hints)}")
        if not _fits(value, hints[name]):
            kind, several = _kind(hints[name])
            wanted = " | ".join(map(str, get_args(kind))) or kind.__name__
            raise ValueError(f"{path}: {key} = {value!r}, but {'a list of ' if several else ''}{wanted} is needed")
        values[name] = value
    return values


def _fits(value: Any, hint: Any) -> bool:
    kind, several = _kind(hint)
    if several and isinstance(value, list):
        return all(_fits(item, kind) for item in value)
    if several and get_origin(hint) is tuple:
        return False
    if value is None:
        return type(None) in get_args(hint)
    if value in _words(hint):
        return True
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    return type(value) in ((int, float) if kind is float else (kind,))


def as_json(value: Any, indent: int = 2) -> str:
    """The value as JSON that every reader takes: NaN and infinity, which JSON does not know, are null; paths text."""
    return json.dumps(_finite(value), indent=indent, default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _read_toml(path: Path) -> Mapping[str, Any]:
    import tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is no TOML: {error}") from error


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a JSON object of settings is needed, found {type(values).__name__}")
    return values
