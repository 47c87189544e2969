"""How good the embedded base is: right subjects, named colours and backgrounds, VAE reconstruction.

    python benchmarks/base_quality.py --work DIR [--base FOLDER] [--picture base.png]

DIR is the folder of ``train_tiny_base.py``: the picture packages and caches. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from judges import NOUNS, judges, through
from PIL import Image
from torch import Tensor

from lora_vision.base import RECIPES, load_base
from lora_vision.tiny.dataset import packages
from lora_vision.tiny.render import draw, draw_rgba, over, recoloured, shrink
from lora_vision.tiny.subjects import COLOURS, HELD_OUT_STYLES, SUBJECT_COLOURS, caption

SEEDS = (101, 202)


@torch.no_grad()
def draw_prompts(pipe: StableDiffusionPipeline, prompts: list[str], seed: int, steps: int = 20) -> Tensor:
    """Returns pictures [B, 3, 64, 64] in [-1, 1]; each prompt has its own noise, fixed by seed and place."""
    made, guidance = [], RECIPES["tiny"].guidance
    for start in range(0, len(prompts), 40):
        part = prompts[start : start + 40]
        draws = [torch.Generator().manual_seed(seed * 10_000 + start + row) for row in range(len(part))]
        out = pipe(part, num_inference_steps=steps, guidance_scale=guidance, generator=draws, output_type="pt")
        made.append(out.images * 2 - 1)
    return torch.cat(made)


def sheet(pixels: Tensor, columns: int) -> Image.Image:
    """Returns the pictures [B, 3, H, W] in [-1, 1] laid out row by row."""
    blank = torch.ones((-len(pixels)) % columns, *pixels.shape[1:])
    rows = torch.cat([pixels, blank]).unflatten(0, (-1, columns))
    whole = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    return Image.fromarray(((whole.clamp(-1, 1) + 1) * 127.5).round().byte().numpy())


def corner_colour(pixels: Tensor) -> Tensor:
    """Returns the mean colour [B, 3] of the four 6-pixel corners."""
    corners = [pixels[..., y, x] for y in (slice(6), slice(-6, None)) for x in (slice(6), slice(-6, None))]
    return torch.cat([c.flatten(2) for c in corners], -1).median(-1).values


def subject_colour(pixels: Tensor) -> Tensor:
    """Returns the mean colour [B, 3] of what is not white."""
    ink = (pixels.amin(1, keepdim=True) < 0.8).float()
    return (pixels * ink).sum((2, 3)) / ink.sum((2, 3)).clamp(min=1)


def as_pixels(pictures: list[np.ndarray]) -> Tensor:
    """Returns drawn pictures as [B, 3, 64, 64] in [-1, 1]."""
    return torch.from_numpy(np.stack([shrink(p, 64) for p in pictures])).permute(0, 3, 1, 2).float() / 127.5 - 1


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--picture", type=Path, help="also write all subjects as one picture")
    parser.add_argument("--nouns", type=int, default=len(NOUNS), help="fewer nouns for a quick look")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    pipe = load_base(options.base).pipeline()
    pipe.set_progress_bar_config(disable=True)
    folder, judge = packages(options.work), judges(options.work, pipe.vae)
    report: dict[str, object] = {
        "judges held out, real pictures through the VAE": {
            "style": judge.style_accuracy,
            "subject": judge.subject_accuracy,
            "each style (style, subject)": judge.ceilings,
        }
    }
    psnr = {}
    for style in ("noto", *HELD_OUT_STYLES):
        real = as_pixels([p for noun in NOUNS if (p := draw(folder, noun, style)) is not None])
        error = ((through(pipe.vae, real) - real) / 2).square().mean((1, 2, 3))
        psnr[style] = (-10 * error.log10()).mean().item()
    report["VAE PSNR, dB"] = psnr

    nouns = [NOUNS[row * len(NOUNS) // options.nouns] for row in range(options.nouns)]
    subjects, drawn = {}, []
    for seed in SEEDS:
        pixels = draw_prompts(pipe, [caption(noun) for noun in nouns], seed)
        scores = judge.scores(pixels, "noto", nouns)
        first = judge.subject.rank(pixels)[:, 0].tolist()
        wrong = [f"{n}->{NOUNS[got]}" for n, got in zip(nouns, first, strict=True) if NOUNS[got] != n]
        subjects[f"seed {seed}"] = {**scores, "wrong": wrong}
        drawn.append(pixels)
    report["subjects"] = subjects
    if options.picture:
        sheet(drawn[0], 20).save(options.picture)

    few = nouns[:: max(1, len(nouns) // 36)]
    grounds = list(COLOURS)
    named = [grounds[i % len(grounds)] for i in range(len(few))]
    palette = torch.tensor([(255, 255, 255), *COLOURS.values()]) / 127.5 - 1
    made = draw_prompts(pipe, [caption(n, background=g) for n, g in zip(few, named, strict=True)], 303)
    nearest = torch.cdist(corner_colour(made), palette).argmin(1)
    right = [("white", *grounds)[i] == g for i, g in zip(nearest.tolist(), named, strict=True)]
    report["background named is the nearest of 10 colours"] = sum(right) / len(right)
    report["its subject right"] = judge.scores(made, "noto", few)["subject"]

    tints = [SUBJECT_COLOURS[i % len(SUBJECT_COLOURS)] for i in range(len(few))]
    means = []
    for tint in SUBJECT_COLOURS:
        drawings = [draw_rgba(folder, noun, "noto") for noun in NOUNS[::5]]
        means.append(
            subject_colour(as_pixels([over(recoloured(d, tint), (1, 1, 1)) for d in drawings if d is not None]))
        )
    centres = torch.stack([m.mean(0) for m in means])
    spread = torch.stack([torch.cdist(m, centres).argmin(1) for m in means])
    report["colour measure on real pictures"] = (spread == torch.arange(len(means))[:, None]).float().mean().item()
    made = draw_prompts(pipe, [caption(n, colour=t) for n, t in zip(few, tints, strict=True)], 404)
    got = torch.cdist(subject_colour(made), centres).argmin(1)
    report["subject has the named colour"] = np.mean(
        [SUBJECT_COLOURS[i] == t for i, t in zip(got.tolist(), tints, strict=True)]
    ).item()
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
