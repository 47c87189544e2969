"""Optimizers: each learns, asks for its library by name, and refuses what it cannot do."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import nn

from lora_vision.base import RECIPES
from lora_vision.config import FitConfig, StyleConfig
from lora_vision.metadata import OPTIMIZERS
from lora_vision.optimizers import TrainingError, by_rate, learning_rate, make_optimizer

NAMES = get_args(get_type_hints(FitConfig)["optimizer"])
LIBRARIES = {
    "adamw8bit": "bitsandbytes",
    "prodigy": "prodigyopt",
    "lion": "lion_pytorch",
    "schedulefree": "schedulefree",
}
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_goes_downhill(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name in LIBRARIES:
        pytest.importorskip(LIBRARIES[name])
    config = FitConfig(
        optimizer=name, learning_rate=FitConfig(optimizer=name).rate_of_optimizer(0.05), weight_decay=0.01
    )
    torch.manual_seed(0)
    weight, wanted = nn.Parameter(torch.zeros(64, 80)), torch.randn(64, 80)
    optimizer: Any = make_optimizer(by_rate([weight], []), config, CPU)
    assert f"{type(optimizer).__module__}.{type(optimizer).__name__}" == OPTIMIZERS[name].split("(")[0]
    for _ in range(300 if name == "prodigy" else 60):
        if name == "schedulefree":
            optimizer.train()
        (weight - wanted).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    if name == "schedulefree":
        optimizer.eval()
    assert (weight - wanted).detach().norm() < 0.8 * wanted.norm()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_missing_library_is_named_with_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (LIBRARIES[name], "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    words = rf"needs {LIBRARIES[name]}, .*pip install 'lora-vision\[optim\]', or take --optimizer adamw"
    with pytest.raises(TrainingError, match=words):
        make_optimizer(by_rate([nn.Parameter(torch.zeros(3))], []), FitConfig(optimizer=name, learning_rate=1.0), CPU)


def test_prodigy_refuses_several_rates() -> None:
    pytest.importorskip("prodigyopt")
    parameters = [nn.Parameter(torch.zeros(3)) for _ in range(3)]
    config = FitConfig(optimizer="prodigy", learning_rate=1.0)
    make_optimizer(by_rate(parameters, [1.0, 0.0, 1.0]), config, CPU)
    with pytest.raises(TrainingError, match="one learning rate for all layers; leave out --up-rate"):
        make_optimizer(by_rate(parameters, [1.0, 4.0, 1.0]), config, CPU)


def test_the_rate_rises_and_falls() -> None:
    rates = [learning_rate(step, 100, 2.0, 0.1) for step in range(100)]
    assert rates[0] == 0.2 and rates[9] == 2.0 and rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0) and 0 < rates[99] < 0.001
    assert all(after < before for before, after in zip(rates[10:], rates[11:], strict=False))
    assert learning_rate(0, 1, 2.0, 0.0) == 2.0
    flat = [learning_rate(step, 100, 2.0, 0.1, falling=False) for step in range(100)]
    assert flat[:10] == rates[:10] and set(flat[9:]) == {2.0}


def test_each_optimizer_has_a_rate_of_its_own_unless_one_is_given() -> None:
    recipe = RECIPES["sd1"]
    config = StyleConfig(data="d", output="o.safetensors")
    found = {name: replace(config, optimizer=name).filled(recipe).learning_rate for name in NAMES}
    assert found == dict.fromkeys(NAMES, 1e-4) | {"prodigy": 1.0, "lion": 2e-5}
    assert replace(config, optimizer="lion", learning_rate=0.5).filled(recipe).learning_rate == 0.5


def test_every_kind_of_change_has_its_own_usual_rate() -> None:
    recipe, config = RECIPES["tiny"], StyleConfig(data="d", output="o.safetensors")
    plain = recipe.learning_rate
    assert replace(config, variant="pissa").filled(recipe).learning_rate < plain
    assert replace(config, up_rate=16.0).filled(recipe).learning_rate == plain / 4  # the up matrices' is 4 times plain
    assert replace(config, variant="loha", optimizer="prodigy").filled(recipe).learning_rate == 1
    assert replace(config, variant="pissa", learning_rate=0.5).filled(recipe).learning_rate == 0.5


def test_two_averages_are_refused() -> None:
    with pytest.raises(ValueError, match="schedulefree averages the weights itself"):
        StyleConfig(data="d", output="o.safetensors", optimizer="schedulefree", ema=0.9)
