"""Seconds a step and peak memory of training a ViT-B/16 with lora_vision, with PEFT, and whole, taking turns.

    python benchmarks/vit.py [--batch 8 --steps 4 --rank 16 --threads 1]

Each way has a process of its own, so that peaks do not mix; they step one after the other, and the median counts.
Random weights and pictures of ViT-B/16's shapes, fp32, AdamW, attention adapted, the head trained too. Memory is the
peak resident set less what the process held before it built the model. Checkpointing computes activations twice.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

import torch

WAYS = ("lora_vision", "PEFT", "full fine-tuning", "lora_vision, checkpointing")


def resident(name: str) -> int:
    """Returns VmRSS or VmHWM of this process in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def build(way: str, rank: int) -> tuple[Any, list[Any]]:
    """Returns a ViT-B/16 with ten classes and what of it learns."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    kind: Any = ViTForImageClassification
    model = kind(ViTConfig(num_labels=10)).train()
    if way.startswith("lora_vision"):
        from lora_vision import LoraConfig, inject

        if "checkpointing" in way:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        learning = inject({"vit": model}, LoraConfig(rank=rank, targets="attention"))
        return model, learning + list(model.classifier.requires_grad_(True).parameters())
    if way == "PEFT":
        import peft

        layers = ["q_proj", "k_proj", "v_proj", "o_proj"]
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=layers, modules_to_save=["classifier"])
        model = peft.get_peft_model(model, config)
    return model, [p for p in model.parameters() if p.requires_grad]


def worker(way: str, options: argparse.Namespace, pipe: Connection) -> None:
    """Takes a step whenever it is told to, and tells how long it took; at the end, its peak memory."""
    torch.set_num_threads(options.threads)
    import peft  # noqa: F401  every process holds the same imports
    import transformers  # noqa: F401

    before = resident("VmRSS")
    model, learning = build(way, options.rank)
    optimizer = torch.optim.AdamW(learning, lr=1e-4)
    pixels, labels = torch.randn(options.batch, 3, 224, 224), torch.randint(10, (options.batch,))
    pipe.send(sum(p.numel() for p in learning))
    while pipe.recv():
        began = time.perf_counter(), time.process_time()
        loss = torch.nn.functional.cross_entropy(model(pixel_values=pixels).logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        pipe.send((time.perf_counter() - began[0], time.process_time() - began[1]))
    pipe.send(resident("VmHWM") - before)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="measured steps, after one that is not")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    context = mp.get_context("spawn")
    pipes, workers, trained = {}, [], {}
    for way in WAYS:
        pipes[way], theirs = context.Pipe()
        workers.append(context.Process(target=worker, args=(way, options, theirs)))
        workers[-1].start()
        trained[way] = pipes[way].recv()
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for _ in range(options.steps + 1):
        for way in WAYS:
            pipes[way].send(True)
            times[way].append(pipes[way].recv())
    print(f"ViT-B/16, batch {options.batch}, rank {options.rank}, {options.threads} thread(s), {options.steps} steps")
    print("| way | trained | seconds a step | CPU seconds a step | peak memory |\n|---|---|---|---|---|")
    for way, process in zip(WAYS, workers, strict=True):
        pipes[way].send(False)
        peak = pipes[way].recv()
        process.join()
        wall, cpu = (statistics.median(row[column] for row in times[way][1:]) for column in (0, 1))
        print(f"| {way} | {trained[way]:,} | {wall:.2f} | {cpu:.2f} | {peak / 2**20:.0f} MiB |", flush=True)


if __name__ == "__main__":
    main()
