"""What a training step costs on Stable Diffusion 1.5: our modules, kohya's, PEFT's and LyCORIS', taking turns.

    python benchmarks/train.py [--batch 1 4] [--steps 3] [--contenders ours kohya peft lycoris] [--output times.json]
    python benchmarks/train.py --contenders ours ours:dora ours:loha ours:lokr ours:pissa ours:checkpointing --batch 1

Each contender is a process of its own, so that its peak memory (VmHWM) is its own; all map the same random weights of
the SD 1.5 UNet (860 million, fp32) from one file, and take one step each in turn, in an order that turns too. A step is
forward, backward, clipping and fused AdamW at 32 x 32 latents, 77 tokens, rank 16 on every attention projection.
Seconds are the process's own CPU time on one thread, the least and the median of the timed steps. "full" tunes every
weight, "forward" is the bare UNet without gradients, ":half" keeps the frozen base in bf16 (for its memory: a CPU may
compute slowly in it), ":int8" in 8 bits, "ours:half+checkpointing" combines. kohya's modules come with its repository
only; what they compute is written anew here. With --steps 0, for memory, what is freed goes back to the system at once,
so that the peak is what is held and not what the allocator keeps. With --together, for seconds, all step in one
process; several differ by some per cent in what the base alone costs, depending on the memory they were given.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

RANK = 16
SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
TINY = {"sample_size": 16, "cross_attention_dim": 32, "attention_head_dim": 4, "block_out_channels": (32, 32, 64, 64)}
PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]
WITH = {"dropout": {"rank_dropout": 0.1}, "checkpointing": {}, "half": {}, "int8": {}}


def write_weights(path: Path, config: dict[str, Any]) -> None:
    """Random weights of the UNet, small enough that nothing overflows."""
    with torch.device("meta"):
        shapes = UNet2DConditionModel(**config).state_dict()
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, each in shapes.items():
        spread = 1 / max(1, each[0].numel()) ** 0.5
        weights[name] = torch.empty(each.shape).uniform_(-spread, spread, generator=generator)
    save_file(weights, path)


def halved(path: Path) -> Path:
    """Where the same weights lie in bf16."""
    half = path.with_suffix(".half.safetensors")
    if not half.is_file():
        save_file({name: weight.bfloat16() for name, weight in load_file(path).items()}, half)
    return half


def loaded(path: Path, config: dict[str, Any]) -> UNet2DConditionModel:
    """The UNet over the mapped file: frozen weights are shared between processes."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    unet.load_state_dict(load_file(path), assign=True)
    return unet.eval().requires_grad_(False)


class Kohya(nn.Module):
    """A pair beside a linear layer whose forward it takes over, as sd-scripts' networks/lora.py does (LoRAModule)."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.lora_down = nn.Linear(layer.in_features, RANK, bias=False)
        self.lora_up = nn.Linear(RANK, layer.out_features, bias=False)
        nn.init.zeros_(self.lora_up.weight)
        self.original, self.multiplier, self.scale = layer.forward, 1.0, 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.original(x) + self.lora_up(self.lora_down(x)) * self.multiplier * self.scale


def trainable(kind: str, unet: UNet2DConditionModel) -> list[nn.Parameter]:
    """What this contender trains, put into the UNet."""
    family, _, variant = kind.partition(":")
    if family == "full":
        unet.requires_grad_(True)
    elif family == "ours":
        import lora_vision as lv

        options: dict[str, Any] = {}
        for word in filter(None, variant.split("+")):
            options |= WITH.get(word, {"variant": word})
        if "checkpointing" in variant:
            unet.enable_gradient_checkpointing()
            unet.train()
        return lv.inject({"unet": unet}, lv.LoraConfig(rank=RANK, targets="attention", **options))
    elif family == "peft":
        import peft

        plain = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=PROJECTIONS, use_dora=variant == "dora")
        kinds = {"loha": peft.LoHaConfig, "lokr": peft.LoKrConfig}
        other = kinds[variant](r=RANK, alpha=RANK, target_modules=PROJECTIONS) if variant in kinds else plain
        peft.inject_adapter_in_model(other, unet)
    elif family == "kohya":
        layers = [each for name, each in unet.named_modules() if name.endswith(tuple(PROJECTIONS))]
        pairs = nn.ModuleList(Kohya(layer) for layer in layers)
        for layer, pair in zip(layers, pairs, strict=True):
            layer.forward = pair.forward
        return list(pairs.parameters())
    elif family == "lycoris":
        from lycoris import LycorisNetwork

        LycorisNetwork.apply_preset({"target_module": ["Attention"], "enable_conv": False})
        name, dora = ("lora", True) if variant == "dora" else (variant or "lora", False)
        size = {"lora_dim": RANK, "conv_lora_dim": RANK, "alpha": RANK, "conv_alpha": RANK}
        network = LycorisNetwork(unet, 1.0, **size, network_module=name, weight_decompose=dora)
        network.apply_to()
        return [parameter for parameter in network.parameters() if parameter.requires_grad]
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def settled(unet: UNet2DConditionModel) -> None:
    """Keep the frozen base in 8 bits, in memory of its own; the peak is counted from now on."""
    from lora_vision.quantised import quantise

    quantise(unet)
    for tensor in (*unet.parameters(), *unet.buffers()):
        tensor.data = tensor.data.clone()
    Path("/proc/self/clear_refs").write_text("5")


def prepared(kind: str, path: Path, config: dict[str, Any], batch: int) -> Callable[[], None]:
    """A function that takes one step of this contender."""
    half = ":half" in kind
    unet = loaded(halved(path) if half else path, config)
    if "int8" in kind:
        settled(unet)
    generator = torch.Generator().manual_seed(1)
    side, width = config["sample_size"] // 2, config["cross_attention_dim"]
    x, noise = torch.randn(2, batch, 4, side, side, generator=generator)
    states, when = torch.randn(batch, 77, width, generator=generator), torch.linspace(10, 900, batch).long()
    if kind == "forward":
        return torch.no_grad()(lambda: unet(x, when, states, return_dict=False))
    parameters = trainable(kind, unet)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            answer = unet(x, when, states, return_dict=False)[0]
        (answer.float() - noise).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peak() -> float:
    """The most memory this process has held, in GiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def worker(kind: str, path: Path, config: dict[str, Any], batch: int) -> None:
    """Take a step for each line read, and answer with its seconds and the peak memory so far."""
    torch.set_num_threads(1)
    step = prepared(kind, path, config, batch)
    print("ready", flush=True)
    for _ in sys.stdin:
        wall, start = time.perf_counter(), time.process_time()
        step()
        print(json.dumps([time.process_time() - start, time.perf_counter() - wall, peak()]), flush=True)


