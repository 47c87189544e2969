"""Training on an injected model: the identity at first, W + BA afterwards, and no trace when it is over."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from kinds import KINDS, adapter, linear_and_conv, same_state, snapshot
from models import tiny_text_encoder, tiny_tokenizer, tiny_unet
from torch import Tensor, nn

import lora_vision as lv
from lora_vision import names
from lora_vision.config import LoraConfig
from lora_vision.errors import AdapterError, BaseModelError
from lora_vision.factors import LowRank
from lora_vision.layers import LoraLayer

EVERYWHERE = "attention+ff+conv"


class Job:
    """A tiny UNet and text encoder with fixed inputs."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.unet = tiny_unet().to(dtype)
        self.text = tiny_text_encoder(tiny_tokenizer()).to(dtype)
        self.parts: dict[str, nn.Module] = {"unet": self.unet, "text_encoder": self.text}
        self.x = torch.randn(2, 4, 16, 16).to(dtype)
        self.t = torch.tensor([10, 500])
        self.ids = torch.randint(0, 40, (2, 16))

    def run(self) -> Tensor:
        states = self.text(self.ids)[0]
        return self.unet(self.x, self.t, states, return_dict=False)[0]  # type: ignore[no-any-return]

    def look(self) -> Tensor:
        with torch.no_grad():
            return self.run()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_injection_is_the_identity(dtype: torch.dtype) -> None:
    job = Job(dtype)
    before = job.look()
    parameters = lv.inject(job.parts, LoraConfig(rank=4, targets=EVERYWHERE))
    assert torch.equal(job.look(), before)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in parameters)
    trainable = [p for model in job.parts.values() for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in parameters}


def test_training_leaves_the_base_alone_and_detach_leaves_no_trace() -> None:
    job = Job()
    states, look = snapshot(job.parts.values()), job.look()
    modules = [list(model.named_modules()) for model in job.parts.values()]
    parameters = lv.inject(job.parts, LoraConfig(rank=4, alpha=2, targets=EVERYWHERE))
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(2):
        job.run().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = job.look()
    assert not torch.allclose(trained, look, atol=1e-3)
    found = lv.collect(job.parts)
    assert set(found.parts) == {"unet", "text_encoder"} and len(found.layers) * 2 == len(parameters)
    lv.detach(job.parts)
    assert torch.equal(job.look(), look)
    for model, state, listed in zip(job.parts.values(), states, modules, strict=True):
        assert same_state(state, model.state_dict())
        assert [(name, type(m)) for name, m in listed] == [(name, type(m)) for name, m in model.named_modules()]
    report = lv.attach(job.parts, found)
    assert report.complete and len(report.matched) == len(found.layers)
    assert torch.allclose(job.look(), trained, atol=1e-5)


def test_same_seed_same_parameters() -> None:
    one, two, three = (lv.inject(Job().parts, LoraConfig(rank=2, seed=seed)) for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0], three[0])


@pytest.mark.parametrize("alpha", [4.0, 1.0])
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 5), lambda: nn.Conv2d(6, 5, 3, stride=2, padding=1)])
def test_gradients_equal_explicit_w_plus_ba(make: Callable[[], nn.Module], alpha: float) -> None:
    torch.manual_seed(0)
    layer = make()
    explicit = copy.deepcopy(layer)
    x = torch.randn(2, 7, 6) if isinstance(layer, nn.Linear) else torch.randn(2, 6, 8, 8)
    parts = {"unet": nn.ModuleDict({"one": layer})}
    down, up = lv.inject(parts, LoraConfig(rank=3, alpha=alpha, targets="*"))
    with torch.no_grad():
        up.normal_()
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(x1).square().sum().backward()
    d2, u2 = down.detach().clone().requires_grad_(), up.detach().clone().requires_grad_()
    weight = explicit.weight + (u2 @ d2.flatten(1)).view_as(explicit.weight) * (alpha / 3)
    torch.func.functional_call(explicit, {"weight": weight}, (x2,)).square().sum().backward()
    for ours, theirs in ((down.grad, d2.grad), (up.grad, u2.grad), (x1.grad, x2.grad)):
        assert ours is not None and theirs is not None and torch.allclose(ours, theirs, atol=1e-3, rtol=1e-4)
    assert layer.weight.grad is None


