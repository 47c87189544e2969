"""The stack: whatever sounds, merges or differs between rows, each layer computes the weighted sum of its changes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from lora_vision.errors import AdapterError
from lora_vision.factors import Dora, LowRank
from lora_vision.stack import Stack

PLACES = {"a": ("l0", "l1", "conv"), "b": ("l0", "conv"), "c": ("l0", "l1", "conv"), "d": ("l1",)}


class Net:
    """Three layers under a stack, with what their weights were, and four adapters of different ranks and layers."""

    def __init__(self, reserve: int = 0) -> None:
        torch.manual_seed(0)
        self.layers: dict[str, nn.Module] = {"l0": nn.Linear(24, 40), "l1": nn.Linear(24, 40)}
        self.layers["conv"] = nn.Conv2d(8, 8, 3)
        self.kept = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}
        self.stack = Stack(self.layers, dict.fromkeys(self.layers, reserve) if reserve else None)
        self.adapters = {name: self.adapter(rank, places) for rank, (name, places) in enumerate(PLACES.items(), 2)}
        for name, changes in self.adapters.items():
            self.stack.add(name, changes)
        self.inputs = {"l0": torch.randn(4, 7, 24), "l1": torch.randn(4, 24), "conv": torch.randn(4, 8, 5, 5)}

    def adapter(self, rank: int, places: tuple[str, ...]) -> dict[str, LowRank]:
        shapes = {name: self.kept[name].shape for name in places}
        return {
            name: LowRank(torch.randn(rank, *s[1:]), torch.randn(s[0], rank, *[1] * (len(s) - 2)), 3.0)
            for name, s in shapes.items()
        }

    def weights(self, *names: str, rows: int = 1) -> dict[str, Tensor]:
        return {name: torch.rand(rows, len(PLACES[name])) for name in names}

    def is_sum(self, weights: Mapping[str, Tensor]) -> bool:
        """Whether every layer adds these weights [G, L] of the adapters to each row."""
        near = []
        for name, layer in self.layers.items():
            for row in range(4):
                weight = self.kept[name].clone()
                for adapter, values in weights.items():
                    if name in PLACES[adapter]:
                        value = values[row if len(values) > 1 else 0, PLACES[adapter].index(name)]
                        weight += value * self.adapters[adapter][name].delta().reshape(weight.shape)
                one = self.inputs[name][row : row + 1]
                run = F.linear if weight.dim() == 2 else F.conv2d
                near.append(torch.allclose(layer(self.inputs[name])[row], run(one, weight, layer.bias)[0], atol=1e-4))
        return all(near)

    def untouched(self) -> bool:
        return all(torch.equal(layer.weight, self.kept[name]) for name, layer in self.layers.items())

    def places(self, attribute: str) -> list[int]:
        return [getattr(layer, attribute).data_ptr() for layer in self.layers.values()]


@pytest.mark.parametrize("reserve", [0, 20])
@torch.no_grad()
def test_any_sequence_of_sounds_is_the_weighted_sum(reserve: int) -> None:
    net = Net(reserve)
    for names in ("a", "ac", "abcd", "bcd", "", "db", "abcd"):
        weights = net.weights(*names)
        net.stack.apply(weights)
        assert net.is_sum(weights)
    net.stack.clear()
    assert [type(layer) for layer in net.layers.values()] == [nn.Linear, nn.Linear, nn.Conv2d]


@torch.no_grad()
def test_rows_read_only_the_ranks_they_take() -> None:
    net = Net()
    alone = {name: torch.zeros(4, len(places)) for name, places in PLACES.items()}
    for row, name in enumerate(PLACES):
        alone[name][row] = torch.rand(len(PLACES[name]))
    net.stack.apply(alone)
    assert net.is_sum(alone)
    assert net.layers["l0"].lora_rows.shape == (4, 4)  # the largest rank there is 4, of 2 + 3 + 4
    everything = net.weights(*PLACES, rows=4)
    net.stack.apply(everything)
    assert net.is_sum(everything) and net.layers["l0"].lora_rows is None
    net.stack.apply(alone)
    net.stack.apply(net.weights("a"))
    assert net.layers["l0"].lora_rows is None


@torch.no_grad()
def test_merging_moves_no_weight_and_restoring_brings_the_stack_back() -> None:
    net = Net()
    weights = net.weights(*PLACES)
    net.stack.apply(weights)
    assert net.is_sum(weights)
    net.stack.merge(weights), net.stack.apply({})
    assert net.is_sum(weights) and all(layer.lora_down is None for layer in net.layers.values())
    merged = net.places("weight")
    net.stack.merge({}), net.stack.apply(weights)
    assert net.untouched() and net.is_sum(weights)
    net.stack.merge(weights), net.stack.apply({})
    assert net.is_sum(weights) and net.places("weight") == merged
    fewer = net.weights("c")
    net.stack.merge(fewer), net.stack.apply(net.weights("d"))
    net.stack.merge({}), net.stack.apply(fewer)
    assert net.untouched() and net.is_sum(fewer)


@torch.no_grad()
def test_a_tenth_adapter_moves_no_other_and_a_copy_takes_no_spare_room() -> None:
    layers: dict[str, nn.Module] = {f"l{number}": nn.Linear(64, 64) for number in range(8)}
    stack, held = Stack(layers), []
    for count in range(1, 21):
        stack.add(f"a{count:02}", {name: LowRank(torch.randn(4, 64), torch.randn(64, 4), 4.0) for name in layers})
        stack.apply({name: torch.ones(1, 8) for name in stack.loaded})
        held.append([layer.stacked()[0].data_ptr() for layer in layers.values()])
        assert layers["l3"].lora_up.shape == (64, 4 * count)
    moved = [sum(one != other for one, other in pairwise(places)) for places in zip(*held, strict=True)]
    assert held[0] == held[9] and all(moved) and max(moved) == 1
    assert max(sum(a != b for a, b in zip(*each, strict=True)) for each in pairwise(held)) == 1
    expected = sum(stack.loaded[name].pairs["l3"].delta() for name in stack.loaded) + layers["l3"].weight
    x = torch.randn(2, 64)
    assert torch.allclose(layers["l3"](x), F.linear(x, expected, layers["l3"].bias), atol=1e-3)
    alone = copy.deepcopy(layers["l3"])
    assert torch.equal(alone(x), layers["l3"](x)) and alone.lora_down.untyped_storage().nbytes() == 64 * 80 * 4


class Small(nn.Module):
    """One layer of each kind that holds pairs, in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.l, self.c = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Conv2d(1, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.l(self.e(x))[:, None])


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:Converting a tensor")
@pytest.mark.parametrize(
    "how", ["compiled", "traced", "copied", "pickled", "inference", "called alone", "cast", "faked", "vmapped"]
)
def test_factors_that_wait_for_the_next_forward_are_never_missed(how: str) -> None:
    torch.manual_seed(0)
    model, x = Small(), torch.randint(0, 10, (2, 6))
    layers: dict[str, nn.Module] = dict(model.named_children())
    stack = Stack(layers)
    expected = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    for rank in (2, 3):
        changes = {}
        for name, layer in layers.items():
            out, inner = layer.weight.shape[0], layer.weight.shape[1:]
            changes[name] = LowRank(torch.randn(rank, *inner), torch.randn(out, rank, *[1] * (len(inner) - 1)), 1.0)
            expected[name] += changes[name].delta().reshape(expected[name].shape)
        stack.add(f"a{rank}", changes)
    stack.apply({name: torch.ones(1, 3) for name in stack.loaded})
    assert all(layer.lora_down is None for layer in layers.values())  # nothing is copied before it is needed
    with torch.no_grad():
        plain = Small()
        plain.load_state_dict(
            {f"{n}.{k}": expected[n] if k == "weight" else v for n in layers for k, v in layers[n].state_dict().items()}
        )
    wanted = plain(x)
    with torch.inference_mode(how == "inference"), torch.set_grad_enabled(how not in ("compiled", "inference")):
        if how == "compiled":
            found = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
        elif how == "traced":
            found = torch.jit.trace(model, (x,), check_trace=False)(x)
        elif how == "called alone":
            found = layers["c"](layers["l"](layers["e"](x))[:, None])
        elif how == "faked":
            with FakeTensorMode(allow_non_fake_inputs=True):
                model(x)
            found = model(x)
        elif how == "vmapped":
            found = torch.func.vmap(model)(x[None])[0]
        elif how == "cast":
            found = model.double()(x).float()
        else:
            found = {"copied": copy.deepcopy, "pickled": lambda m: pickle.loads(pickle.dumps(m))}.get(how, lambda m: m)(
                model
            )(x)
    assert torch.allclose(found, wanted, atol=1e-4)
    stack.apply({"a2": torch.ones(1, 3)})
    model.float()(x)
    stack.apply({name: torch.ones(1, 3) for name in stack.loaded})
    again = model(x)
    again.sum().backward()  # what was made while nothing was recorded can be used where it is
    assert torch.allclose(again, wanted, atol=1e-4)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_a_convolution_may_run_under_autocast(memory: torch.memory_format) -> None:
    net = Net()
    net.stack.apply(net.weights("a"))
    layer, x = net.layers["conv"], net.inputs["conv"].contiguous(memory_format=memory)
    plain = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16 and torch.allclose(found.float(), plain, rtol=0.05, atol=0.2)


