"""What SVD work on an adapter costs: on its thin factors (ours) and on full matrices (the peers' way), taking turns.

    python benchmarks/tools.py [--rank 64] [--to 32] [--whole]

The adapter is random, of the given rank, on every layer of Stable Diffusion 1.5 that kohya adapts (attention,
feed-forward and projections of the UNet, the text encoder). The peers' way is that of kohya's ``resize_lora.py`` and
PEFT's ``svd`` merge: multiply each pair out, then ``torch.linalg.svd`` of the whole matrix. Unless --whole is given it
is measured on one layer of each shape and multiplied by how many there are. CPU seconds (process time);
OMP_NUM_THREADS sets the threads; ours is also measured on the whole file at once.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from lora_vision import names
from lora_vision.adapter import Adapter
from lora_vision.factors import LowRank
from lora_vision.spectrum import of_matrix, spectrum
from lora_vision.targets import select
from lora_vision.tools.account import account
from lora_vision.tools.compare import compare
from lora_vision.tools.resize import Size, resize


def sd15_layers() -> dict[str, tuple[int, ...]]:
    """Layer name to weight shape, of all that kohya adapts in Stable Diffusion 1.5."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
        text = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        )
    layers = names.index({"unet": unet, "text_encoder": text})
    chosen = ("attention", "ff", "unet.*.proj_in", "unet.*.proj_out")
    return {name: tuple(layers[name].weight.shape) for name in select(chosen, layers)}


def random_adapter(shapes: dict[str, tuple[int, ...]], rank: int, seed: int) -> Adapter:
    """An adapter whose singular values fall off as trained ones do."""
    generator = torch.Generator().manual_seed(seed)
    decay = 0.95 ** torch.arange(rank)
    layers = {}
    for name, shape in shapes.items():
        down = torch.randn(rank, *shape[1:], generator=generator) / rank
        up = torch.randn(shape[0], rank, generator=generator) * decay
        layers[name] = LowRank(down, up.reshape(*up.shape, *(1,) * (len(shape) - 2)), rank / 2)
    return Adapter(layers)


def seconds(job: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of a job, and what it gave."""
    start = time.process_time()
    found = job()
    return time.process_time() - start, found


def by_shape(adapter: Adapter, whole: bool) -> dict[str, float]:
    """CPU seconds of all layers, ours and the peers', and the largest relative difference of their spectra."""
    groups: dict[tuple[int, ...], list[LowRank]] = {}
    for pair in adapter.layers.values():
        assert isinstance(pair, LowRank)
        groups.setdefault((pair.up.shape[0], *pair.down.shape[1:]), []).append(pair)
    found = {"factors": 0.0, "full": 0.0, "gram": 0.0, "difference": 0.0}
    for pairs in groups.values():
        measured = pairs if whole else pairs[:1]
        share = len(pairs) / len(measured)
        for pair in measured:
            ours, thin = seconds(lambda p=pair: spectrum(p))
            theirs, full = seconds(lambda p=pair: torch.linalg.svd(p.delta().flatten(1), full_matrices=False))
            gram, _ = seconds(lambda p=pair: of_matrix(p.delta()))
            for key, value in (("factors", ours), ("full", theirs), ("gram", gram)):
                found[key] += share * value
            gap = (thin.values - full[1][: len(thin.values)]).abs().max() / full[1][0]
            found["difference"] = max(found["difference"], float(gap))
    return found


def main() -> None:
    """Measures and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--to", type=int, default=32, help="the rank to resize to")
    parser.add_argument("--whole", action="store_true", help="the peers' way on every layer: many minutes")
    options = parser.parse_args()
    shapes = sd15_layers()
    one, other = (random_adapter(shapes, options.rank, seed) for seed in (0, 1))
    report: dict[str, Any] = {"layers": len(shapes), "rank": options.rank, "megabytes": one.nbytes / 1e6}
    jobs: dict[str, Callable[[], Any]] = {
        "resize": lambda: resize(one, Size(rank=options.to)),
        "compare": lambda: compare(one, other),
        "account": lambda: account(one),
    }
    report["whole file, ours"] = {name: seconds(job)[0] for name, job in jobs.items()}
    found = by_shape(one, options.whole)
    difference = found.pop("difference")
    report["every singular value of every layer"] = found
    report["full matrices / factors"] = found["full"] / found["factors"]
    report["largest relative difference of singular values"] = difference
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