def test_embedding_trains() -> None:
    table = nn.Embedding(9, 4)
    parts = {"text_encoder": nn.ModuleDict({"token": table})}
    ids = torch.tensor([[1, 2, 8]])
    before = table(ids)
    _, up = lv.inject(parts, LoraConfig(rank=2, targets="*token"))
    assert torch.equal(table(ids), before)
    table(ids).sum().backward()
    assert up.grad is not None and up.grad[1].any() and not up.grad[0].any()
    with torch.no_grad():
        up.normal_()
    delta = lv.collect(parts).layers["text_encoder.token"].delta()
    assert torch.allclose(table(ids), before + delta[ids], atol=1e-6)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    grads = []
    for checkpointed in (False, True):
        job = Job()
        parameters = lv.inject(job.parts, LoraConfig(rank=2, targets=EVERYWHERE))
        job.unet.train()
        if checkpointed:
            job.unet.enable_gradient_checkpointing()
        job.run().square().mean().backward()
        grads.append([p.grad for p in parameters])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_base_trains_float32_adapters(autocast: bool) -> None:
    job = Job(torch.float32 if autocast else torch.bfloat16)
    parameters = lv.inject(job.parts, LoraConfig(rank=2, targets=EVERYWHERE))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        job.run().float().square().mean().backward()
    ups = parameters[1::2]
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in parameters)
    assert sum(bool(p.grad.any()) for p in ups if p.grad is not None) > 0.9 * len(ups)


def test_nothing_is_half_applied() -> None:
    job = Job()
    states = snapshot(job.parts.values())
    layers = linear_and_conv(names.index(job.parts))
    good = adapter(layers)
    wrong = {**good.layers, "unet.nowhere": LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0)}
    with pytest.raises(AdapterError, match=r"unmatched: unet\.nowhere"):
        lv.attach(job.parts, lv.Adapter(wrong))
    name = next(iter(good.layers))
    with pytest.raises(AdapterError, match="misshapen"):
        lv.attach(job.parts, lv.Adapter({**good.layers, name: LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0)}))
    with pytest.raises(AdapterError, match="does not fit"):
        lv.attach(job.parts, lv.Adapter({"vit.one": good.layers[name]}), strict=False)
    with pytest.raises(AdapterError, match="rank 0"):
        lv.inject(job.parts, LoraConfig(rank=0))
    with pytest.raises(AdapterError, match="inject before collect"):
        lv.collect(job.parts)
    assert not any(isinstance(layer, LoraLayer) for layer in layers.values())
    assert all(same_state(s, m.state_dict()) for s, m in zip(states, job.parts.values(), strict=True))
    report = lv.attach(job.parts, lv.Adapter(wrong), strict=False)
    assert report.unmatched == ("unet.nowhere",) and len(report.matched) == len(good.layers)


def test_quantised_and_grouped_layers_are_refused_by_name() -> None:
    class Odd(nn.Linear):
        pass

    with pytest.raises(AdapterError, match=r"unet\.one is a .*Odd"):
        lv.inject({"unet": nn.ModuleDict({"one": Odd(2, 2)})}, LoraConfig(targets="*"))
    with pytest.raises(AdapterError, match="2 groups"):
        lv.inject({"unet": nn.ModuleDict({"one": nn.Conv2d(2, 2, 1, groups=2)})}, LoraConfig(targets="*"))


def test_other_adapters_are_refused() -> None:
    peft = pytest.importorskip("peft")
    job = Job()
    job.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(BaseModelError, match="PEFT"):
        lv.inject(job.parts, LoraConfig())
    job = Job()
    lv.inject(job.parts, LoraConfig())
    with pytest.raises(BaseModelError, match="call detach first"):
        lv.inject(job.parts, LoraConfig())


@pytest.mark.parametrize("kind", KINDS)
def test_attached_models_copy_and_pickle(kind: str) -> None:
    job = Job()
    layers = linear_and_conv(names.index({"unet": job.unet}))
    lv.attach({"unet": job.unet}, adapter(layers, kind), 0.5)
    look = job.look()
    original = job.unet
    job.unet = copy.deepcopy(original)
    assert torch.equal(job.look(), look)
    file = io.BytesIO()
    torch.save(original, file)
    file.seek(0)
    job.unet = torch.load(file, weights_only=False)
    assert torch.equal(job.look(), look)
    lv.detach({"unet": job.unet})
    assert not torch.equal(job.look(), look)


@pytest.mark.parametrize("kind", KINDS)
def test_attached_equals_the_changed_weight_and_zero_is_the_base(kind: str) -> None:
    job = Job()
    layers = linear_and_conv(names.index({"unet": job.unet}))
    found, look = adapter(layers, kind), job.look()
    lv.attach({"unet": job.unet}, found, 0.0)
    assert torch.equal(job.look(), look)
    lv.detach({"unet": job.unet})
    lv.attach({"unet": job.unet}, found, 0.7)
    live = job.look()
    lv.detach({"unet": job.unet})
    with torch.no_grad():
        for name, layer in layers.items():
            layer.weight += 0.7 * found.layers[name].delta(layer.weight)
    assert torch.allclose(job.look(), live, atol=1e-4, rtol=1e-3) and not torch.allclose(live, look, atol=1e-2)
