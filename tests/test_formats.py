"""Reading what was written gives it back, in every format that can hold it, and is refused in the others."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import CONV, LINEAR, TEXT, Maker, assert_same, every_kind
from safetensors.torch import load_file, save, save_file
from torch import nn

from lora_vision import formats
from lora_vision.adapter import Adapter
from lora_vision.errors import AdapterError
from lora_vision.factors import LowRank
from lora_vision.files import load_adapter, save_adapter
from lora_vision.inject import compare
from lora_vision.tools.account import account
from lora_vision.tools.resize import Size, resize

KINDS = sorted(every_kind())
HOLDS = {
    "kohya": set(KINDS) - {"whole", "vit"},
    "diffusers": {"lora", "locon", "dora", "sdxl"},
    "peft": {"lora", "lora-ranks", "locon", "loha", "dora", "vit", "whole", "sdxl"},
}


def target(folder: Path, name: str, format: str) -> Path:
    return folder / name if format == "peft" else folder / f"{name}.safetensors"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", HOLDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reads_back_what_it_wrote(kind: str, format: str, dtype: torch.dtype, tmp_path: Path) -> None:
    adapter = every_kind(dtype)[kind]
    path = target(tmp_path, kind, format)
    if kind in HOLDS[format]:
        assert_same(load_adapter(save_adapter(adapter, path, format)), adapter)
    elif (kind, format) != ("lora-ranks", "diffusers"):  # held by effect, see below
        with pytest.raises(AdapterError, match=r"format|PEFT"):
            save_adapter(adapter, path, format)
        assert not list(tmp_path.rglob("*.*")), "nothing may be left of a refused file"


@pytest.mark.parametrize("first", HOLDS)
@pytest.mark.parametrize("second", HOLDS)
def test_there_and_back_through_another_format(first: str, second: str, tmp_path: Path) -> None:
    for kind in sorted(HOLDS[first] & HOLDS[second]):
        adapter = every_kind()[kind]
        one = load_adapter(save_adapter(adapter, target(tmp_path, f"{kind}-1", first), first))
        two = load_adapter(save_adapter(one, target(tmp_path, f"{kind}-2", second), second))
        assert_same(load_adapter(save_adapter(two, target(tmp_path, f"{kind}-3", first), first)), adapter)


def test_diffusers_holds_any_scale_by_effect(tmp_path: Path) -> None:
    adapter = every_kind()["lora-ranks"]
    found = load_adapter(save_adapter(adapter, tmp_path / "a.safetensors", "diffusers"))
    for name, factors in adapter.layers.items():
        torch.testing.assert_close(found.layers[name].delta(), factors.delta(), rtol=1e-5, atol=1e-6)
        assert found.layers[name].alpha == factors.alpha


def test_kohya_names_and_leaves_are_kohyas(tmp_path: Path) -> None:
    keys = load_file(save_adapter(every_kind()["sdxl"], tmp_path / "a.safetensors"))
    assert {key.split(".")[0] for key in keys} == {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0",
        "lora_unet_input_blocks_4_0_in_layers_2",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te2_text_model_encoder_layers_1_mlp_fc1",
    }
    assert {key.split(".", 1)[1] for key in keys} == {"alpha", "lora_down.weight", "lora_up.weight"}
    assert all(keys[key].dtype == torch.float32 and keys[key].dim() == 0 for key in keys if key.endswith("alpha"))


def test_diffusers_alpha_is_right_with_and_without_the_header(tmp_path: Path) -> None:
    adapter = every_kind()["lora-ranks"]
    tensors = load_file(save_adapter(adapter, tmp_path / "a.safetensors", "diffusers"))
    save_file(tensors, tmp_path / "bare.safetensors")
    for path in ("a", "bare"):
        for name, factors in load_adapter(tmp_path / f"{path}.safetensors").layers.items():
            torch.testing.assert_close(factors.delta(), adapter.layers[name].delta(), rtol=1e-5, atol=1e-6)


def test_diffusers_header_field_carries_alpha(tmp_path: Path) -> None:
    pair = {f"{LINEAR}.lora_A.weight": torch.ones(4, 16), f"{LINEAR}.lora_B.weight": torch.ones(16, 4)}
    header = {"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_out.0": 2}, "unet.use_rslora": True}
    save_file(pair, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(header)})
    assert load_adapter(tmp_path / "a.safetensors").layers[LINEAR].alpha == 2 * 4**0.5


@pytest.mark.parametrize(
    "spelling",
    [
        "unet.{}.processor.to_out_lora.{}.weight",
        "{}.processor.to_out_lora.{}.weight",
        "unet.base_model.model.{}.to_out.0.lora.{}.weight",
        "unet.{}.to_out.0.lora.{}.weight",
        "unet.{}.to_out.0.lora_linear_layer.{}.weight",
        "unet.{}.processor.to_out.0.lora.{}.weight",
        "unet._orig_mod.{}.to_out.0.lora.{}.weight",
        "unet.input_blocks.4.1.transformer_blocks.0.attn1.to_out.0.lora.{1}.weight",
        "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_out.0.lora_{1}.weight",
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_{1}.weight",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0.lora_{1}.weight",
        "lora_unet__orig_mod_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0.lora_{1}.weight",
        "lycoris_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_{1}.weight",
    ],
)
def test_reads_every_spelling_of_one_layer(spelling: str, tmp_path: Path) -> None:
    block = LINEAR.removeprefix("unet.").removesuffix(".to_out.0")
    make = Maker()
    pair = {"down": make.tensor(4, 16), "up": make.tensor(16, 4)}
    save_file({spelling.format(block, leaf): tensor for leaf, tensor in pair.items()}, tmp_path / "a.safetensors")
    assert_same(load_adapter(tmp_path / "a.safetensors"), Adapter({LINEAR: LowRank(**pair, alpha=4.0)}))


@pytest.mark.parametrize(
    "spelling",
    [
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.{}.weight",
        "text_encoder.encoder.layers.0.self_attn.q_proj.lora_linear_layer.{}.weight",
        "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.{}.weight",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_{}.weight",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_{}.weight",
        "lora_te_encoder_layers_0_self_attn_q_proj.lora_{}.weight",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.lora_{}.weight",
    ],
)
def test_reads_every_spelling_of_a_text_layer(spelling: str, tmp_path: Path) -> None:
    pair = {"down": torch.ones(4, 16), "up": torch.ones(16, 4)}
    save_file({spelling.format(leaf): tensor for leaf, tensor in pair.items()}, tmp_path / "a.safetensors")
    assert list(load_adapter(tmp_path / "a.safetensors").layers) == [TEXT]


def test_one_layer_is_named_once(tmp_path: Path) -> None:
    tensors = {f"unet.{wrapper}conv_in.lora_A.weight": torch.ones(2, 4, 3, 3) for wrapper in ("", "_orig_mod.")}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="same tensors"):
        load_adapter(tmp_path / "a.safetensors")


def test_reads_the_merged_weights_of_ziplora(tmp_path: Path) -> None:
    change = Maker().tensor(16, 16)
    save_file({f"{LINEAR}.lora.weight": change}, tmp_path / "a.safetensors")
    assert torch.equal(load_adapter(tmp_path / "a.safetensors").layers[LINEAR].delta(), change)


def test_one_file_may_mix_spellings(tmp_path: Path) -> None:
    make = Maker()
    tensors = {f"{LINEAR}.lora.down.weight": make.tensor(4, 16), f"{LINEAR}.lora.up.weight": make.tensor(16, 4)}
    tensors |= {f"{CONV}.lora_A.weight": make.tensor(4, 8, 3, 3), f"{CONV}.lora_B.weight": make.tensor(16, 4, 1, 1)}
    tensors |= {f"lora_te_{TEXT[13:].replace('.', '_')}.lora_{x}.weight": make.tensor(16, 16) for x in ("up", "down")}
    save_file(tensors, tmp_path / "a.safetensors")
    assert set(load_adapter(tmp_path / "a.safetensors").layers) == {LINEAR, CONV, TEXT}


@pytest.mark.parametrize("prefix", ["", "unet."])
def test_reads_the_attention_processors_of_2023(prefix: str, tmp_path: Path) -> None:
    make, stem = Maker(), LINEAR.removeprefix("unet.").removesuffix(".to_out.0")
    pairs = {p: (make.tensor(4, 16), make.tensor(16, 4)) for p in ("q", "k", "v", "out")}
    keys = {f"{prefix}{stem}.processor.to_{p}_lora.{side}.weight" for p in pairs for side in ("down", "up")}
    tensors = {key: pairs[key.rpartition("to_")[2].split("_")[0]][".up." in key] for key in keys}
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    adapter = load_adapter(tmp_path)
    for p, (down, up) in pairs.items():
        name = f"unet.{stem}.to_{p}" + (".0" if p == "out" else "")
        assert torch.equal(adapter.layers[name].delta(), up @ down)


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("lora_unet_conv_in.oft_blocks", "OFT"),
        ("oft_unet_conv_in.oft_blocks", "OFT"),
        ("lora_unet_conv_in.a1.weight", "GLoRA"),
        ("lora_unet_conv_in.q_layer.weight", "T-LoRA"),
        ("lora_unet_double_blocks_0_img_attn_proj.lora_up.weight", "FLUX"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "FLUX"),
        ("lora_controlnet", "control-LoRA"),
        ("emb_params", "textual inversion"),
        ("<cat>", "textual inversion"),
        ("transformer_blocks.0.attn1.processor.to_q_lora.down.weight", "Kandinsky prior"),
        ("down_blocks.1.attentions.0.processor.add_k_proj_lora.down.weight", "Kandinsky 2.2"),
        ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", "transformer"),
        ("base_model.model.single_transformer_blocks.0.attn.to_q.lora_A.weight", "transformer"),
        ("w_a_000", "LoRA-ViT"),
        ("0.to_q_lora.down.weight", "IP-Adapter"),
        ("control_model.input_blocks.0.0.weight", "ControlNet"),
        ("diffusion_model.double_stream_blocks.0.block.attn1.to_q.lora_A.weight", "transformer"),
    ],
)
def test_refuses_what_it_does_not_know_by_its_name(key: str, named: str, tmp_path: Path) -> None:
    save_file({key: torch.ones(2, 4)}, tmp_path / "a.safetensors", {"ss_base_model_version": "sd_1.5"})
    with pytest.raises(AdapterError, match=named):
        load_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize("key", ["unet.down_blocks.9.conv.lora_A.weight", "lora_unet_who.alpha", "strange", "unet."])
def test_names_unknown_keys(key: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    known = load_file(save_adapter(every_kind()["lora"], tmp_path / "a.safetensors"))
    save_file(known | {key: torch.ones(2, 2)}, tmp_path / "b.safetensors")
    with pytest.raises(AdapterError, match="1 keys name no known layer"):
        load_adapter(tmp_path / "b.safetensors")
    assert_same(load_adapter(tmp_path / "b.safetensors", strict=False), Adapter(every_kind()["lora"].layers))
    assert key in caplog.text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora_adapter_metadata", '"x"'),
        ("lora_adapter_metadata", '["unet.r"]'),
        ("lora_vision.alpha", f'{{"{LINEAR}": 1{"0" * 400}}}'),
        ("lora_vision.alpha", f'{{"{LINEAR}": 0}}'),
    ],
)
def test_header_fields_that_make_no_sense_are_refused(field: str, value: str, tmp_path: Path) -> None:
    pair = {f"{LINEAR}.lora_A.weight": torch.ones(4, 16), f"{LINEAR}.lora_B.weight": torch.ones(16, 4)}
    save_file(pair, tmp_path / "a.safetensors", {field: value})
    with pytest.raises(AdapterError, match=field):
        load_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize("shape", [(7, 1), (1, 7)])
def test_magnitudes_of_another_layer_are_refused(shape: tuple[int, int], tmp_path: Path) -> None:
    pair = {f"{LINEAR}.lora_A.weight": torch.ones(4, 16), f"{LINEAR}.lora_B.weight": torch.ones(16, 4)}
    save_file(pair | {f"{LINEAR}.dora_scale": torch.ones(shape)}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="a magnitude of 7 numbers for 16"):
        load_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize("missing", ["lora_up.weight", "lora_down.weight"])
def test_refuses_half_a_layer(missing: str, tmp_path: Path) -> None:
    tensors = load_file(save_adapter(every_kind()["lora"], tmp_path / "a.safetensors"))
    save_file({k: v for k, v in tensors.items() if not k.endswith(missing)}, tmp_path / "b.safetensors")
    with pytest.raises(AdapterError, match=r"layer .*expected a complete pair"):
        load_adapter(tmp_path / "b.safetensors")


def test_hashes_are_kohyas(tmp_path: Path) -> None:
    make = Maker()
    big = {f"unet.down_blocks.{b}.resnets.{r}.conv1": make.locon(320, 320, 16) for b in range(3) for r in range(2)}
    adapter = Adapter(big, {}, {"ss_output_name": "big", "ss_tag_frequency": '{"x": {"häuser": 1}}'})
    path = save_adapter(adapter, tmp_path / "a.safetensors")
    stored = formats.container.parse(*_header_of(path))
    tensors = load_file(path)
    whole = save(tensors, {key: value for key, value in stored.metadata.items() if key.startswith("ss_")})
    data = whole[8 + int.from_bytes(whole[:8], "little") :]
    assert data == path.read_bytes()[stored.start :], "laid out as safetensors itself does"
    assert stored.metadata["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    assert stored.metadata["sshs_legacy_hash"] == hashlib.sha256(whole[0x100000:0x110000]).hexdigest()[:8]
    assert stored.metadata["modelspec.sai_model_spec"] == "1.0.1"


def _header_of(path: Path) -> tuple[bytes, int]:
    whole = path.read_bytes()
    return whole[8 : 8 + int.from_bytes(whole[:8], "little")], len(whole)


def test_cloneofsimo_numbers_follow_the_old_order(tmp_path: Path) -> None:
    order = formats.cloneofsimo._unet_order(144)
    assert order is not None
    inner = [path.split("transformer_blocks.0.")[1] for path in order[:9]]
    assert inner == [
        *(f"attn1.{p}" for p in ("to_q", "to_k", "to_v", "to_out.0")),
        "ff.net.0.proj",
        *(f"attn2.{p}" for p in ("to_q", "to_k", "to_v", "to_out.0")),
    ]
    assert order[-1].startswith("mid_block.")
    make = Maker()
    tensors = {}
    for number, path in enumerate(order):
        inp = 12 if path.endswith(("attn2.to_k", "attn2.to_v")) else 16
        tensors[f"unet:{number}:down"] = make.tensor(2, inp)
        tensors[f"unet:{number}:up"] = make.tensor(128 if "ff" in path else 16, 2)
    tensors |= {"<s1>": make.tensor(16), "inky": make.tensor(16)}
    classes = '["CrossAttention", "Attention", "GEGLU"]'
    save_file(tensors, tmp_path / "a.safetensors", {"unet": classes, "<s1>": "<embed>", "inky": "<embed>"})
    adapter = load_adapter(tmp_path / "a.safetensors")
    assert set(adapter.layers) == {f"unet.{path}" for path in order}
    assert adapter.layers[f"unet.{order[6]}"].scale == 1
    assert set(adapter.extras) == {"embedding.<s1>.text_encoder", "embedding.inky.text_encoder"}
    pairs = [tensors[f"unet:{number}:{side}"] for number in range(144) for side in ("up", "down")]
    torch.save(pairs, tmp_path / "a.pt")
    assert_same(load_adapter(tmp_path / "a.pt", allow_pickle=True), Adapter(adapter.layers))
    del tensors["inky"]  # without the header nothing tells what it is
    shifted = {**tensors, **{f"unet:6:{side}": tensors[f"unet:4:{side}"].clone() for side in ("up", "down")}}
    save_file(shifted, tmp_path / "b.safetensors")
    with pytest.raises(AdapterError, match="the pair at the place of"):
        load_adapter(tmp_path / "b.safetensors")


def test_embeddings_bundled_in_every_spelling(tmp_path: Path) -> None:
    make = Maker()
    keys = {"a.string_to_param.*": "a.text_encoder", "b.emb_params": "b.text_encoder", "c.d.clip_l": "c.d.text_encoder"}
    tensors = {f"bundle_emb.{key}": make.tensor(2, 16) for key in (*keys, "c.d.clip_g")}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors")
    assert set(adapter.extras) == {f"embedding.{word}" for word in (*keys.values(), "c.d.text_encoder_2")}
    assert torch.equal(adapter.extras["embedding.b.text_encoder"], tensors["bundle_emb.b.emb_params"])
    with pytest.raises(AdapterError, match=r"changes no layer, it holds embedding\.a\.text_encoder.*words\.teach"):
        compare(adapter, {"text_encoder.text_projection": nn.Linear(2, 2)}, strict=False)
    tools: list[Callable[[Adapter], Any]] = [account, partial(resize, size=Size(rank=1))]
    for tool in tools:
        with pytest.raises(AdapterError, match="changes no layer"):
            tool(adapter)
    save_file({**tensors, "bundle_emb.a.emb_params": make.tensor(2, 16)}, tmp_path / "b.safetensors")
    with pytest.raises(AdapterError, match="second embedding of 'a'"):
        load_adapter(tmp_path / "b.safetensors")


def test_a_pickle_needs_permission_and_runs_no_code(tmp_path: Path) -> None:
    tensors = load_file(save_adapter(every_kind()["lora"], tmp_path / "a.safetensors"))
    torch.save(tensors, tmp_path / "a.pt")
    with pytest.raises(AdapterError, match=r"convert --allow-pickle.*allow_pickle=True"):
        load_adapter(tmp_path / "a.pt")
    assert_same(load_adapter(tmp_path / "a.pt", allow_pickle=True), Adapter(every_kind()["lora"].layers))
    torch.save({key: t.item() if key.endswith("alpha") else t for key, t in tensors.items()}, tmp_path / "a.pt")
    assert_same(load_adapter(tmp_path / "a.pt", allow_pickle=True), Adapter(every_kind()["lora"].layers))
    torch.save({key: tensor.to("meta") for key, tensor in tensors.items()}, tmp_path / "meta.pt")
    with pytest.raises(AdapterError, match="on meta; expected plain numbers"):
        load_adapter(tmp_path / "meta.pt", allow_pickle=True)
    torch.save({"x": os.system}, tmp_path / "evil.pt")
    with pytest.raises(AdapterError, match="without running code"):
        load_adapter(tmp_path / "evil.pt", allow_pickle=True)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_pickle_is_refused_or_read(zipped: bool, tmp_path: Path) -> None:
    tensors = load_file(save_adapter(every_kind()["lora"], tmp_path / "a.safetensors"))
    torch.save(tensors, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    whole, draw = (tmp_path / "a.pt").read_bytes(), random.Random(0)
    for _ in range(100):
        broken = bytearray(whole)
        broken[draw.randrange(min(len(whole), 2500))] = draw.randrange(256)
        (tmp_path / "b.pt").write_bytes(broken)
        with contextlib.suppress(AdapterError):
            assert load_adapter(tmp_path / "b.pt", allow_pickle=True).layers
