"""What the tests share: no network, quiet libraries, seeded random bases, and the command line in one call."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: more threads wait for each other
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Outcome:
    """What a command line did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def lora_vision(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs `lora-vision WORDS` in this process."""
    from lora_vision.cli import main

    def run(*words: object) -> Outcome:
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def sd1_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded random Stable Diffusion 1 in the diffusers folder layout."""
    from models import tiny_sd

    return tiny_sd(tmp_path_factory.mktemp("sd1"), "sd1")


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded random SDXL, with both text encoders, in the diffusers folder layout."""
    from models import tiny_sd

    return tiny_sd(tmp_path_factory.mktemp("sdxl"), "sdxl")


@pytest.fixture(scope="session")
def sd1_adapters(sd1_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two random adapters for sd1_folder, far from zero, called ink and gold."""
    import torch

    from lora_vision.base import load_base
    from lora_vision.config import LoraConfig
    from lora_vision.files import save_adapter
    from lora_vision.inject import collect, inject

    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(["ink", "gold"]):
        base = load_base(sd1_folder)
        generator = torch.Generator().manual_seed(seed)
        for parameter in inject({"unet": base.unet}, LoraConfig(rank=2, targets="attention")):
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
        save_adapter(collect({"unet": base.unet}), folder / f"{name}.safetensors")
    return folder / "ink.safetensors", folder / "gold.safetensors"
