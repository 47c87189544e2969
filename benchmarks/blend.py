"""What a blend costs: forward, change, merge, restore; interleaved with diffusers and PEFT in one process.

    python benchmarks/blend.py [--config sd15 | small] [--counts 1 2 4 8] [--repeats 5] [--peft]

Prints CPU seconds (process time), the least of the repeats, on one thread unless OMP_NUM_THREADS says otherwise, and
the ratio to the bare UNet or to the floor: the in-place addmm of the stacked factors for a merge, a plain copy of the
touched weights for a restore. Adapters are random, rank 16, on attention and feed-forward.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

import lora_vision as lv
from lora_vision import names
from lora_vision.factors import LowRank
from lora_vision.targets import select

CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "small": {
        "sample_size": 32,
        "cross_attention_dim": 256,
        "attention_head_dim": 8,
        "block_out_channels": (128, 256),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
}
RANK = 16


def random_adapter(layers: dict[str, Any], seed: int) -> lv.Adapter:
    """An adapter of rank 16 over these layers."""
    g = torch.Generator().manual_seed(seed)
    found = {}
    for name, layer in layers.items():
        down = 0.01 * torch.randn(RANK, *layer.weight.shape[1:], generator=g)
        found[name] = LowRank(down, 0.01 * torch.randn(layer.weight.shape[0], RANK, generator=g), float(RANK))
    return lv.Adapter(found)


def best(jobs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The least CPU seconds of each job, the jobs taking turns."""
    found: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            start = time.process_time()
            job()
            found[name].append(time.process_time() - start)
    return {name: min(times) for name, times in found.items()}


class Bench:
    """Two equal UNets: one under a Blend, one bare (and under PEFT if asked)."""

    def __init__(self, config: str, count: int, peft: bool) -> None:
        torch.manual_seed(0)
        shape = CONFIGS[config]
        self.ours, self.bare = UNet2DConditionModel(**shape).eval(), UNet2DConditionModel(**shape).eval()
        self.theirs = UNet2DConditionModel(**shape).eval() if peft else None
        size, width = shape["sample_size"], shape["cross_attention_dim"]
        self.inputs = (torch.randn(2, 4, size, size), torch.tensor(500), torch.randn(2, 77, width))
        self.blend = lv.Blend({"unet": self.ours})
        layers = names.index({"unet": self.ours})
        self.layers = {name: layers[name] for name in select("attention+ff", layers)}
        self.adapters = {f"a{number}": random_adapter(self.layers, number) for number in range(count)}
        for name, adapter in self.adapters.items():
            self.blend.load(adapter, name, scale=0.5)
        if self.theirs is not None:
            self._load_peft(self.theirs)

    def _load_peft(self, unet: Any) -> None:
        for name, adapter in self.adapters.items():
            state: dict[str, Tensor] = {}
            for layer, pair in adapter.layers.items():
                assert isinstance(pair, LowRank)
                state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"] = pair.down, pair.up
            unet.load_lora_adapter(state, prefix="unet", adapter_name=name)
        unet.set_adapters(list(self.adapters), [0.5] * len(self.adapters))

    def forward(self, repeats: int) -> dict[str, float]:
        models = {"bare": self.bare, "blend": self.ours} | ({"peft": self.theirs} if self.theirs is not None else {})
        for model in models.values():
            model(*self.inputs)
        return best({name: lambda m=model: m(*self.inputs) for name, model in models.items()}, repeats)

    def change(self, repeats: int) -> dict[str, float]:
        scales = iter([0.1 + 0.01 * step for step in range(10_000)])
        jobs: dict[str, Callable[[], Any]] = {
            "blend": lambda: self.blend.set(dict.fromkeys(self.adapters, next(scales)))
        }
        if self.theirs is not None:
            theirs, listed = self.theirs, list(self.adapters)
            jobs["peft"] = lambda: theirs.set_adapters(listed, [next(scales)] * len(listed))
        return best(jobs, 4 * repeats)

    def merge(self, repeats: int) -> dict[str, dict[str, float]]:
        weights = [dict(self.bare.named_modules())[name.removeprefix("unet.")].weight.data for name in self.layers]
        pairs = [[adapter.layers[name] for adapter in self.adapters.values()] for name in self.layers]
        stacked = [(torch.cat([p.up for p in ps], 1) * 0.5, torch.cat([p.down for p in ps])) for ps in pairs]  # type: ignore[attr-defined]
        copies = [weight.clone() for weight in weights]

        def floor() -> None:
            for weight, (up, down) in zip(weights, stacked, strict=True):
                weight.view(weight.shape[0], -1).addmm_(up, down.flatten(1))

        def copied() -> None:
            for weight, copy in zip(weights, copies, strict=True):
                weight.copy_(copy)

        merging: dict[str, Callable[[], Any]] = {"floor": floor, "blend": self.blend.merge}
        restoring: dict[str, Callable[[], Any]] = {"floor": copied, "blend": self.blend.restore}
        if self.theirs is not None:
            merging["peft"], restoring["peft"] = self.theirs.fuse_lora, self.theirs.unfuse_lora
        found: dict[str, dict[str, list[float]]] = {"merge": {}, "restore": {}}
        for _ in range(repeats):
            for kind, jobs in (("merge", merging), ("restore", restoring)):
                for name, seconds in best(jobs, 1).items():
                    found[kind].setdefault(name, []).append(seconds)
        return {kind: {name: min(times) for name, times in each.items()} for kind, each in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=CONFIGS, default="sd15")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peft", action="store_true", help="measure diffusers with PEFT beside it")
    options = parser.parse_args()
    print(f"{'adapters':>8} {'what':>8}  CPU milliseconds and ratio to the first")
    for count in options.counts:
        with torch.no_grad():
            bench = Bench(options.config, count, options.peft)
            rows = {"forward": bench.forward(options.repeats), "change": bench.change(options.repeats)}
            rows |= bench.merge(options.repeats)
        for what, times in rows.items():
            first = next(iter(times.values()))
            cells = "   ".join(f"{name} {1e3 * t:9.2f} ({t / first:5.2f})" for name, t in times.items())
            print(f"{count:8} {what:>8}  {cells}", flush=True)


if __name__ == "__main__":
    main()
