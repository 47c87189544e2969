"""CPU seconds to load and attach an adapter, against diffusers' load_lora_weights, in one process, taking turns.

    python benchmarks/load.py [--count 8] [--format kohya | diffusers] [--dtype float32 | float16]

Stable Diffusion 1.5's configuration with unset weights; rank 16 on the 264 layers that kohya's trainer takes by default
(attention, feed-forward and projections of the UNet, attention and MLP of the text encoder): 38 MB, 792 tensors. The
floor is: map the file, parse its keys, copy the tensors to where they stay. Our layers copy in their next forward; that
is timed apart (all layers made to do it at once), and added in the last ratio.
"""

from __future__ import annotations

import argparse
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

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

import lora_vision as lv
from lora_vision import names
from lora_vision.adapter import Adapter
from lora_vision.factors import LowRank
from lora_vision.layers import LoraLayer


def parts(dtype: torch.dtype) -> dict[str, nn.Module]:
    """Returns the UNet and text encoder of Stable Diffusion 1.5, their weights unset."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
        text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    return {part: model.to_empty(device="cpu").to(dtype) for part, model in (("unet", unet), ("text_encoder", text))}


def pipeline(models: dict[str, nn.Module]) -> StableDiffusionPipeline:
    """Returns a stock pipeline of these parts, with a token VAE."""
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    extras = {"tokenizer": None, "safety_checker": None, "feature_extractor": None}
    return StableDiffusionPipeline(
        vae=vae,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        **models,
        **extras,
        requires_safety_checker=False,
    )


def adapter(models: dict[str, nn.Module], seed: int) -> Adapter:
    """Returns a random adapter of rank 16 on the layers kohya's trainer takes."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, layer in names.index(models).items():
        chosen = ".attentions." in name or name.startswith("text_encoder.text_model.encoder.layers.")
        if chosen and isinstance(layer, nn.Linear | nn.Conv2d):
            out, inp = layer.weight.shape[:2]
            down, up = (torch.randn(shape, generator=generator) for shape in ((16, inp), (out, 16)))
            kernel = layer.weight.shape[2:]
            layers[name] = LowRank(down.view(16, inp, *kernel), up.view(out, 16, *kernel), 16.0)
    return Adapter(layers)


def seconds(job: Callable[[], object]) -> float:
    """Returns the CPU seconds of one call, garbage collected before."""
    gc.collect()
    start = time.process_time()
    job()
    return time.process_time() - start


def floor(path: Path, kept: list[Tensor]) -> None:
    """Maps a file, parses its keys and copies its tensors into memory that stays: the least that loading can cost."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    flat = torch.frombuffer(data, dtype=torch.uint8)
    for key, entry in header.items():
        if key != "__metadata__":
            begin, end = entry["data_offsets"]
            kept.append(flat[8 + length + begin : 8 + length + end].view(torch.float32).clone())


def main() -> None:
    """Prints one line for each adapter: diffusers, ours, the floor, and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--format", choices=["kohya", "diffusers"], default="kohya")
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    theirs, ours = (parts(getattr(torch, options.dtype)) for _ in range(2))
    made = [adapter(ours, number) for number in range(options.count)]  # before Blend, from untouched models
    pipe, blend = pipeline(theirs), lv.Blend(ours)
    kept: list[Tensor] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, found in enumerate(made):
            name = f"a{number}"
            path = lv.save_adapter(found, Path(folder) / f"{name}.safetensors", format=options.format)
            peer = seconds(lambda p=path, n=name: pipe.load_lora_weights(folder, weight_name=p.name, adapter_name=n))
            mine = seconds(lambda p=path, n=name: blend.load(p, name=n))
            wrapped = [layer for layer in names.index(ours).values() if isinstance(layer, LoraLayer)]
            later = seconds(lambda w=wrapped: [layer.stacked() for layer in w])
            least = seconds(lambda p=path: floor(p, kept))
            sys.stdout.write(
                f"adapter {number + 1}: diffusers {peer:.3f} s, lora_vision {mine:.4f} s (1/{peer / mine:.0f}), "
                f"floor {least:.4f} s (x {mine / least:.1f}); copied later in {later:.4f} s (with that x "
                f"{(mine + later) / least:.1f}); {path.stat().st_size / 1e6:.0f} MB, {len(found.layers)} layers\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
