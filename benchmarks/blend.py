"""What a blend costs: forward, change, merge, move a weight, restore; diffusers with PEFT takes turns in one process.

    python benchmarks/blend.py [--config sd15 | small] [--counts 1 2 4 8] [--repeats 3] [--latent 32]
                                [--measure change forward rows]

Prints CPU milliseconds (process time, the least of the repeats) and the ratio to the first of each line: the bare UNet
for a forward, the in-place addmm of the stacked factors for a merge, a plain copy of the touched weights for a restore.
Adapters are random, rank 16, on attention and feed-forward; weights are random. The last line is a ViT-B on 16
pictures: one adapter for all, then another adapter for each.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

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
Jobs = dict[str, Callable[[], Any]]


def filled(model: nn.Module) -> nn.Module:
    """Returns a model of the meta device with cheap random weights in memory."""
    pool = 0.02 * torch.randn(1 << 20)
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    for name, value in model.named_parameters():
        part = pool.repeat(-(-value.numel() // len(pool)))[: value.numel()]
        value.copy_(torch.ones_like(value) if value.dim() == 1 and name.endswith("weight") else part.view(value.shape))
    return model


def unet(config: str, weights: dict[str, Tensor] | None = None) -> nn.Module:
    """Returns a UNet; with weights it shares them, for memory's sake."""
    with torch.device("meta"):
        model = UNet2DConditionModel(**CONFIGS[config])
    if weights is None:
        return filled(model)
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def random_adapter(layers: dict[str, Any], seed: int) -> lv.Adapter:
    """Returns an adapter of rank 16 over these layers."""
    g = torch.Generator().manual_seed(seed)
    found = {}
    for name, layer in layers.items():
        down = 0.01 * torch.randn(RANK, *layer.weight.shape[1:], generator=g)
        found[name] = LowRank(down, 0.01 * torch.randn(layer.weight.shape[0], RANK, generator=g), float(RANK))
    return lv.Adapter(found)


def best(jobs: Jobs, repeats: int) -> dict[str, float]:
    """Returns the least CPU seconds of each job, the jobs taking turns."""
    found: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            start = time.process_time()
            job()
            found[name].append(time.process_time() - start)
    return {name: min(times) for name, times in found.items()}


class Bench:
    """Three UNets of one configuration: bare, under a Blend, under PEFT; adapters a0, a1, ... in the latter two."""

    def __init__(self, config: str, count: int, latent: int, apart: bool) -> None:
        torch.manual_seed(0)
        self.bare = unet(config)
        self.ours = unet(config, None if apart else self.bare.state_dict())  # merging writes in place
        self.theirs = unet(config, self.bare.state_dict())
        self.inputs = (
            torch.randn(1, 4, latent, latent),
            torch.tensor(500),
            torch.randn(1, 77, CONFIGS[config]["cross_attention_dim"]),
        )
        self.blend = lv.Blend({"unet": self.ours})
        layers = names.index({"unet": self.ours})
        self.layers = {name: layers[name] for name in select("attention+ff", layers)}
        self.adapters = {f"a{number}": random_adapter(self.layers, number) for number in range(count)}
        self.scales = iter([0.1 + 0.001 * step for step in range(100_000)])
        for name, adapter in self.adapters.items():
            self.blend.load(adapter, name, scale=0.0)
            state: dict[str, Tensor] = {}
            for layer, pair in adapter.layers.items():
                assert isinstance(pair, LowRank)
                state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"] = pair.down, pair.up
            self.theirs.load_lora_adapter(state, prefix="unet", adapter_name=name)

    def set(self, chosen: Iterable[str]) -> None:
        """Lets these adapters sound in both."""
        self.blend.set(dict.fromkeys(chosen, 0.5))
        self.theirs.set_adapters(list(chosen), [0.5] * len(list(chosen)))

    def forward(self, repeats: int) -> dict[str, float]:
        """Returns the seconds of one forward."""
        models = {"bare": self.bare, "blend": self.ours, "peft": self.theirs}
        self.ours(*self.inputs)
        return best({name: lambda m=model: m(*self.inputs) for name, model in models.items()}, repeats)

    def change(self, chosen: list[str], repeats: int) -> dict[str, float]:
        """Returns the seconds of new weights for all that sound."""
        jobs: Jobs = {
            "blend": lambda: self.blend.set(dict.fromkeys(chosen, next(self.scales))),
            "peft": lambda: self.theirs.set_adapters(chosen, [next(self.scales)] * len(chosen)),
        }
        return best(jobs, 4 * repeats)

    def merge(self, chosen: list[str], repeats: int) -> dict[str, dict[str, float]]:
        """Returns the seconds of merging, of moving one merged weight, and of restoring."""
        weights = [layer.weight.detach().clone() for layer in self.layers.values()]
        copies = [weight.clone() for weight in weights]
        pairs = [[self.adapters[a].layers[name] for a in chosen] for name in self.layers]
        stacked = [(torch.cat([p.up for p in ps], 1) * 0.5, torch.cat([p.down for p in ps])) for ps in pairs]  # type: ignore[attr-defined]

        def floor() -> None:
            for weight, (up, down) in zip(weights, stacked, strict=True):
                weight.addmm_(up, down)

        def copied() -> None:
            for weight, copy in zip(weights, copies, strict=True):
                weight.copy_(copy)

        def refused() -> None:
            self.theirs.unfuse_lora()
            self.theirs.set_adapters(chosen, [next(self.scales)] + [0.5] * (len(chosen) - 1))
            self.theirs.fuse_lora(adapter_names=chosen)

        rounds: dict[str, Jobs] = {
            "merge": {
                "floor": floor,
                "blend": self.blend.merge,
                "peft": lambda: self.theirs.fuse_lora(adapter_names=chosen),
            },
            "move": {
                "blend": lambda: self.blend.set(dict.fromkeys(chosen, 0.5) | {chosen[0]: next(self.scales)}),
                "peft": refused,
            },
            "restore": {"floor": copied, "blend": self.blend.restore, "peft": self.theirs.unfuse_lora},
        }
        found: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in jobs} for kind, jobs in rounds.items()}
        for _ in range(repeats):
            for kind, jobs in rounds.items():
                for name, seconds in best(jobs, 1).items():
                    found[kind][name].append(seconds)
        for kind in ("merge", "restore"):  # the first merge also pays for the memory of the merged weights
            sys.stdout.write(f"{len(chosen):8} {'first ' + kind:>13}  {1e3 * found[kind]['blend'][0]:.1f} ms\n")
        return {kind: {name: min(times) for name, times in each.items()} for kind, each in found.items()}


