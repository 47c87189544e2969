"""A compiled model with room for adapters never recompiles while they change inside that room."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from kinds import adapter
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import lora_vision as lv


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
