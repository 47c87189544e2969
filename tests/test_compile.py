"""A compiled model with room for adapters never recompiles while they change inside that room."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from kinds import adapter
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import lora_vision as lv
from lora_vision.regions import composite
from lora_vision.schedules import listed


class Small(nn.Module):
    """A convolution and two projections, as a UNet has them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.to_q, self.to_out = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        return self.to_out(torch.relu(self.to_q(tokens)))  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def test_weights_swaps_and_removals_never_recompile(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    models = {"unet": Small(), "text_encoder": Small()}
    plain = {part: {f"{part}.{n}": layer for n, layer in m.named_children()} for part, m in models.items()}
    x = torch.randn(2, 3, 6, 6)
    blend = lv.Blend(models, capacity=8, targets="*")
    counter = CompileCounter()
    compiled = [torch.compile(model, backend=counter, fullgraph=True) for model in models.values()]

    def right() -> bool:
        """Whether the compiled models compute what the plain ones do now."""
        return all(torch.allclose(c(x), m(x), atol=1e-5) for c, m in zip(compiled, models.values(), strict=True))

    assert right()
    first = counter.frame_count
    every = {**plain["unet"], **plain["text_encoder"]}
    blend.load(adapter(every, rank=3), "a")
    assert right()
    blend.set({"a": -0.5})
    assert right()
    blend.load(adapter(plain["text_encoder"], "loha", seed=1), "b", scale=0.3)
    some = {name: layer for name, layer in plain["unet"].items() if "to_q" in name}
    blend.load(adapter(some, rank=5, seed=2), "c")
    assert right()
    blend.set({"c": 0.7})
    blend.remove("a")
    assert right() and counter.frame_count == first
    with caplog.at_level(logging.WARNING):
        blend.load(adapter(some, rank=12, seed=3), "wide")
    assert "exceeds the capacity of 8" in caplog.messages[-1]
    assert right() and counter.frame_count == first + 1
    blend.set({"c": 0.5})
    assert right() and counter.frame_count == first + 1


class Timed(nn.Module):
    """A UNet's interface around one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
        return (self.conv(sample) + timestep / 1000,)


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_schedules_never_recompile_and_are_never_missed(how: str) -> None:
    """dynamo does not notice hooks that come after it compiled; ours are called outside of what it compiled."""
    torch.manual_seed(0)
    model, counter = Timed(), CompileCounter()
    times = torch.tensor([900.0, 500.0, 100.0])
    pipe = SimpleNamespace(components={"unet": model}, scheduler=SimpleNamespace(timesteps=times))
    blend = lv.Blend(pipe, capacity=8, targets="*")
    if how == "in place":
        model.compile(backend=counter)
    compiled = torch.compile(model, backend=counter, fullgraph=True) if how == "wrapped" else model
    x = torch.randn(2, 3, 4, 4)

    def right() -> bool:
        """Whether every step computes what the model computes step by step without a compiler."""
        return all(torch.allclose(compiled(x, t)[0], model._call_impl(x, t)[0], atol=1e-5) for t in times)

    for seed, name in enumerate("ab"):
        blend.load(adapter({"unet.conv": model.conv}, seed=seed), name)
    assert right()
    first = counter.frame_count
    blend.set({"a": 1.0}, schedule=listed([1, 0, -1]))
    assert right()
    blend.set({"a": 0.5, "b": 1.0}, schedule={"b": listed([0, 1, 0])})
    assert right()
    blend.set({"a": 0.5})
    assert right() and counter.frame_count == first
    blend.set({}, regions=composite({"a": 1.0, "b": 1.0}))
    assert right()
    blend.set({"a": 0.5})
    assert right() and counter.frame_count <= first + 1  # regions make the batch larger, once
