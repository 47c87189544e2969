"""What users of other tools complained about, and the law here that answers it.

The numbers in the docstrings are those of the issues in the other tools, the lessons' own numbers those of our list.
Lessons 4 and 26 are in test_stock.py, 24 in test_generate.py; 7 is counted in full in test_compile.py.
"""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Iterator

import pytest
import torch
from kinds import KINDS, adapter
from test_blend import Blended, close
from test_conduct import Studio, studio  # noqa: F401 (a fixture)
from torch import nn
from torch._dynamo.testing import CompileCounter

import lora_vision as lv
from lora_vision import names
from lora_vision.errors import AdapterError
from lora_vision.layers import LoraLayer
from lora_vision.regions import Region
from lora_vision.schedules import listed


@pytest.fixture
def job() -> Iterator[Blended]:
    with torch.no_grad():
        yield Blended()


@pytest.mark.parametrize(
    ("dtype", "keep"),
    [(torch.float32, "device"), (torch.bfloat16, "cpu"), (torch.float16, "device"), (torch.float16, "cpu")],
)
@torch.no_grad()
def test_fusing_leaves_no_drift(dtype: torch.dtype, keep: str) -> None:
    """Lesson 3 (diffusers#5604, #5000, #5170, #12007): the base is back bit for bit after 100 random merges."""
    job = Blended(dtype)
    layers = {name: layer for name, layer in job.layers.items() if "attn1" in name}
    for seed, kind in enumerate(["lora", "lora", "lokr", "dora-output"]):
        job.blend.load(adapter(layers, kind, seed=seed), f"a{seed}")
    chance = random.Random(0)
    for _ in range(100):
        some = chance.sample(job.blend.adapters, chance.randint(1, 4))
        job.blend.set({name: chance.uniform(-1, 1) for name in some})
        job.blend.merge(only=chance.sample(some, chance.randint(1, len(some))), keep=keep)  # type: ignore[arg-type]
        assert not job.untouched()
        if chance.random() < 0.5:
            job.blend.set({name: chance.uniform(-1, 1) for name in some})
        job.blend.restore()
        assert job.untouched()


def test_several_fused_adapters_come_out_one_by_one(job: Blended) -> None:
    """Lesson 3 (diffusers#5000): each of several merged adapters can leave; the scale set before is still the scale."""
    for seed in range(3):
        job.load(f"a{seed}", seed=seed)
    job.blend.set({"a0": 0.5, "a1": -0.4, "a2": 0.8})
    job.blend.merge()
    job.blend.remove("a1")
    assert job.blend.scales == {"a0": 0.5, "a2": 0.8}
    left = job.look()
    job.blend.restore()
    assert job.untouched() and close(job.look(), left)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_is_the_base_and_leaves_the_chosen_weight(job: Blended, kind: str) -> None:
    """Lesson 5 (diffusers#4751, #9525): weight 0 changes nothing, and using it once does not forget the 0.5 chosen."""
    job.load("a", kind, scale=0.5)
    chosen = job.look()
    with job.blend.using(a=0.0):
        assert torch.equal(job.look(), job.base)
    assert job.blend.scales == {"a": 0.5} and torch.equal(job.look(), chosen)


def test_a_weight_reaches_every_kind_of_layer_or_is_refused(job: Blended) -> None:
    """Lesson 6 (diffusers#4017, #9184): one grammar for every layer, and a name of nothing fails."""
    job.load("a")
    for glob in (
        "unet.mid_block",
        "unet.mid_block.attentions.0.*",
        "*.resnets.*.conv1",
        "*samplers*",
        "unet.conv_in",
        "unet.time_embedding",
        "text_encoder.*.mlp.fc1",
    ):
        job.blend.set({"a": {"*": 0, glob: 1.0}})
        assert not torch.equal(job.look(), job.base), glob
    with pytest.raises(AdapterError, match="nearest: unet.mid_block"):
        job.blend.set({"a": {"unet.midblock": 1.0}})


