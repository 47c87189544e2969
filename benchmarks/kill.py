"""Kill a training run at random moments, again and again: no broken file, always resumable, the same end.

    python benchmarks/kill.py [--times 200] [--seed 0] [--steps 60]

A tiny random base is trained on a few pictures in a process of its own, with a checkpoint, a look at the held-out
pictures and sample pictures every few steps. The process is killed (SIGKILL) after a random time, every file it left is
opened, and the run is resumed; when it gets to its end it begins anew elsewhere, until it has been killed so many
times. Each finished adapter must be the bytes of an unbroken run. tests/test_kill.py does a handful of these.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch
from models import tiny_sd, write_pictures
from PIL import Image

import lora_vision as lv
from lora_vision.base import RECIPES
from lora_vision.config import StyleConfig
from train_scripts import train_style

RECIPES["tiny"] = replace(RECIPES["tiny"], sample_steps=2)  # else most kills would fall into the denoising of samples


def settings(work: Path, output: Path, steps: int) -> StyleConfig:
    """The run: a variant with random numbers of its own, everything written every few steps."""
    return StyleConfig(
        data=str(work / "pictures"),
        base=str(work / "base"),
        cache=str(work / "cache"),
        output=str(output),
        resume=True,
        variant="dora",
        rank_dropout=0.1,
        targets="attention",
        rank=2,
        steps=steps,
        batch_size=2,
        resolution=32,
        checkpoint_every=3,
        validate_every=4,
        sample_every=10,
        sample_prompts=("dot 1",),
        ema=0.9,
        tracker="none",
    )


def run(config: StyleConfig, seconds: float = 600.0) -> bool:
    """Whether the run, in a process forked from this one, came to its end within so many seconds; else it is killed."""
    end = time.monotonic() + seconds
    if not (child := os.fork()):
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            train_style.run(config)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, "a resumed run failed; its message stands above"
            return True
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def check(folder: Path, output: Path) -> int:
    """The number of steps in the checkpoint; every file of the run is opened on the way."""
    for path in [output, *folder.rglob("[!.]*.safetensors")]:
        if path.exists():
            lv.load_adapter(path)
    for path in folder.rglob("[!.]*.png"):
        with Image.open(path) as picture:
            picture.load()
    for path in folder.glob("*.json"):
        json.loads(path.read_text())
    checkpoint = folder / "checkpoint.pt"
    return int(torch.load(checkpoint, weights_only=True)["done"]) if checkpoint.exists() else 0


def torture(work: Path, times: int, seed: int, steps: int) -> list[int]:
    """The steps reached at each kill; raises where a file is broken or an adapter differs.

    Args:
        work: An empty folder.
        times: How often to kill.
        seed: Of the moments.
        steps: Length of the run.
    """
    tiny_sd(work / "base", "sd1")
    write_pictures(work / "pictures", 6)
    whole = work / "whole.safetensors"
    began = time.monotonic()
    run(settings(work, whole, steps))
    length = time.monotonic() - began
    moments, reached, number = random.Random(seed), list[int](), 0
    while len(reached) < times:
        output = work / f"run{number}.safetensors"
        folder = output.with_name(f"{output.stem}-training")
        config, before, number = settings(work, output, steps), 0, number + 1
        while len(reached) < times and not run(config, moments.uniform(0, length)):
            now = check(folder, output)
            assert now >= before, f"the checkpoint went back from step {before} to {now}"
            before = now
            reached.append(now)
            print(f"kill {len(reached)} of {times}: checkpoint at step {now}", file=sys.stderr, flush=True)
        run(config)
        assert output.read_bytes() == whole.read_bytes(), f"{output} differs from the unbroken run"
        assert not list(folder.rglob(".*.new")), "a killed writer's rest was not swept away"
    return reached


def main() -> None:
    """Torture, then say how often."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        reached = torture(Path(folder), given.times, given.seed, given.steps)
    print(f"killed {len(reached)} times, with checkpoints from step {min(reached)} to {max(reached)}: nothing broken")


if __name__ == "__main__":
    main()
