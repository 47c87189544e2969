"""Does the embedded base's UNet, compiled, stay compiled while adapters change?

    python benchmarks/recompiles.py [--backend inductor] ink.safetensors gold.safetensors

The UNet of ``tiny`` is compiled with room for 64 ranks. Then weights change, adapters of other ranks and of fewer
layers come and go, and one is scheduled; after each the graphs are counted, and the prediction is compared with that of
the same model not compiled. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.utils import counters

import lora_vision as lv
from lora_vision.adapter import Adapter
from lora_vision.base import load_base
from lora_vision.schedules import linear
from lora_vision.tools.resize import Size, resize


@torch.no_grad()
def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs=2)
    parser.add_argument("--backend", default="inductor", help="eager: count graphs, generate no code")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    first, second = (lv.load_adapter(file) for file in options.adapters)
    small = resize(second, Size(rank=8)).adapter
    few = Adapter({name: layer for name, layer in small.layers.items() if ".up_blocks." in name})
    pipe = load_base("tiny").pipeline()
    unet: Any = pipe.unet
    pipe.scheduler.set_timesteps(4)
    blend = lv.Blend(pipe, capacity=64, targets="attention+ff+conv")
    compiled = torch.compile(unet, backend=options.backend)
    noise = torch.randn(2, unet.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    text = pipe.text_encoder(torch.zeros(2, pipe.tokenizer.model_max_length, dtype=torch.long))[0]
    report: dict[str, Any] = {}

    def step(label: str, change: Callable[[], object]) -> None:
        began = time.process_time()
        change()
        found = [compiled(noise, t, encoder_hidden_states=text).sample for t in pipe.scheduler.timesteps[:2]]
        spent = time.process_time() - began
        true = [unet._call_impl(noise, t, encoder_hidden_states=text).sample for t in pipe.scheduler.timesteps[:2]]
        gap = max(float((a - b).abs().max()) for a, b in zip(found, true, strict=True))
        graphs = int(counters["stats"]["unique_graphs"])
        report[label] = {"graphs": graphs, "CPU seconds": round(spent, 3), "largest difference": gap}
        print(json.dumps({label: report[label]}), flush=True)

    step("without adapters", lambda: None)
    step("one adapter", lambda: blend.load(first, "first"))
    step("another weight", lambda: blend.set({"first": -0.4}))
    step("two adapters", lambda: blend.load(small, "small"))
    step("the first taken out", lambda: blend.remove("first"))
    step("swapped for one of other layers", lambda: (blend.remove("small"), blend.load(few, "few")))
    step("a schedule", lambda: blend.set({"few": 1.0}, schedule=linear(1, 0)))
    step("silence", lambda: blend.set({}))
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