@torch.no_grad()
def test_changing_adapters_compiles_nothing_anew() -> None:
    """Lesson 7 (diffusers#9279, PR#9453): other ranks, other layers and the text encoder swap without recompiling."""
    torch._dynamo.reset()
    models = {part: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)) for part in ("unet", "text_encoder")}
    blend = lv.Blend(models, capacity=6, targets="*")
    counter = CompileCounter()
    compiled = [torch.compile(model, backend=counter, fullgraph=True) for model in models.values()]
    x, layers = torch.randn(3, 6), names.index(models)
    outs = [model(x) for model in compiled]
    first = counter.frame_count
    for number, (rank, some) in enumerate([(4, layers), (2, dict(list(layers.items())[1:])), (6, layers)]):
        blend.load(adapter(some, rank=rank, seed=number), f"a{number}", scale=0)
        blend.set({f"a{number}": 0.5})
        outs = [model(x) for model in compiled]
    assert counter.frame_count == first
    assert all(torch.allclose(out, model(x), atol=1e-5) for out, model in zip(outs, models.values(), strict=True))
    torch._dynamo.reset()


def test_each_picture_of_a_batch_has_its_own_adapters(studio: Studio) -> None:  # noqa: F811
    """Lesson 21 (peft PR#1558): under guidance too, where each picture is there twice."""
    ones = []
    for row in ({"a": 0.5}, {"b": 0.8}):
        studio.blend.set(row)
        ones.append(studio.draw("dot", guidance=3.0, steps=2))
    studio.blend.set({"a": [0.5, 0.0], "b": [0.0, 0.8]})
    both = studio.draw("dot", "dot", guidance=3.0, steps=2)
    assert close(both[:1], ones[0], torch.float16) and close(both[1:], ones[1], torch.float16)


def test_adapters_stay_in_their_region(studio: Studio) -> None:  # noqa: F811
    """Lesson 22 (ComfyUI#2445): in one UNet call no latent pixel outside a mask feels what sounds inside it."""
    x, t, states = torch.randn(2, 4, 16, 16), torch.tensor(300), torch.randn(2, 16, 16)
    studio.blend.set({})
    base = studio.pipe.unet(x, t, states).sample
    for size in (8, 32):  # masks of any resolution
        mask = torch.zeros(size, size)
        mask[:, : size // 2] = 1
        studio.blend.set({}, regions=[Region({"a": 3.0}, mask)])
        out = studio.pipe.unet(x, t, states).sample
        assert torch.allclose(out[..., 8:], base[..., 8:], atol=1e-5)
        assert not torch.allclose(out[..., :8], base[..., :8], atol=1e-1)


def test_weights_may_vary_by_step(studio: Studio) -> None:  # noqa: F811
    """Lesson 23 (diffusers#11599): silent from the second step on is the base from there, and nothing is left set."""
    studio.blend.set({"a": 0.5})
    plain = studio.draw("dot", steps=2)
    studio.blend.set({"a": 0.5}, schedule=listed([1, 0]))
    varied = studio.draw("dot", steps=2)
    studio.blend.set({"a": 0.5})
    assert torch.equal(studio.draw("dot", steps=2), plain) and not close(varied, plain)


def test_removing_one_adapter_frees_its_bytes(job: Blended) -> None:
    """Lesson 25 (diffusers#8532, #9325, peft#1639): nothing holds its tensors, the stack is as wide as what is left."""
    job.load("stays", seed=1)
    gone = job.load("goes", seed=2)
    refs = [weakref.ref(t) for factors in gone.layers.values() for t in factors.tensors().values()]
    job.blend.set({"stays": 1.0, "goes": 1.0})
    job.blend.remove("goes")
    del gone
    gc.collect()
    assert not [ref for ref in refs if ref() is not None]
    assert job.blend.adapters == ("stays",)
    job.blend.remove("stays")
    assert _held(job) == 0


def _held(job: Blended) -> int:
    """Bytes of adapter state in the layers."""
    buffers = [b for layer in job.layers.values() if isinstance(layer, LoraLayer) for b in layer.buffers(recurse=False)]
    return sum(size for _, size in {(b.untyped_storage().data_ptr(), b.untyped_storage().nbytes()) for b in buffers})
