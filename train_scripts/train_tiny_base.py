"""Makes the embedded base: draws the pictures, trains the VAE, the text encoder and the UNet, writes the folder.

One command, from a checkout with the ``dev`` extra and npm on the path:

    python train_scripts/train_tiny_base.py --work DIR

Every stage is seeded, keeps checkpoints in DIR and resumes there; ``--stage`` runs one alone. The UNet can train in
several processes (``torchrun --nproc-per-node 2 train_scripts/train_tiny_base.py --stage unet --work DIR``).
How long it takes and what it reaches stands in ``lora_vision/tiny/README.md``.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from lora_vision.tiny.autoencoder import train_decoder, train_vae
from lora_vision.tiny.dataset import further_pixels, pictures, write_style_sets
from lora_vision.tiny.denoiser import new_scheduler, new_unet, train_unet
from lora_vision.tiny.text import new_tokenizer, train_text

STEPS = {"vae": 3600, "text": 900, "decoder": 900, "unet32": 1900, "unet64": 4200}
"""Optimiser steps a stage."""


def assemble(work: Path, output: Path) -> None:
    """Writes the diffusers folder in fp16 from whatever checkpoints there are."""
    stage = "unet64" if (work / "unet64.pt").exists() else "unet32"
    unet = new_unet()
    unet.load_state_dict(torch.load(work / f"{stage}.pt", weights_only=True)["ema"])
    vae = AutoencoderKL.from_pretrained(work / "vae")
    if (work / "decoder.pt").exists():
        vae.load_state_dict(torch.load(work / "decoder.pt", weights_only=True)["model"])
    kind: Any = StableDiffusionPipeline
    pipeline = kind(
        vae=vae.half(),
        text_encoder=CLIPTextModel.from_pretrained(work / "text_encoder").half(),
        tokenizer=new_tokenizer(work),
        unet=unet.half(),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for part in (pipeline.vae, pipeline.unet):
        part.register_to_config(_name_or_path="")  # no path of this machine in what is shipped
    pipeline.save_pretrained(output, safe_serialization=True)
    spell_classically(output / "text_encoder" / "model.safetensors")


def spell_classically(file: Path) -> None:
    """Gives the text encoder's weights the names that checkpoints use.

    transformers 5.6 and later leave out ``text_model.``; earlier ones would miss every weight without it.
    """
    weights = {f"text_model.{name.removeprefix('text_model.')}": weight for name, weight in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})


def main() -> None:
    """Runs the stages asked for, all of them in order by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for packages, caches, checkpoints and the log")
    parser.add_argument("--output", type=Path, help="folder of the finished base (default: WORK/base)")
    stages = ("pictures", "vae", "text", "unet32", "decoder", "unet64", "assemble", "sets")
    parser.add_argument("--stage", choices=stages, action="append", help="run only this stage; may be repeated")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    options.work.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    work = options.work
    stories: dict[str, Callable[[], object]] = {
        "pictures": lambda: (pictures(work), further_pixels(work)),
        "vae": lambda: train_vae(work, STEPS["vae"]),
        "text": lambda: train_text(work, STEPS["text"]),
        "unet32": lambda: train_unet(work, 32, STEPS["unet32"], accelerator),
        "decoder": lambda: train_decoder(work, STEPS["decoder"]),
        "unet64": lambda: train_unet(work, 64, STEPS["unet64"], accelerator),
        "assemble": lambda: assemble(work, options.output or work / "base"),
        "sets": lambda: write_style_sets(work),
    }
    for stage in options.stage or stages:
        stories[stage]()


if __name__ == "__main__":
    main()
