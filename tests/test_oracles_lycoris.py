"""LyCORIS itself: its training forward is the truth, we load what it saves, and it loads what we write.

Known faults of LyCORIS 4.1.3 that these tests step around: its merge of LoHa and LoKr applies alpha/rank twice, so that
the forward is compared; DoRA on the input axis and (IA)3 cannot be reloaded by LyCORIS, so those are read only.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lycoris.kohya import LycorisNetworkKohya, create_network, create_network_from_weights
from models import tiny_text_encoder, tiny_tokenizer, tiny_unet
from safetensors.torch import load_file
from torch import nn

from lora_vision.files import load_adapter, save_adapter
from lora_vision.inject import attach, detach

ALGORITHMS = {
    "locon": {"algo": "lora", "conv_dim": 2, "conv_alpha": 1.0},
    "tucker": {"algo": "lora", "conv_dim": 2, "conv_alpha": 1.0, "use_tucker": True},
    "rslora": {"algo": "lora", "rs_lora": True},
    "loha": {"algo": "loha", "conv_dim": 2, "conv_alpha": 1.0},
    "loha-tucker": {"algo": "loha", "conv_dim": 2, "conv_alpha": 1.0, "use_tucker": True},
    "lokr": {"algo": "lokr", "conv_dim": 2, "conv_alpha": 1.0, "factor": -1},
    "lokr-tucker": {"algo": "lokr", "conv_dim": 2, "conv_alpha": 1.0, "use_tucker": True, "decompose_both": True},
    "lokr-full": {"algo": "lokr", "full_matrix": True},
    "dora": {"algo": "lora", "conv_dim": 2, "conv_alpha": 1.0, "dora_wd": True, "wd_on_output": True},
    "dora-input": {"algo": "lora", "conv_dim": 2, "conv_alpha": 1.0, "dora_wd": True, "wd_on_output": False},
    "full": {"algo": "full"},
    "norm": {"algo": "lora", "train_norm": True},
}
PRESET = """
enable_conv = true
unet_target_module = ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"]
unet_target_name = []
text_encoder_target_module = []
text_encoder_target_name = []
"""
RELOADED = {"locon", "tucker", "rslora", "loha", "lokr", "dora"}


def base() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"unet": tiny_unet().eval(), "text_encoder": tiny_text_encoder(tiny_tokenizer()).eval()}


def forward(parts: dict[str, nn.Module]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(1, 4, 16, 16, generator=generator)
    with torch.no_grad():
        states = parts["text_encoder"](torch.arange(8)[None]).last_hidden_state
        return parts["unet"](sample, 7, states).sample


def stir(network: LycorisNetworkKohya) -> None:
    """Gives every parameter a value as training would, magnitudes staying near the weight's norm."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.02 if "dora_scale" in name else 0.2))


def trained(parts: dict[str, nn.Module], options: dict[str, object], path: Path) -> torch.Tensor:
    """Returns the base's output with a stirred LyCORIS network, saved under the path."""
    preset = path.with_name("preset.toml")
    preset.write_text(PRESET)
    network = create_network(1.0, 4, 2.0, None, parts["text_encoder"], parts["unet"], preset=str(preset), **options)
    network.apply_to(parts["text_encoder"], parts["unet"], False, True)
    stir(network)
    output = forward(parts)
    network.restore()
    network.save_weights(str(path), torch.float32, {"ss_network_module": "lycoris.kohya"})
    return output


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_lycoris_and_we_compute_the_same(kind: str, tmp_path: Path) -> None:
    parts, path = base(), tmp_path / "theirs.safetensors"
    plain = forward(parts)
    theirs = trained(parts, ALGORITHMS[kind], path)
    parts = base()
    adapter = load_adapter(path)
    attach(parts, adapter)
    ours = forward(parts)
    detach(parts)
    scale = theirs.abs().max()
    assert (theirs - plain).abs().max() > 1e-3 * scale, "the adapter does something"
    assert (ours - theirs).abs().max() <= 2e-5 * scale

    again = save_adapter(adapter, tmp_path / "ours.safetensors")
    before, after = load_file(path), load_file(again)
    assert before.keys() == after.keys(), "every key is written back under its own name"
    for key, tensor in before.items():
        assert torch.equal(after[key].float(), tensor.float()), key
        assert after[key].shape == tensor.shape, key

    if kind in RELOADED:
        network, weights = create_network_from_weights(1.0, str(again), None, parts["text_encoder"], parts["unet"])
        network.apply_to(parts["text_encoder"], parts["unet"], False, True)
        assert (forward(parts) - theirs).abs().max() <= 2e-5 * scale
        network.restore()
