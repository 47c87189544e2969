"""CPU seconds to load and attach an adapter, against diffusers' load_lora_weights, in one process, taking turns.

Stable Diffusion 1.5's configuration with unset weights, rank 16 on the attention of the UNet and the text encoder. The
floor is what cannot be avoided: map the file, parse its keys, copy the tensors. Usage: `python benchmarks/load.py [N]`
for N adapters each (8).
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

import lora_vision as lv
from lora_vision import names
from lora_vision.adapter import Adapter
from lora_vision.factors import LowRank


def parts() -> dict[str, nn.Module]:
    """Returns the UNet and text encoder of Stable Diffusion 1.5, their weights unset."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
        text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    return {part: model.to_empty(device="cpu").half() for part, model in (("unet", unet), ("text_encoder", text))}


def pipeline(models: dict[str, nn.Module]) -> StableDiffusionPipeline:
    """Returns a stock pipeline of these parts, with a token VAE."""
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    extras = {"tokenizer": None, "safety_checker": None, "feature_extractor": None}
    return StableDiffusionPipeline(
        vae=vae, scheduler=DDIMScheduler(), **models, **extras, requires_safety_checker=False
    )


def adapter(models: dict[str, nn.Module], seed: int) -> Adapter:
    """Returns a random adapter of rank 16 on every attention projection."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, layer in names.index(models).items():
        if isinstance(layer, nn.Linear) and name.endswith(("to_q", "to_k", "to_v", "to_out.0", "_proj")):
            out, inp = layer.weight.shape
            down, up = (torch.randn(shape, generator=generator) for shape in ((16, inp), (out, 16)))
            layers[name] = LowRank(down, up, 16.0)
    return Adapter(layers)


def seconds(job: Callable[[], object]) -> float:
    """Returns the CPU seconds of one call, garbage collected before."""
    gc.collect()
    start = time.process_time()
    job()
    return time.process_time() - start


def floor(path: Path) -> None:
    """Maps a file, parses its keys and copies its tensors: the least that loading can cost."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    flat = torch.frombuffer(data, dtype=torch.uint8)
    for key, entry in header.items():
        if key != "__metadata__":
            begin, end = entry["data_offsets"]
            flat[8 + length + begin : 8 + length + end].view(torch.float32).clone()


def main(count: int) -> None:
    """Prints one line for each adapter: diffusers, ours, the floor, and their ratios."""
    theirs, ours = parts(), parts()
    made = [adapter(ours, number) for number in range(count)]  # before Blend, from untouched models
    pipe, blend = pipeline(theirs), lv.Blend(ours)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            found, name = made[number], f"a{number}"
            path = lv.save_adapter(found, Path(folder) / f"{name}.safetensors", format="diffusers")
            peer = seconds(lambda p=path, n=name: pipe.load_lora_weights(folder, weight_name=p.name, adapter_name=n))
            mine = seconds(lambda p=path, n=name: blend.load(p, name=n))
            least = seconds(lambda p=path: floor(p))
            print(
                f"adapter {number + 1}: diffusers {peer:.3f} s, lora_vision {mine:.4f} s (1/{peer / mine:.0f}), "
                f"floor {least:.4f} s (x {mine / least:.1f}); {path.stat().st_size / 1e6:.0f} MB, {len(found.layers)}"
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 8)
