"""PEFT itself: we read what it saves to the weights it merges, and it loads what we write to the same output."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import Maker, assert_same
from models import tiny_text_encoder, tiny_tokenizer, tiny_unet
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from lora_vision import names
from lora_vision.adapter import Adapter
from lora_vision.errors import AdapterError
from lora_vision.files import load_adapter, save_adapter
from lora_vision.inject import attach, detach

UNET = ["to_q", "to_out.0", "conv1", "proj_in"]
CONFIGS: dict[str, tuple[str, Any]] = {
    "lora": ("unet", LoraConfig(r=4, lora_alpha=6, target_modules=UNET)),
    "rslora": ("unet", LoraConfig(r=4, lora_alpha=6, target_modules=UNET, use_rslora=True)),
    "dora": ("unet", LoraConfig(r=4, lora_alpha=6, target_modules=UNET, use_dora=True)),
    "patterns": (
        "unet",
        LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=UNET,
            rank_pattern={r"^mid_block.*to_q": 2, "conv1": 3},
            alpha_pattern={"attn2.to_q": 1, "up_blocks.0.attentions.0.proj_in": 9},
        ),
    ),
    "lora-bias": ("unet", LoraConfig(r=4, lora_alpha=6, target_modules=["to_out.0"], lora_bias=True)),
    "bias-only": ("unet", LoraConfig(r=4, lora_alpha=6, target_modules=["to_out.0"], bias="lora_only")),
    "bias-all": ("unet", LoraConfig(r=4, lora_alpha=6, target_modules=["to_out.0"], bias="all")),
    "saved": ("unet", LoraConfig(r=4, lora_alpha=6, target_modules=["to_q"], modules_to_save=["conv_in", "norm1"])),
    "loha": ("unet", LoHaConfig(r=2, alpha=3, target_modules=UNET)),
    "loha-conv": ("unet", LoHaConfig(r=2, alpha=3, target_modules=UNET, use_effective_conv2d=True)),
    "lokr": ("unet", LoKrConfig(r=2, alpha=3, target_modules=UNET)),
    "lokr-conv": (
        "unet",
        LoKrConfig(r=2, alpha=3, target_modules=UNET, use_effective_conv2d=True, decompose_both=True),
    ),
    "lokr-full": ("unet", LoKrConfig(r=64, alpha=32, target_modules=["to_q", "to_out.0"])),
    "ia3": ("unet", IA3Config(target_modules=["to_k", "ff.net.2", "to_out.0"], feedforward_modules=["ff.net.2"])),
    "ia3-conv": (
        "unet",
        IA3Config(target_modules=["to_k", "conv1", "time_emb_proj", "proj"], feedforward_modules=["proj"]),
    ),
    "text": ("text_encoder", LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "fc1"])),
    "embedding": ("text_encoder", LoraConfig(r=4, lora_alpha=6, target_modules=["token_embedding", "v_proj"])),
    "embedding-alone": ("text_encoder", LoraConfig(r=4, lora_alpha=6, target_modules=["token_embedding"])),
    "embedding-dora": (
        "text_encoder_2",
        LoraConfig(r=4, lora_alpha=6, target_modules=["token_embedding", "v_proj"], use_dora=True),
    ),
    "text-2": ("text_encoder_2", LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "text_projection"])),
    "vit-bias-all": (
        "vit",
        LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], modules_to_save=["classifier"], bias="all"),
    ),
    "vit": ("vit", LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "fc1"], modules_to_save=["classifier"])),
}
WRITTEN = {"lora", "rslora", "dora", "patterns", "loha", "ia3", "ia3-conv", "saved", "bias-only", "bias-all"}
WRITTEN |= {"embedding-dora", "text-2"}


def model(part: str) -> nn.Module:
    torch.manual_seed(0)
    if part == "vit":
        size = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        return ViTForImageClassification(ViTConfig(**size, intermediate_size=24)).eval()
    two = part == "text_encoder_2"
    return (tiny_unet() if part == "unet" else tiny_text_encoder(tiny_tokenizer(), projection=two)).eval()


def forward(part: str, found: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        if part == "vit":
            return found(torch.randn(1, 3, 16, 16, generator=generator)).logits
        if part.startswith("text_encoder"):
            out = found(torch.arange(8)[None])
            return (
                out.last_hidden_state
                if part == "text_encoder"
                else torch.cat([*out.last_hidden_state, out.text_embeds])
            )
        states = torch.randn(1, 5, 16, generator=generator)
        return found(torch.randn(1, 4, 16, 16, generator=generator), 7, states).sample


def trained(part: str, config: Any) -> PeftModel:
    """Returns a PEFT model whose adapter parameters have all moved."""
    found = get_peft_model(model(part), config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * (0.02 if "magnitude" in name else 0.1))
    return found


@pytest.mark.parametrize("kind", CONFIGS)
def test_peft_and_we_compute_the_same(kind: str, tmp_path: Path) -> None:
    part, config = CONFIGS[kind]
    theirs = trained(part, config)
    expected, plain = forward(part, theirs), forward(part, model(part))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = model(part)
    adapter = load_adapter(tmp_path / "theirs")
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    report = attach({part: ours}, adapter)
    assert report.complete and not report.ignored
    scale = expected.abs().max()
    assert (expected - plain).abs().max() > 1e-4 * scale, "the adapter does something"
    assert (forward(part, ours) - expected).abs().max() <= 1e-5 * scale
    detach({part: ours})
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())
    if kind in WRITTEN:
        save_adapter(adapter, tmp_path / "ours", "peft")
        assert load_adapter(tmp_path / "ours").layers.keys() == adapter.layers.keys()
        again = PeftModel.from_pretrained(model(part), str(tmp_path / "ours")).eval()
        assert (forward(part, again) - expected).abs().max() <= 1e-5 * scale


def test_merged_weights_are_pefts(tmp_path: Path) -> None:
    part, config = CONFIGS["dora"]
    theirs = trained(part, config)
    theirs.save_pretrained(tmp_path)
    adapter, layers = load_adapter(tmp_path), names.index({part: model(part)})
    merged = theirs.merge_and_unload()
    for name, layer in names.index({part: merged}).items():
        weight = layers[name].weight.detach()
        found = weight + adapter.layers[name].delta(weight) if name in adapter.layers else weight
        torch.testing.assert_close(found, layer.weight.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("setting", [{"init_lora_weights": "pissa"}, {"fan_in_fan_out": True}, {"peft_type": "VERA"}])
def test_settings_that_change_the_meaning_are_refused(setting: dict[str, Any], tmp_path: Path) -> None:
    trained(*CONFIGS["lora"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    with pytest.raises(AdapterError, match=r"pissa|transposed|VERA"):
        load_adapter(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": 10**400},
        {"auto_mapping": [1]},
        {"use_dora": True},
        {"rank_pattern": [4]},
        {"rank_pattern": {"(a+)+b": 4}},
        {"alpha_pattern": {"(": 4}},
        {"alpha_pattern": {"a{99999999999999}": 4}},
        {"alpha_pattern": {"to_q": "much"}},
        {"peft_type": "IA3", "feedforward_modules": 7},
        {"peft_type": "IA3", "feedforward_modules": "("},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    leaves = ["ia3_l"] if "peft_type" in settings else ["lora_A.weight", "lora_B.weight"]
    stem = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file({f"{stem}.{leaf}": torch.ones(4, 4) for leaf in leaves}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4} | settings
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"settings|auto_mapping"):
        load_adapter(tmp_path)


def test_a_rank_for_each_of_many_layers_is_looked_up_at_once(tmp_path: Path) -> None:
    make = Maker()
    block = "unet.down_blocks.{}.attentions.{}.transformer_blocks.{}.attn{}.to_{}"
    numbers = itertools.product(range(3), range(3), range(10), "12", "qkv")
    layers = {block.format(*n): make.lora(4, 4, 1 + at % 5, 0.1 + at) for at, n in enumerate(numbers)}
    save_adapter(Adapter(layers), tmp_path, "peft")
    begin = time.process_time()
    assert_same(load_adapter(tmp_path), Adapter(layers))
    assert time.process_time() - begin < 1, "as it took when every layer tried every pattern"


def test_a_whole_clip_and_an_old_head_are_understood(tmp_path: Path) -> None:
    stems = ("text_model.encoder.layers.0.self_attn.q_proj", "vision_model.encoder.layers.0.self_attn.q_proj")
    tensors = {f"base_model.model.{stem}.lora_{x}.weight": torch.ones(4, 4) for stem in stems for x in "AB"}
    for copy in ("modules_to_save", "original_module"):
        tensors[f"base_model.model.visual_projection.{copy}.weight"] = torch.ones(3, 4)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 4}')
    found = load_adapter(tmp_path).layers
    assert set(found) == {f"text_encoder.{stems[0]}", f"vit.{stems[1]}", "vit.visual_projection"}


def test_a_language_model_is_refused(tmp_path: Path) -> None:
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    save_file({key.format(x): torch.ones(4, 4) for x in "AB"}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 4}')
    with pytest.raises(AdapterError, match="language model"):
        load_adapter(tmp_path)


def test_an_empty_adapter_is_refused() -> None:
    with pytest.raises(AdapterError, match="nothing to save"):
        save_adapter(Adapter({}), "x.safetensors")
