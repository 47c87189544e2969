"""The package as a stranger gets it: from a wheel, an sdist, an editable install, a bare checkout."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from lora_vision import __version__

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DOORS = ("train_scripts", "pipelines")


def run(*words: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command run away from the checkout: nothing on PYTHONPATH but what is given."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = {**inherited, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment}
    return subprocess.run([str(word) for word in words], cwd=cwd, env=environment, capture_output=True, text=True)


def done(*words: object, cwd: Path, **environment: str) -> str:
    """What a command prints that must succeed."""
    process = run(*words, cwd=cwd, **environment)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


@dataclass(frozen=True)
class Home:
    """One way to have the package.

    Attributes:
        command: The words that start `lora-vision`.
        python: Its interpreter.
        environment: Variables both need.
        away: A folder far from the checkout.
    """

    command: tuple[str, ...]
    python: Path
    environment: dict[str, str]
    away: Path

    def lora_vision(self, *words: object) -> str:
        return done(*self.command, *words, cwd=self.away, **self.environment)

    def run_python(self, code: str) -> subprocess.CompletedProcess[str]:
        return run(self.python, "-c", code, cwd=self.away, **self.environment)


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project as git would hand it out."""
    copy = tmp_path_factory.mktemp("checkout") / "lora_vision_checkout"
    if not (ROOT / ".git").exists():
        return Path(shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info")))
    for name in done("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


def build_wheel(source: Path, folder: Path) -> Path:
    """The wheel built from a source folder with nothing but the setuptools at hand."""
    done(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = shutil.copytree(checkout, tmp_path_factory.mktemp("source") / "source")
    return build_wheel(copy, tmp_path_factory.mktemp("wheel"))


def empty_environment(folder: Path, what: list[object], *, dependencies: bool = True) -> Path:
    """The bin folder of a fresh environment with one thing installed; dependencies are lent by this one's."""
    venv.create(folder, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    if dependencies:  # a .pth line puts the folder on the path, but does not read the .pth files in it
        (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = folder / "bin" / "python"
    done(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", *what, cwd=folder)
    return python.parent


@pytest.fixture(scope="session", params=["wheel", "editable", "checkout"])
def home(request: pytest.FixtureRequest, checkout: Path, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Home:
    """Each way to have the package."""
    away = tmp_path_factory.mktemp("away")
    if request.param == "checkout":
        command = (sys.executable, "-m", "lora_vision")
        return Home(command, Path(sys.executable), {"PYTHONPATH": str(checkout)}, away)
    what = [wheel] if request.param == "wheel" else ["--no-build-isolation", "--editable", checkout]
    binaries = empty_environment(tmp_path_factory.mktemp(request.param), what)
    return Home((str(binaries / "lora-vision"),), binaries / "python", {}, away)


def test_every_folder_of_code_is_packaged(checkout: Path, wheel: Path) -> None:
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    code = {".".join(path.relative_to(checkout).parts[:-1]) for path in (checkout / "lora_vision").rglob("*.py")}
    assert listed == code | {f"lora_vision.{door}" for door in DOORS}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {path.relative_to(checkout) for path in (checkout / "lora_vision").rglob("*") if path.is_file()}
    expected |= {Path("lora_vision", door, path.name) for door in DOORS for path in (checkout / door).glob("*.py")}
    assert packed == {path.as_posix() for path in expected}


def test_wheel_brings_the_base_the_pictures_and_their_licences(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "lora_vision/py.typed" in names
    assert "lora_vision/tiny/base/model_index.json" in names
    styles = {name.split("/")[2] for name in names if re.fullmatch(r"lora_vision/pictures/[^/]+/[^/]+\.png", name)}
    assert len(styles) >= 2
    for style in styles:
        assert any(re.match(rf"lora_vision/pictures/{style}/LICEN[CS]E", name) for name in names), style
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_sdist_builds_the_same_wheel(checkout: Path, wheel: Path, tmp_path: Path) -> None:
    source = shutil.copytree(checkout, tmp_path / "source")
    script = f"import setuptools.build_meta as b; print(b.build_sdist({str(tmp_path)!r}))"
    archive = tmp_path / done(sys.executable, "-c", script, cwd=source).splitlines()[-1]
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert (unpacked / "tests" / "conftest.py").is_file()
    again = zipfile.ZipFile(build_wheel(unpacked, tmp_path))
    assert sorted(again.namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def test_help_needs_no_dependency_at_all(wheel: Path, tmp_path: Path) -> None:
    binaries = empty_environment(tmp_path / "empty", [wheel], dependencies=False)
    assert "train style" in done(binaries / "lora-vision", "--help", cwd=tmp_path)
    assert "--rank" in done(binaries / "lora-vision", "train", "style", "--help", cwd=tmp_path)
    assert Path(done(binaries / "lora-vision", "where", "train_style", cwd=tmp_path)).is_file()


def test_command_and_scripts_are_found_from_elsewhere(home: Home) -> None:
    assert home.lora_vision("--version") == __version__
    for name in ("train_style", "tiny", "pictures"):
        assert Path(home.lora_vision("where", name)).exists()
    code = "from lora_vision.cli import script; import sys; m = script('train_style'); print(m.__name__, m.__file__)"
    process = home.run_python(code)
    assert process.returncode == 0, process.stderr
    module, file = process.stdout.split()
    assert module.removeprefix("lora_vision.") == "train_scripts.train_style"
    assert Path(file) == Path(home.lora_vision("where", "train_style"))


def test_no_top_level_module_leaks(home: Home) -> None:
    if "PYTHONPATH" in home.environment:
        pytest.skip("in a bare checkout the folders are the modules")
    for door in DOORS:
        assert "ModuleNotFoundError" in home.run_python(f"import {door}").stderr
        assert home.run_python(f"import lora_vision.{door}").returncode == 0


@pytest.mark.parametrize("home", ["wheel"], indirect=True)
def test_wheel_trains_and_draws(home: Home) -> None:
    """The main job, far from the checkout, with what the package brings along."""
    style = sorted(path.name for path in Path(home.lora_vision("where", "pictures")).iterdir() if path.is_dir())[0]
    pictures = home.lora_vision("where", style)
    settings = "--steps 2 --batch-size 2 --rank 2 --sample-every 0 --validate-every 0".split()
    home.lora_vision("train", "style", "--data", pictures, "--output", "ink.safetensors", *settings)
    home.lora_vision("generate", "a fox", "--adapter", "ink.safetensors:0.8", "--steps", 2)
    assert (home.away / "out.png").stat().st_size > 1000


def normal(name: str) -> str:
    """A distribution's name without version, in the one spelling."""
    return re.split(r"[^\w.-]", name)[0].lower().replace("_", "-")


def imported_modules(path: Path) -> set[str]:
    """Top-level names of what a file imports, the library itself and Python's own left out."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        names |= {node.module or ""} if isinstance(node, ast.ImportFrom) else set()
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"lora_vision"}


def test_declared_dependencies_are_those_imported() -> None:
    needs = {normal(line) for line in PROJECT["project"]["dependencies"]}
    extras = {normal(line) for group in PROJECT["project"]["optional-dependencies"].values() for line in group}
    owners, found = packages_distributions(), set()
    for folder in ("lora_vision", *DOORS):
        for path in (ROOT / folder).rglob("*.py"):
            for module in imported_modules(path):
                owner = normal(owners.get(module, [module])[0])
                assert owner in needs | extras, f"{path.name} imports {module}, which pyproject.toml does not name"
                found.add(owner)
    assert needs <= found, f"declared, but never imported: {needs - found}"


def test_constraints_hold_every_dependency() -> None:
    pinned = {normal(line) for line in (ROOT / "constraints-cpu.txt").read_text().splitlines() if "==" in line}
    extras = PROJECT["project"]["optional-dependencies"]
    needs = {normal(line) for line in [*PROJECT["project"]["dependencies"], *extras["test"], *extras["dev"]]}
    assert needs - {"lora-vision"} <= pinned
