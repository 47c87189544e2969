"""The house rules of the README, read off the source."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = sorted((ROOT / "lora_vision").rglob("*.py"))
SOURCES = [*LIBRARY, *(ROOT / "train_scripts").glob("*.py"), *(ROOT / "pipelines").glob("*.py")]

# From the bottom of the house to the top: a module imports only what stands before it.
WINGS = (
    "errors whole config arguments",
    "names targets factors replacement adapter spectrum lineage approximate quantised layers gains originals rooms "
    "stack trained inject formats files klora combine report words",
    "tiny base data metadata buckets captions cache encoding survey sheet charts batches losses samples "
    "optimizers devices training",
    "schedules regions conduct blend choices blending voices generate ziplora combining tools vit cli __main__",
)
FLOORS = " ".join(WINGS).split()
ADAPTER_WING = WINGS[1].split()


def name_of(path: Path) -> str:
    """lora_vision/formats/kohya.py -> lora_vision.formats.kohya"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, everywhere: bool = True) -> set[str]:
    """The modules that a file imports, anywhere in it or at its top only."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(path: Path) -> set[str]:
    """The modules of the library that a file imports."""
    modules = {name_of(source) for source in LIBRARY} - {"lora_vision"}
    found = set()
    for name in imports(path):
        candidates = [module for module in modules if name == module or name.startswith(f"{module}.")]
        found |= {max(candidates, key=len)} if candidates else set()
    return found - {name_of(path)}


def floor(module: str) -> int:
    return FLOORS.index(module.split(".")[1])


@pytest.mark.parametrize("path", [path for path in LIBRARY if name_of(path) != "lora_vision"], ids=name_of)
def test_imports_run_downward(path: Path) -> None:
    module = name_of(path)
    assert module.split(".")[1] in FLOORS, f"give {module} a floor in this test and in the README"
    upward = {other for other in own_imports(path) if floor(other) > floor(module)}
    assert not upward, f"{module} imports what stands above it: {upward}"


def test_imports_have_no_cycle() -> None:
    graph = {name_of(path): own_imports(path) for path in LIBRARY if name_of(path) != "lora_vision"}
    assert list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_nobody_imports_the_doors(path: Path) -> None:
    doors = re.compile(r"(lora_vision\.)?(train_scripts|pipelines)\b")
    assert not [name for name in imports(path) if doors.match(name)]


def test_adapter_wing_needs_torch_and_safetensors_only() -> None:
    allowed = {"lora_vision", "safetensors", "torch", *sys.stdlib_module_names}
    for path in LIBRARY:
        if name_of(path) != "lora_vision" and name_of(path).split(".")[1] in ADAPTER_WING:
            foreign = {name.split(".")[0] for name in imports(path, everywhere=False)} - allowed
            assert not foreign, f"{path.name} imports {foreign}"


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import lora_vision, lora_vision.cli", "torch numpy PIL safetensors diffusers transformers accelerate"),
        ("from lora_vision import Blend, inject, load_adapter", "diffusers transformers accelerate peft lycoris"),
    ],
)
def test_imports_are_light(statement: str, absent: str) -> None:
    script = f"{statement}; import sys; print(*set({absent.split()!r}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("", "")


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 440, "one concept a file, about 400 lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 65, f"{node.name}: about 60 lines"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_public_things_say_what_comes_back(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "no text at the top of the file"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no text"


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_library_does_not_print(path: Path) -> None:
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]


def test_no_path_of_a_machine_and_no_registry_is_named() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout: which files belong to the project is git's to tell")
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    machine = re.compile(r"(?<![\w.}])/(work|opt|root|home|mnt)/\w")
    registry = re.compile(r"pypi\.org|pythonhosted\.org|npmjs\.(org|com)|deb\.debian\.org|_authToken")
    for name in filter(None, done.stdout.split("\0")):
        path = ROOT / name
        if path == Path(__file__) or not path.is_file() or b"\0" in path.read_bytes():
            continue
        text = path.read_text(encoding="utf-8")
        for number, line in enumerate(text.splitlines(), 1):
            assert not machine.search(line) and not registry.search(line), f"{name}:{number}: {line.strip()}"
