"""The demo: two styles learnt from the bundled pictures, then drawn alone and blended, on subjects neither has seen.

    make demo        or, installed:        python "$(lora-vision where demo)"

Everything lands in the folder demo/: duotone.safetensors, blueprint.safetensors and grid.png.
"""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

from lora_vision.cli import PACKAGE
from lora_vision.cli import main as command

STYLES = ("duotone", "blueprint")
PROMPTS = ("a fox", "an owl", "an apple", "a castle", "a rocket on a yellow background")
FOLDER = Path("demo")


def main() -> None:
    """Train, draw, and say where to look."""
    start = time.monotonic()
    FOLDER.mkdir(exist_ok=True)
    for style in STYLES:
        lora_vision("train", "style", "--data", PACKAGE / "pictures" / style, "--output", adapter(style))
    blend = [word for style in STYLES for word in ("--adapter", f"{adapter(style)}:0.7")]
    lora_vision("generate", *PROMPTS, *blend, "--grid", "--output", FOLDER / "grid.png")
    seconds = time.monotonic() - start
    sys.stdout.write(f"Done in {seconds:.0f} s. Look at {FOLDER / 'grid.png'}; the training is told in")
    sys.stdout.write(f" {' and '.join(str(FOLDER / f'{style}-training') for style in STYLES)}.\n")


def adapter(style: str) -> Path:
    """Where the adapter of a style goes."""
    return FOLDER / f"{style}.safetensors"


def lora_vision(*words: object) -> None:
    """Show a command line and run it; the first that fails ends the demo."""
    line = [str(word) for word in words]
    sys.stdout.write(f"$ lora-vision {shlex.join(line)}\n")
    sys.stdout.flush()
    if code := command(line):
        sys.exit(code)


if __name__ == "__main__":
    main()