def blends(config: str, counts: list[int], repeats: int, latent: int, measure: list[str]) -> None:
    """Prints what each number of adapters costs on a UNet."""
    bench = Bench(config, max(counts), latent, apart="merge" in measure)
    for count in counts:
        chosen = list(bench.adapters)[:count]
        bench.set(chosen)
        if "change" in measure:
            show("change", count, bench.change(chosen, repeats))
            bench.set(chosen)
        if "merge" in measure:
            for what, times in bench.merge(chosen, repeats).items():
                show(what, count, times)
    for count in counts if "forward" in measure else ():
        bench.set(list(bench.adapters)[:count])
        show("forward", count, bench.forward(repeats))


def vit_rows(repeats: int) -> dict[str, float]:
    """Returns the seconds of ViT-B on 16 pictures: bare, one adapter for all, another adapter for each picture."""
    from transformers import ViTConfig, ViTModel

    with torch.device("meta"):
        model = ViTModel(ViTConfig(), add_pooling_layer=False)
    model = filled(model)
    blend = lv.Blend({"vit": model})
    layers = names.index({"vit": model})
    chosen = {name: layers[name] for name in select("attention+ff", layers)}
    for number in range(16):
        blend.load(random_adapter(chosen, number), f"a{number}", scale=0.0)
    pictures = torch.randn(16, 3, 224, 224)
    each = {f"a{number}": [float(row == number) for row in range(16)] for number in range(16)}
    settings: dict[str, dict[str, Any]] = {"single": {"a0": 1.0}, "rows": each, "bare": {}}
    found: dict[str, list[float]] = {name: [] for name in settings}
    for _ in range(repeats):
        for name, scales in settings.items():
            blend.set(scales)
            if name == "rows":
                model(pictures[:16, :, :, :])  # the rows are arranged when they first meet a batch
            found[name].append(best({name: lambda: model(pictures)}, 1)[name])
    return {name: min(times) for name, times in found.items()}


def show(what: str, count: int, times: dict[str, float]) -> None:
    """Prints one line of milliseconds and ratios."""
    first = next(iter(times.values()))
    cells = "   ".join(f"{name} {1e3 * t:9.2f} ({t / first:5.2f})" for name, t in times.items())
    sys.stdout.write(f"{count:8} {what:>8}  {cells}\n")
    sys.stdout.flush()


def main() -> None:
    """Prints all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=CONFIGS, default="sd15")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--latent", type=int, default=32, help="side of the latents; 64 is a picture of 512 pixels")
    kinds = ["change", "merge", "forward", "rows"]
    parser.add_argument("--measure", choices=kinds, nargs="+", default=kinds, help="merge: and move, and restore")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        if set(options.measure) - {"rows"}:
            blends(options.config, options.counts, options.repeats, options.latent, options.measure)
        if "rows" in options.measure:
            show("vit rows", 16, vit_rows(options.repeats))


if __name__ == "__main__":
    main()
