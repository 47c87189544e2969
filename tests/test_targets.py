"""Named sets choose the layers other tools mean by them; a pattern that matches nothing says what is near."""

from __future__ import annotations

import pytest
from models import tiny_text_encoder, tiny_tokenizer, tiny_unet
from torch import nn

from lora_vision import names
from lora_vision.errors import AdapterError
from lora_vision.targets import match, select


@pytest.fixture(scope="module")
def layers() -> dict[str, nn.Module]:
    return names.index({"unet": tiny_unet(), "text_encoder": tiny_text_encoder(tiny_tokenizer())})


@pytest.mark.parametrize(
    ("targets", "some", "never"),
    [
        ("attention", ["attn1.to_q", "attn2.to_out.0", "self_attn.out_proj"], ["ff.net", "conv1", "fc1"]),
        ("self-attention+ff+conv", ["attn1.to_k", "ff.net.0.proj", "conv_shortcut", "samplers.0.conv"], ["attn2"]),
        ("cross-attention", ["attn2.to_v"], ["attn1", "text_encoder"]),
        ("attention+conv", ["attn1.to_k", "resnets.0.conv1"], ["proj_in", "time_emb_proj", "conv_in"]),
        ("text", ["mlp.fc2", "self_attn.q_proj"], ["unet", "embedding"]),
        ("qv", ["attn1.to_q", "attn2.to_v", "self_attn.v_proj"], ["to_k", "to_out", "k_proj"]),
        (("unet.mid_block", "*.to_q"), ["unet.mid_block.resnets.0.conv1", "attn2.to_q"], ["up_blocks.0.resnets"]),
    ],
)
def test_sets(layers: dict[str, nn.Module], targets: str, some: list[str], never: list[str]) -> None:
    chosen = select(targets, layers)
    assert all(any(part in name for name in chosen) for part in some)
    assert not [name for name in chosen if any(part in name for part in never)]
    assert not [name for name in chosen if isinstance(layers[name], nn.LayerNorm | nn.GroupNorm)]
    assert chosen == [name for name in layers if name in set(chosen)]


def test_vit_sets_use_classic_names() -> None:
    attention = "vit.encoder.layer.0.attention"
    paths = [f"{attention}.attention.query", f"{attention}.attention.value", f"{attention}.output.dense"]
    paths += ["vit.encoder.layer.0.intermediate.dense", "vit.encoder.layer.0.output.dense", "vit.classifier"]
    layers = {path: nn.Linear(2, 2) for path in paths}
    assert select("vit", layers) == paths[:5]
    assert select("attention", layers) == paths[:3]
    assert select("ff", layers) == paths[3:5]
    assert select("qv", layers) == paths[:2]


@pytest.mark.parametrize(("wrong", "near"), [("atention", "attention"), ("unet.up_block.*", "unet.up_blocks")])
def test_nothing_matched_lists_what_is_near(layers: dict[str, nn.Module], wrong: str, near: str) -> None:
    with pytest.raises(AdapterError, match=f"{wrong[:6]}.*nearest: .*{near}"):
        select(wrong, layers)
    with pytest.raises(AdapterError, match="nearest"):
        match("unet.mid_blok", list(layers))


def test_a_set_absent_from_the_model_is_an_error(layers: dict[str, nn.Module]) -> None:
    with pytest.raises(AdapterError, match="'vit' matches none"):
        select("attention+vit", layers)
