"""Every variant that trains: zero at first, saved as it was trained, and read by its own community's tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import same_state, snapshot
from lycoris.kohya import LycorisNetworkKohya, create_network_from_weights
from models import tiny_text_encoder, tiny_tokenizer, tiny_unet
from peft import PeftModel
from torch import Tensor, nn

import lora_vision as lv
from lora_vision import names
from lora_vision.config import LoraConfig
from lora_vision.errors import AdapterError
from lora_vision.factors import Dora, Hadamard, Kronecker, LowRank
from lora_vision.inject import rates
from lora_vision.targets import select
from lora_vision.trained import limit_norms

VARIANTS = ("lora", "rslora", "pissa", "dora", "loha", "lokr")
LAYERS = "attention+conv"
PRESET = {
    "enable_conv": True,
    "unet_target_module": ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"],
    "unet_target_name": [],
    "text_encoder_target_module": [],
    "text_encoder_target_name": [],
}
CONV = "unet.down_blocks.0.resnets.0.conv1"
QUERY = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def parts(dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    found = {"unet": tiny_unet(), "text_encoder": tiny_text_encoder(tiny_tokenizer())}
    return {name: module.to(dtype).eval() for name, module in found.items()}


def output(models: dict[str, nn.Module]) -> Tensor:
    unet = models["unet"]
    generator = torch.Generator().manual_seed(1)
    x, states = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 5, 16, generator=generator)
    dtype = next(unet.parameters()).dtype
    return unet(x.to(dtype), torch.tensor([10, 500]), states.to(dtype), return_dict=False)[0]  # type: ignore[no-any-return]


@torch.no_grad()
def look(models: dict[str, nn.Module]) -> Tensor:
    return output(models)


def config(variant: str, **changes: Any) -> LoraConfig:
    return LoraConfig(**{"rank": 3, "alpha": 2.0, "targets": LAYERS, "variant": variant, **changes})


def train(models: dict[str, nn.Module], settings: LoraConfig, steps: int = 3) -> list[nn.Parameter]:
    """Parameters that have been moved by gradients."""
    parameters = lv.inject({"unet": models["unet"]}, settings)
    optimizer = torch.optim.AdamW(parameters, lr=3e-2)
    for _ in range(steps):
        (output(models) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(parameter.ne(0).any() for parameter in parameters) or settings.module_dropout, "everything is trained"
    return parameters


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_change_is_zero(variant: str, dtype: torch.dtype) -> None:
    models = parts(dtype)
    before = look(models)
    parameters = lv.inject({"unet": models["unet"]}, config(variant))
    assert all(parameter.dtype == torch.float32 for parameter in parameters)
    if variant == "pissa":
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(look(models), before, rtol=tolerance, atol=tolerance)
    else:
        assert torch.equal(look(models), before)
    assert len(list(models["unet"].parameters())) > len(parameters)
    known = {id(parameter) for parameter in parameters}
    assert known == {id(p) for p in models["unet"].parameters() if p.requires_grad}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_trained_is_what_is_saved(variant: str, tmp_path: Path) -> None:
    models = parts()
    plain, states = look(models), snapshot(models.values())
    train(models, config(variant))
    trained = look(models)
    scale = trained.abs().max()
    assert (trained - plain).abs().max() > 0.01 * scale
    path = lv.save_adapter(lv.collect(models), tmp_path / "ours.safetensors")
    lv.detach(models)
    assert torch.equal(look(models), plain)
    assert all(same_state(was, model.state_dict()) for was, model in zip(states, models.values(), strict=True))
    lv.attach(models, lv.load_adapter(path))
    assert (look(models) - trained).abs().max() <= 2e-5 * scale

    theirs = parts()
    LycorisNetworkKohya.apply_preset(PRESET)
    network, _ = create_network_from_weights(1.0, str(path), None, theirs["text_encoder"], theirs["unet"])
    network.apply_to(theirs["text_encoder"], theirs["unet"], False, True)
    assert (look(theirs) - trained).abs().max() <= 2e-5 * scale, "LyCORIS computes the same"
    if variant != "lokr":  # a split of sizes that PEFT's settings cannot say
        lv.save_adapter(lv.load_adapter(path), tmp_path / "peft", format="peft")
        with torch.no_grad():
            theirs = {"unet": PeftModel.from_pretrained(parts()["unet"], str(tmp_path / "peft")).eval()}
            assert (look(theirs) - trained).abs().max() <= 2e-5 * scale, "PEFT computes the same"


def test_each_variant_has_its_own_form() -> None:
    kinds = {"lora": LowRank, "rslora": LowRank, "pissa": LowRank, "dora": Dora, "loha": Hadamard, "lokr": Kronecker}
    for variant, kind in kinds.items():
        models = parts()
        lv.inject(models, config(variant))
        layers = lv.collect(models).layers
        assert {type(factors) for factors in layers.values()} == {kind}
        assert layers[CONV].delta(names.index(models)[CONV].weight.detach()).shape == (16, 16, 3, 3)
        if variant == "rslora":
            assert layers[QUERY].alpha / 3 == pytest.approx(2 / 3**0.5)
        if variant == "pissa":
            assert layers[QUERY].rank == 6 and layers[QUERY].delta().abs().max() < 1e-6


def test_pissa_starts_from_the_principal_values() -> None:
    models = parts()
    weight = models["unet"].get_submodule(QUERY.removeprefix("unet.")).weight.detach().clone()
    lv.inject(models, config("pissa", alpha=5.0))
    start = names.index(models)[QUERY].lora_trained.factors
    u, s, v = torch.linalg.svd(weight)
    torch.testing.assert_close(start.delta(), u[:, :3] * s[:3] @ v[:3], rtol=1e-3, atol=1e-4)


def test_numbers_by_layer() -> None:
    models = parts()
    lines = ("conv:rank=2,alpha=8", "unet.mid_block.*:rate=0.5", "unet.mid_block.attentions:rank=1")
    settings = config("lora", alpha=None, layers=lines, up_rate=4.0)
    parameters = lv.inject(models, settings)
    layers = lv.collect(models).layers
    assert (layers[CONV].rank, layers[CONV].alpha) == (2, 8)
    assert (layers[QUERY].rank, layers[QUERY].alpha) == (1, 1)
    other = QUERY.replace("mid_block", "down_blocks.1")
    assert (layers[other].rank, layers[other].alpha) == (3, 3)
    found = dict(zip((id(p) for p in parameters), rates(models, settings), strict=True))
    for name, wanted in ((QUERY, 0.5), (CONV, 1.0)):
        layer = names.index(models)[name]
        assert (found[id(layer.lora_down)], found[id(layer.lora_up)]) == (wanted, 4 * wanted)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("conv", "expected layers, a colon and numbers"),
        ("conv:rank=two", "expected layers, a colon and numbers"),
        ("conv:rnk=2", "expected layers, a colon and numbers"),
        ("conv:rank=1.5", "a whole rank of at least 1"),
        ("ff:rank=2", "the set 'ff' matches none"),
    ],
)
def test_lines_that_make_no_sense_are_refused(line: str, words: str) -> None:
    models = parts()
    with pytest.raises(AdapterError, match=words):
        lv.inject(models, config("lora", layers=(line,)))
    assert all(type(module).__name__ != "LoraLinear" for module in models["unet"].modules())


@pytest.mark.parametrize("variant", ["lora", "dora", "loha", "lokr", "pissa"])
def test_dropouts_act_in_training_only_and_come_from_the_seed(variant: str) -> None:
    models = parts()
    train(models, config(variant, rank_dropout=0.5, module_dropout=0.2))
    torch.manual_seed(0)
    first, second = output(models).detach(), output(models).detach()
    torch.manual_seed(0)
    again = output(models).detach()
    assert torch.equal(first, again) and not torch.allclose(first, second)
    whole = look(models)
    adapter = lv.collect(models)
    lv.detach(models)
    lv.attach(models, adapter)
    torch.testing.assert_close(look(models), whole, rtol=1e-4, atol=1e-4)


def test_a_module_left_out_is_the_base() -> None:
    for variant in ("lora", "dora", "loha"):
        models = parts()
        plain = look(models)
        train(models, config(variant, module_dropout=0.1), steps=1)
        for layer in models["unet"].modules():
            if getattr(layer, "lora_trained", None) is not None:
                layer.lora_trained.module_dropout = 1.1
        torch.testing.assert_close(output(models).detach(), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["lora", "dora", "loha", "lokr"])
def test_norms_are_limited(variant: str) -> None:
    models = parts()
    train(models, config(variant))
    layers = names.index(models)

    def norms() -> list[float]:
        found = lv.collect(models).layers.values()
        return [float((each.inner if isinstance(each, Dora) else each).delta().norm()) for each in found]

    before = norms()
    limit_norms(layers, most := sorted(before)[len(before) // 2])
    for was, now in zip(before, norms(), strict=True):
        assert now == pytest.approx(min(was, most), rel=1e-4)


def test_the_style_block_is_sdxls() -> None:
    torch.manual_seed(0)
    layers = names.index({"unet": tiny_unet("sdxl")})
    chosen = select("style", layers)
    assert chosen and all(name.startswith("unet.up_blocks.0.attentions.1.") for name in chosen)
    assert not any(".ff." in name for name in chosen)