@pytest.mark.parametrize("how", ["in place", "through data", "another memory", "one token"])
@torch.no_grad()
def test_a_weight_written_to_after_a_restore_is_copied_afresh(how: str) -> None:
    layer = nn.Embedding(90, 16) if how == "one token" else nn.Linear(16, 90, bias=False)
    stack = Stack({"l": layer})
    stack.add("a", {"l": LowRank(torch.randn(3, layer.weight.shape[1]), torch.randn(len(layer.weight), 3), 3.0)})
    change = stack.loaded["a"].pairs["l"].delta()
    stack.merge({"a": torch.ones(1, 1)})
    stack.restore()
    if how == "in place":
        layer.weight[7, 5] = 9.0
    elif how == "through data":
        layer.weight.data.mul_(0.5)
    elif how == "another memory":
        layer.weight.data = torch.randn_like(layer.weight)
    else:
        layer.weight.data[7] = 9.0
    wanted = layer.weight.clone()
    stack.merge({"a": torch.ones(1, 1)})
    assert torch.allclose(layer.weight, wanted + change, atol=1e-5)
    stack.restore()
    assert torch.equal(layer.weight, wanted)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_merging_writes_in_place_and_its_copy_serves_again_until_an_adapter_goes(format: torch.memory_format) -> None:
    layer = nn.Conv2d(8, 8, 3).to(memory_format=format)
    stack, wanted, place = Stack({"l": layer}), layer.weight.clone(), layer.weight.data_ptr()
    for name in "ab":
        stack.add(name, {"l": LowRank(torch.randn(3, 8, 3, 3), torch.randn(8, 3), 3.0)})
    for names in ("a", "ab", "b"):
        stack.merge({name: torch.ones(1, 1) for name in names})
        expected = wanted + sum(stack.loaded[name].pairs["l"].delta() for name in names)
        assert torch.allclose(layer.weight, expected, atol=1e-5) and layer.weight.data_ptr() == place
    stack.restore()
    assert torch.equal(layer.weight, wanted) and layer.weight.data_ptr() == place
    (copy_,) = stack._originals._copies.values()
    stack.merge({"a": torch.ones(1, 1)})
    (again,) = stack._originals._copies.values()
    assert (again is copy_) == (format is torch.contiguous_format)
    stack.restore(), stack.remove("a")
    assert not stack._originals._copies


@pytest.mark.parametrize("inside", [True, False])
@torch.no_grad()
def test_a_bias_where_the_layer_has_none_is_live_and_not_merged(inside: bool) -> None:
    layer = nn.Linear(16, 24, bias=False)
    pair = LowRank(torch.randn(3, 16), torch.randn(24, 3), 3.0, bias=torch.ones(24))
    stack = Stack({"l": layer})
    stack.add("a", {"l": Dora(pair, torch.ones(24)) if inside else pair})
    with pytest.raises(AdapterError, match="has no bias"):
        stack.merge({"a": torch.ones(1, 1)})
    assert not stack.merged
    stack.clear()
    assert type(layer) is nn.Linear
