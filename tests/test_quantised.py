"""A base in 8 bits: near the exact one, a quarter of float32's memory also while training, the same adapter file."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from kinds import adapter, same_state
from models import write_pictures
from torch import Tensor, nn

import lora_vision as lv
from lora_vision.adapter import Adapter
from lora_vision.base import load_base
from lora_vision.config import LoraConfig, StyleConfig
from lora_vision.errors import AdapterError
from lora_vision.names import index
from lora_vision.quantised import QuantisedConv2d, QuantisedLinear, opened, quantise
from train_scripts.train_style import run

MAKES: list[Callable[[], nn.Module]] = [
    lambda: nn.Linear(48, 32),
    lambda: nn.Conv2d(48, 32, 3, stride=2, padding=1, bias=False),
]


def size(model: nn.Module) -> int:
    """Bytes of everything that a model holds."""
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def answer(unet: nn.Module, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x, states = (torch.randn(batch, *shape, generator=generator) for shape in ((8, 16, 16), (24, 128)))
    return unet(x, torch.linspace(50, 900, batch).long(), states, return_dict=False)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", MAKES)
def test_the_backward_pass_opens_the_weight_again_and_keeps_nothing(
    make: Callable[[], nn.Module], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    layer = make().to(dtype)
    exact, held = copy.deepcopy(layer), nn.ModuleDict({"one": layer})
    assert quantise(held) == ["one"] and isinstance(layer, QuantisedLinear | QuantisedConv2d)
    weight = opened(layer.weight, layer.scale, dtype)
    error = (weight - exact.weight).float().abs().flatten(1).amax(1)
    step = exact.weight.float().abs().flatten(1).amax(1) / 127
    assert (error <= step * (0.51 if dtype == torch.float32 else 1.1)).all()

    x = torch.randn(2, 48) if isinstance(layer, nn.Linear) else torch.randn(2, 48, 9, 9)
    x1, x2 = (x.to(dtype).requires_grad_() for _ in range(2))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = layer(x1)
    assert {tensor.data_ptr() for tensor in kept} == {layer.weight.data_ptr(), layer.scale.data_ptr()}
    z = torch.func.functional_call(exact, {"weight": weight}, (x2,))
    assert torch.equal(y, z)
    y.square().sum().backward()
    z.square().sum().backward()
    assert x1.grad is not None and x2.grad is not None
    torch.testing.assert_close(x1.grad, x2.grad)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_on_a_quarter_of_the_memory_are_near_the_exact_ones(checkpointing: bool) -> None:
    found, sizes, answers = [], [], []
    for small in (False, True):
        unet = load_base("tiny").unet
        if small:
            before = size(unet)
            names = quantise(unet)
            assert len(names) > 100 and "conv_in" not in names and size(unet) < 0.26 * before
        if checkpointing:
            unet.enable_gradient_checkpointing()
            unet.train()
        sizes.append(size(unet))
        parameters = lv.inject({"unet": unet}, LoraConfig(rank=4, targets="attention+ff+conv"))
        answers.append(answer(unet))
        answers[-1].square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        shapes = {name: factors.size for name, factors in lv.collect({"unet": unet}).layers.items()}
        lv.detach({"unet": unet})
        assert isinstance(unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q, QuantisedLinear) == small
    error = (answers[1] - answers[0]).norm() / answers[0].norm()
    assert error < 0.03, error
    assert torch.cosine_similarity(*found, dim=0) > 0.99
    assert shapes == {
        name: tuple(layer.weight.shape[:1]) + shapes[name][1:]
        for name, layer in index({"unet": unet}).items()
        if name in shapes
    }


def test_what_needs_the_exact_weight_is_refused_and_all_else_sounds() -> None:
    unet = load_base("tiny").unet
    layers = {name: layer for name, layer in index({"unet": unet}).items() if ".attn1.to_" in name}
    low, full = adapter(layers), adapter(layers, "full")
    lv.attach({"unet": unet}, low)
    exact = answer(unet).detach()
    lv.detach({"unet": unet})
    quantise(unet)
    state = copy.deepcopy(unet.state_dict())
    for variant in ("pissa", "dora", "loha", "lokr"):
        with pytest.raises(AdapterError, match=f"{variant} computes with the base's weights, which are quantised"):
            lv.inject({"unet": unet}, LoraConfig(variant=variant, targets="attention"))  # type: ignore[arg-type]
    blend = lv.Blend({"unet": unet})
    blend.load(low, "low")
    near = answer(unet).detach()
    assert (near - exact).norm() < 0.05 * exact.norm()
    with pytest.raises(AdapterError, match="a quantised base"):
        blend.merge()
    assert torch.equal(answer(unet).detach(), near)
    more = Adapter({**dict(list(low.layers.items())[1:]), **dict(list(full.layers.items())[:1])})
    with pytest.raises(AdapterError, match="more than a low-rank pair, and a quantised base"):
        blend.load(more, "more")
    assert blend.adapters == ("low",) and torch.equal(answer(unet).detach(), near)
    blend.detach()
    with pytest.raises(AdapterError, match="more than a low-rank pair, and a quantised base"):
        lv.attach({"unet": unet}, full)
    lv.attach({"unet": unet}, low)  # the refused one has left nothing behind
    assert torch.equal(answer(unet).detach(), near)
    lv.detach({"unet": unet})
    assert same_state(state, unet.state_dict())


def test_a_style_trained_on_it_opens_on_the_exact_base(tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "dots", 6)
    losses, files = [], []
    for name, bits in (("exact", None), ("small", "int8")):
        output = tmp_path / f"{name}.safetensors"
        settings = StyleConfig(
            data=str(data), output=str(output), quantise=bits, steps=4, batch_size=2, sample_every=0, tracker="none"
        )
        files.append(lv.load_adapter(run(settings)))
        losses.append(json.loads((tmp_path / f"{name}-training" / "history.json").read_text())["losses"])
        AcceleratorState._reset_state(reset_partial_state=True)
    assert losses[1] == pytest.approx(losses[0], rel=0.05) and losses[1] != losses[0]
    assert {n: f.size for n, f in files[0].layers.items()} == {n: f.size for n, f in files[1].layers.items()}
    assert lv.attach({"unet": load_base("tiny").unet}, files[1]).complete
    with pytest.raises(ValueError, match="--quantise int8: dora computes with the exact weights"):
        StyleConfig(data="d", output="ink.safetensors", quantise="int8", variant="dora")
