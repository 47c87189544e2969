"""Makes the embedded ViT: draws the pictures, pretrains it to name them, writes the folder.

One command, from a checkout with the ``dev`` extra and npm on the path:

    python train_scripts/train_tiny_vit.py --work DIR

Seeded; it keeps checkpoints and a log in DIR and resumes there. The shipped model took an hour of one core (AMD EPYC,
Zen 3): 12 minutes for its teacher, the rest for itself, after 12 minutes of drawing on a core that was shared.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from lora_vision.tiny.classifier import train_vit, write_vit

STEPS, LESSONS = 6500, 1600
"""Optimiser steps of 32 drawings for the transformer, and of 64 for the convolutional network that teaches it."""


def main() -> None:
    """Trains from wherever the checkpoint stands and writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for packages, caches, checkpoint and log")
    parser.add_argument("--output", type=Path, help="folder of the finished model (default: WORK/vit)")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps in all (default: %(default)s)")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    options.work.mkdir(parents=True, exist_ok=True)
    train_vit(options.work, options.steps, LESSONS)
    write_vit(options.work, options.output or options.work / "vit")


if __name__ == "__main__":
    main()
