"""Any number of adapters, live or merged: the same sum, in any order, and the base back bit for bit."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import KINDS, adapter, linear_and_conv, same_state, snapshot
from test_inject import Job
from torch import Tensor, nn

import lora_vision as lv
from lora_vision import names
from lora_vision.errors import AdapterError, BaseModelError
from lora_vision.factors import Full
from lora_vision.layers import LoraLayer


class Blended(Job):
    """A tiny UNet and text encoder under a Blend, with what they were before."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(dtype)
        self.base = self.look()
        self.states = snapshot(self.parts.values())
        self.layers = linear_and_conv(names.index(self.parts))
        self.blend = lv.Blend(self.parts)

    def load(self, name: str, kind: str = "lora", seed: int = 0, **options: Any) -> lv.Adapter:
        found = adapter(self.layers, kind, seed=seed)
        self.blend.load(found, name, **options)
        return found

    def untouched(self) -> bool:
        return all(same_state(s, m.state_dict()) for s, m in zip(self.states, self.parts.values(), strict=True))


@pytest.fixture
def job() -> Iterator[Blended]:
    with torch.no_grad():
        yield Blended()


def close(one: Tensor, other: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether two outputs agree within what rounding of this dtype does over a whole UNet."""
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}[dtype]
    return float((one.float() - other.float()).norm() / other.float().norm()) < tolerance


def weighted(job: Blended, adapters: dict[str, lv.Adapter], scales: dict[str, float]) -> Tensor:
    """The output with Σ scale · delta written into a copy of the weights: the definition."""
    kept = {name: layer.weight.detach().clone() for name, layer in job.layers.items()}
    for key, scale in scales.items():
        for name, factors in adapters[key].layers.items():
            job.layers[name].weight.data += (scale * factors.delta(kept[name])).to(kept[name].dtype)
    out = job.look()
    for name, weight in kept.items():
        job.layers[name].weight.data = weight
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_live_is_merged_is_the_weighted_sum_and_zero_is_the_base(job: Blended, kind: str) -> None:
    scales = {"a": 0.5, "b": -0.3}
    adapters = {"a": adapter(job.layers, kind, seed=1), "b": adapter(job.layers, kind, seed=2)}
    expected = weighted(job, adapters, scales)
    for name, one in adapters.items():
        assert job.blend.load(one, name).complete
    job.blend.set(scales)
    live = job.look()
    assert close(live, expected) and not close(live, job.base)
    job.blend.merge()
    assert close(job.look(), live)
    job.blend.restore()
    assert job.untouched() and close(job.look(), live)
    job.blend.set({"a": 0.0, "b": 0})
    assert torch.equal(job.look(), job.base)
    job.blend.set({})
    assert torch.equal(job.look(), job.base)


def test_kinds_mix_and_order_does_not_matter() -> None:
    outs = []
    for order in itertools.islice(itertools.permutations(["lora", "lokr", "dora-output", "loha"]), 0, 24, 7):
        with torch.no_grad():
            job = Blended()
            for kind in order:
                job.load(kind, kind, seed=len(kind))
            job.blend.set(dict.fromkeys(reversed(order), 0.4))
            outs.append(job.look())
    assert all(close(out, outs[0]) for out in outs)


def test_only_what_sounds_is_in_the_stack(job: Blended) -> None:
    for number in range(5):
        job.load(f"a{number}", seed=number)
    layer = next(iter(job.layers.values()))
    assert isinstance(layer, LoraLayer)
    job.blend.set({"a1": 1.0})
    assert len(layer.stacked()[0]) == 3  # type: ignore
    alone = job.look()
    job.blend.set({"a1": 1.0, "a3": 0.5, "a0": 0.0})
    assert len(layer.stacked()[0]) == 6  # type: ignore
    job.blend.set({"a1": 1.0})
    assert torch.equal(job.look(), alone)


def test_changing_weights_moves_only_numbers(job: Blended) -> None:
    job.load("a"), job.load("b", seed=1)
    layer = next(iter(job.layers.values()))
    job.blend.set({"a": 0.5, "b": 0.5})
    held = (*layer.stacked(), layer.lora_gain)
    pointers = [t.data_ptr() for t in held if isinstance(t, Tensor)]
    first = job.look()
    job.blend.set({"a": 0.2, "b": -2.0})
    assert [t.data_ptr() for t in (*layer.stacked(), layer.lora_gain)] == pointers  # type: ignore
    assert not close(job.look(), first)


def test_globs_parts_and_blocks(job: Blended) -> None:
    found = job.load("a")
    weights = {"*": 0.0, "unet": 0.8, "unet.up_blocks.*": 0.2, "text_encoder": -0.5}
    job.blend.set({"a": weights})
    live = job.look()
    scaled = {}
    for name, factors in found.layers.items():
        up = name.startswith("unet.up_blocks.")
        scaled[name] = (0.2 if up else 0.8 if name.startswith("unet.") else -0.5, factors)
    for name, (scale, factors) in scaled.items():
        job.layers[name].weight.data += scale * factors.delta()
    job.blend.set({})
    assert close(live, job.look())


def test_wrong_blends_change_nothing(job: Blended) -> None:
    job.load("ink")
    job.blend.set({"ink": 0.5})
    look = job.look()
    for wrong, says in (
        ({"inc": 1.0}, "did you mean 'ink'"),
        ({"ink": {"unet.up_block.*": 1.0}}, "nearest: unet.up_blocks"),
        ({"ink": float("nan")}, "finite"),
        ({"ink": {"unet": float("inf")}}, "finite"),
        ({"ink": "much"}, "finite number"),
    ):
        with pytest.raises(AdapterError, match=says):
            job.blend.set(wrong)  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="loaded already"):
        job.load("ink")
    with pytest.raises(AdapterError, match="does not sound"):
        job.blend.merge(only=["gold"])
    assert torch.equal(job.look(), look) and job.blend.scales == {"ink": 0.5}


def test_using_is_temporary_even_when_it_fails(job: Blended) -> None:
    job.load("a"), job.load("b", seed=1)
    job.blend.set({"a": 0.8, "b": 0.5})
    look = job.look()
    with job.blend.using(a=0.3) as inside:
        assert inside.scales == {"a": 0.3} and not close(job.look(), look)
    assert torch.equal(job.look(), look)
    with pytest.raises(RuntimeError), job.blend.using({}):
        assert torch.equal(job.look(), job.base)
        raise RuntimeError
    assert torch.equal(job.look(), look)


@pytest.mark.parametrize("keep", ["device", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_restore_is_bit_exact_after_random_cycles(dtype: torch.dtype, keep: str) -> None:
    with torch.no_grad():
        job = Blended(dtype)
        kinds = ["lora", "lokr", "dora-output", "full"]
        for kind in kinds:
            job.load(kind, kind)
        chance = random.Random(0)
        for _ in range(8):
            some = chance.sample(kinds, chance.randint(1, 4))
            job.blend.set({kind: chance.uniform(-1, 1) for kind in some})
            live = job.look()
            job.blend.merge(only=chance.sample(some, chance.randint(1, len(some))), keep=keep)  # type: ignore[arg-type]
            assert not job.untouched() and close(job.look(), live, dtype)
            if chance.random() < 0.5:
                job.blend.set({kind: chance.uniform(-1, 1) for kind in some})
            job.blend.restore()
            assert job.untouched()
        job.blend.set({})
        assert torch.equal(job.look(), job.base)


def test_merge_some_keeps_the_rest_live(job: Blended) -> None:
    job.load("a"), job.load("b", seed=1), job.load("c", "dora-input", seed=2)
    job.blend.set({"a": 0.5, "b": 0.7, "c": 0.3})
    live = job.look()
    job.blend.merge(only=["a"])
    assert close(job.look(), live)
    job.blend.set({"a": 0.5, "b": 0.0, "c": 0.0})
    job.blend.merge(only=["a", "b"])
    job.blend.set({"b": 0.7, "c": 0.3, "a": 0.5})
    assert close(job.look(), live)
    job.blend.remove("a")
    with job.blend.using(b=0.7, c=0.3):
        fresh = Blended()
        fresh.load("b", seed=1), fresh.load("c", "dora-input", seed=2)
        fresh.blend.set({"b": 0.7, "c": 0.3})
        assert close(job.look(), fresh.look())
    job.blend.restore()
    assert job.untouched()


def test_nowhere_keeps_no_copy_and_says_so(job: Blended) -> None:
    job.load("a")
    live = job.look()
    job.blend.merge(keep="nowhere")
    assert close(job.look(), live)
    with pytest.raises(BaseModelError, match="nowhere"):
        job.blend.restore()
    with pytest.raises(BaseModelError, match="nowhere"):
        job.blend.remove("a")
    job.blend.detach()
    assert close(job.look(), live) and not any(isinstance(layer, LoraLayer) for layer in job.layers.values())


def test_detach_leaves_no_trace_even_when_merged(job: Blended) -> None:
    kinds = {name: type(layer) for name, layer in names.index(job.parts).items()}
    job.load("a"), job.load("b", "lokr")
    job.blend.merge(only=["a"])
    assert [list(s) for s in job.states] == [list(m.state_dict()) for m in job.parts.values()]
    job.blend.detach()
    assert job.untouched() and torch.equal(job.look(), job.base)
    assert {name: type(layer) for name, layer in names.index(job.parts).items()} == kinds
    assert not any(key.startswith("lora") for layer in job.layers.values() for key in vars(layer))


def test_remove_frees_layers_and_memory(job: Blended) -> None:
    some = {name: layer for name, layer in job.layers.items() if ".attn1." in name}
    job.blend.load(adapter(some), "small")
    job.load("big")
    job.blend.set({"small": 1.0})
    alone = job.look()
    job.blend.set({"small": 1.0, "big": 1.0})
    assert not close(job.look(), alone)
    job.blend.remove("big")
    assert all(layer.lora_down is None for layer in some.values())  # what is left is copied anew when it is needed
    wrapped = {name for name, layer in names.index(job.parts).items() if isinstance(layer, LoraLayer)}
    assert wrapped == set(some) and torch.equal(job.look(), alone)


def test_what_falls_silent_takes_no_memory_and_what_never_sounds_none(job: Blended) -> None:
    for name, rank in (("big", 8), ("small", 5), ("silent", 2)):
        job.blend.load(adapter(job.layers, rank=rank), name)
    job.blend.set({"big": 1.0, "small": 1.0})
    job.look()
    job.blend.set({"small": 1.0})
    layers = [layer for layer in job.layers.values() if isinstance(layer, LoraLayer)]
    assert layers and all(layer.lora_down is None for layer in layers)
    job.blend.remove("silent")
    assert all(layer.lora_down is None for layer in layers)
    job.look()
    assert all(len(layer.lora_down) == 5 for layer in layers if layer.lora_down is not None)


def test_a_copied_blend_goes_on_by_itself(job: Blended) -> None:
    job.load("a"), job.load("b", seed=1)
    job.blend.set({"a": 1.0})
    alone = job.look()
    other = copy.deepcopy(job)
    for each in (job, other):
        each.blend.set({"a": 1.0, "b": 0.5})
    assert torch.equal(other.look(), job.look())
    other.blend.set({"a": 1.0})
    assert torch.equal(other.look(), alone) and not close(job.look(), alone)
    other.blend.set({})
    layers = [layer for layer in other.layers.values() if isinstance(layer, LoraLayer)]
    assert torch.equal(other.look(), other.base) and all(layer.lora_down is None for layer in layers)


def test_moving_and_casting_the_model_keeps_the_blend(job: Blended) -> None:
    job.load("a"), job.load("b", "lokr", seed=3)
    job.blend.set({"a": 0.5, "b": 0.4})
    live = job.look()
    for model in job.parts.values():
        model.double()
    job.x = job.x.double()
    assert close(job.look(), live)
    job.blend.set({"a": 1.0, "b": 0.1})
    changed = job.look()
    for model in job.parts.values():
        model.float()
    job.x = job.x.float()
    assert close(job.look(), changed) and not close(changed, live)
    job.blend.set({"a": 0.5, "b": 0.4})
    assert close(job.look(), live)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_half_precision_stays_within_rounding(dtype: torch.dtype, kind: str) -> None:
    with torch.no_grad():
        exact, half = Blended(), Blended(dtype)
        for job in (exact, half):
            job.load("a", kind, scale=0.5)
        assert half.look().dtype == dtype and close(half.look(), exact.look(), dtype)


def test_norms_biases_and_embeddings(job: Blended) -> None:
    everything = {n: layer for n, layer in names.index(job.parts).items() if not isinstance(layer, nn.Conv2d)}
    changes: dict[str, Any] = {}
    for name, layer in everything.items():
        g = torch.Generator().manual_seed(len(name))
        if isinstance(layer, nn.Embedding):
            changes[name] = adapter({name: layer}).layers[name]
        else:
            bias = 0.1 * torch.randn(layer.weight.shape[0], generator=g)
            changes[name] = Full(bias=bias, diff=0.1 * torch.randn(layer.weight.shape, generator=g))
    job.blend.load(lv.Adapter(changes), "all", scale=0.5)
    live = job.look()
    job.blend.detach()
    for name, layer in everything.items():
        layer.weight.data += 0.5 * changes[name].delta()
        if changes[name].bias is not None and layer.bias is not None:
            layer.bias.data += 0.5 * changes[name].bias
    shifted = {n: c.bias for n, c in changes.items() if c.bias is not None and everything[n].bias is None}
    hooks = [
        everything[n].register_forward_hook(lambda _m, _i, out, b=bias: out + 0.5 * b) for n, bias in shifted.items()
    ]
    assert close(live, job.look())
    for hook in hooks:
        hook.remove()


def test_refuses_what_it_cannot_blend(job: Blended) -> None:
    with pytest.raises(BaseModelError, match="expected a diffusers pipeline"):
        lv.Blend(job.unet)
    with pytest.raises(BaseModelError, match="found parts transformer"):
        lv.Blend({"transformer": job.unet})
    job.load("a")
    with pytest.raises(BaseModelError, match="already carries"):
        lv.Blend(job.parts)
    peft = pytest.importorskip("peft")
    other = Job()
    other.unet.fuse_qkv_projections()
    with pytest.raises(BaseModelError, match="unfuse_qkv_projections"):
        lv.Blend(other.parts)
    other.unet.unfuse_qkv_projections()
    other.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(BaseModelError, match="unload_lora_weights"):
        lv.Blend(other.parts)


@pytest.mark.parametrize("offload_first", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dora-output"])
def test_offload_hooks_before_and_after(job: Blended, offload_first: bool, kind: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    reference = Blended()
    reference.load("a", kind, scale=0.5)
    expected = reference.look()

    def offload() -> None:
        accelerate.cpu_offload(job.unet, execution_device=torch.device("cpu"))

    found = adapter(job.layers, kind)
    if offload_first:
        offload()
    job.blend.load(found, "a", scale=0.5)
    if not offload_first:
        offload()
    assert next(job.unet.parameters()).device.type == "meta"
    assert close(job.look(), expected)
    with pytest.raises(BaseModelError, match="offload"):
        job.blend.merge()
    job.blend.set({"a": -0.5})
    reference.blend.set({"a": -0.5})
    assert close(job.look(), reference.look())
    job.blend.detach()
    assert torch.equal(job.look(), job.base)
    accelerate.hooks.remove_hook_from_submodules(job.unet)
    assert job.untouched() and torch.equal(job.look(), job.base)


def test_removing_offload_hooks_keeps_the_adapter(job: Blended) -> None:
    accelerate = pytest.importorskip("accelerate")
    job.load("a", scale=0.5)
    live = job.look()
    accelerate.cpu_offload(job.unet, execution_device=torch.device("cpu"))
    assert close(job.look(), live)
    accelerate.hooks.remove_hook_from_submodules(job.unet)
    assert close(job.look(), live)
    job.blend.detach()
    assert job.untouched() and torch.equal(job.look(), job.base)


def test_files_load_by_path(job: Blended, tmp_path: Path) -> None:
    found = adapter({name: layer for name, layer in job.layers.items() if "attn1" in name})
    lv.save_adapter(found, tmp_path / "ink.safetensors", format="kohya")
    report = job.blend.load(tmp_path / "ink.safetensors")
    assert report.complete and job.blend.adapters == ("ink",)
    live = job.look()
    job.blend.remove("ink")
    job.blend.load(found)
    assert close(job.look(), live)


def test_registered_files_are_read_when_wanted_and_dropped_beyond_the_budget(tmp_path: Path) -> None:
    job = Blended()
    some = {name: layer for name, layer in job.layers.items() if "attn1.to_q" in name}
    found = [adapter(some, seed=seed) for seed in range(4)]
    files = {f"a{seed}": tmp_path / f"a{seed}.safetensors" for seed in range(4)}
    for one, path in zip(found, files.values(), strict=True):
        lv.save_adapter(one, path, format="kohya")
    job.blend.detach()
    job.blend = lv.Blend(job.parts, budget=int(2.5 * found[0].nbytes))
    job.blend.register(files)
    assert job.blend.adapters == () and torch.equal(job.look(), job.base)
    looks = []
    for name in files:
        job.blend.set({name: 1.0})
        looks.append(job.look())
    assert job.blend.adapters == ("a2", "a3") and job.blend.nbytes <= 2.5 * found[0].nbytes
    job.blend.set({"a2": 1.0})
    job.blend.set({"a0": 1.0})
    assert torch.equal(job.look(), looks[0]) and set(job.blend.adapters) == {"a0", "a2"}
    with pytest.raises(AdapterError, match="there already"):
        job.blend.register({"a1": files["a1"]})
    with pytest.raises(AdapterError, match="no adapter file"):
        job.blend.register({"new": tmp_path / "none.safetensors"})
    job.blend.remove("a3")
    with pytest.raises(AdapterError, match="no adapter called 'a3'"):
        job.blend.set({"a3": 1.0})