def race(kinds: list[str], path: Path, batch: int, steps: int, tiny: bool) -> dict[str, dict[str, float]]:
    """Seconds and memory of each contender; the first step of each is not timed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not steps:
        environment["MALLOC_MMAP_THRESHOLD_"] = "131072"
    options = ["--path", str(path), "--batch", str(batch), *(["--tiny"] if tiny else [])]
    found: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
    workers = {}
    for kind in kinds:
        command = [sys.executable, __file__, "--worker", kind, *options]
        workers[kind] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
    try:
        for process in workers.values():
            while answer(process) != "ready":
                pass
        for number in range(steps + 1):
            turn = number % len(kinds)
            for kind in (*kinds[turn:], *kinds[:turn]):
                process = workers[kind]
                assert process.stdin is not None
                process.stdin.write("step\n")
                process.stdin.flush()
                found[kind].append(json.loads(answer(process)))
                print(f"batch {batch} step {number} {kind}: {found[kind][-1]}", file=sys.stderr, flush=True)
    finally:
        for process in workers.values():
            process.kill()
            process.wait()
    return {
        kind: {
            "least": min(row[0] for row in rows[1:] or rows),
            "median": statistics.median(row[0] for row in rows[1:] or rows),
            "wall": min(row[1] for row in rows[1:] or rows),
            "peak_gib": rows[-1][2],
        }
        for kind, rows in found.items()
    }


def together(
    kinds: list[str], path: Path, config: dict[str, Any], batch: int, steps: int
) -> dict[str, dict[str, float]]:
    """Seconds of each contender in this one process, where all find the same memory; the first step is not timed."""
    torch.set_num_threads(1)
    jobs = {kind: prepared(kind, path, config, batch) for kind in kinds}
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(steps + 1):
        for kind in random.Random(number).sample(kinds, len(kinds)):  # nobody always finds the same one's leavings
            start = time.process_time()
            jobs[kind]()
            found[kind].append(time.process_time() - start)
            print(f"batch {batch} step {number} {kind}: {found[kind][-1]:.3f}", file=sys.stderr, flush=True)
    return {
        kind: {"least": min(rows[1:]), "median": statistics.median(rows[1:]), "peak_gib": math.nan}
        for kind, rows in found.items()
    }


def answer(process: subprocess.Popen[str]) -> str:
    """The next line a worker says."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit("a contender has died; its message stands above")
    return line.strip()


def main() -> None:
    """Race them at each batch size, then print a table with ratios to ours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", nargs="+", default=["ours", "kohya", "peft", "lycoris"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each; 0 takes the first, for memory")
    parser.add_argument("--together", action="store_true", help="all in one process: seconds only, but fairer ones")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--tiny", action="store_true", help="a UNet of toy size, to try this script")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help="a file of weights written before, or where to keep them")
    given = parser.parse_args()
    config = TINY if given.tiny else SD15
    if given.worker:
        return worker(given.worker, given.path, config, given.batch[0])
    with tempfile.TemporaryDirectory() as folder:
        path = given.path or Path(folder) / "unet.safetensors"
        if not path.is_file():
            write_weights(path, config)
        if any(":half" in kind for kind in given.contenders):
            halved(path)  # not in a contender: it would count as its memory
        if given.together:
            found = {n: together(given.contenders, path, config, n, given.steps) for n in given.batch}
        else:
            found = {n: race(given.contenders, path, n, given.steps, given.tiny) for n in given.batch}
    for batch, rows in found.items():
        first = next(iter(rows.values()))
        print(f"\nbatch {batch:<16} CPU s, least   median   ratio   peak GiB   ratio")
        for kind, row in rows.items():
            ratios = (row[name] / first[name] for name in ("least", "peak_gib"))
            one, other = ratios
            print(f"{kind:<22} {row['least']:9.3f} {row['median']:9.3f} {one:7.2f} {row['peak_gib']:9.2f} {other:8.2f}")
    if given.output:
        given.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
