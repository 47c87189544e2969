"""What style adapters do to subjects they never saw: share in the target style, share still naming the right subject.

    python benchmarks/style_quality.py --work DIR blueprint=blueprint.safetensors duotone=duotone.safetensors

DIR is the folder of ``train_tiny_base.py``. The nouns are held out from every bundled picture set; the same prompts and
noise are drawn with the base, each adapter at 0.5 and 1, and every pair of adapters blended. Ceilings: the same judges
on the true pictures passed through the VAE. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
from pathlib import Path

import torch
from base_quality import as_pixels, draw_prompts, sheet
from judges import Judges, judges, through
from torch import Tensor

import lora_vision as lv
from lora_vision.base import load_base
from lora_vision.tiny.dataset import packages
from lora_vision.tiny.render import draw
from lora_vision.tiny.subjects import STYLE_SET_SUBJECTS, SUBJECTS, caption

HELD_OUT = tuple(noun for noun in SUBJECTS if noun not in STYLE_SET_SUBJECTS)


def distance(pixels: Tensor, true: Tensor) -> float:
    """Returns how far the pictures' mean colours lie from the true ones': mean distance in RGB, pixels in [0, 1]."""
    return ((pixels - true) / 2).mean((2, 3)).norm(dim=1).mean().item()


def measure(made: Tensor, truth: Tensor, judge: Judges, style: str, nouns: list[str]) -> dict[str, float]:
    """Returns the judges' scores and the colour distance to the true pictures of the style."""
    return {**judge.scores(made, style, nouns), "colour distance": distance(made, truth)}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+", metavar="STYLE=FILE")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--nouns", type=int, default=60, help="how many held-out nouns to draw")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--picture", type=Path, help="also write a sheet: a row for each measurement")
    parser.add_argument("--quick", action="store_true", help="scale 1 only, no blends")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    pipe = load_base(options.base).pipeline()
    pipe.set_progress_bar_config(disable=True)
    folder, judge = packages(options.work), judges(options.work, pipe.vae)
    nouns = [HELD_OUT[i * len(HELD_OUT) // options.nouns] for i in range(options.nouns)]
    prompts = [caption(noun) for noun in nouns]
    files = dict(entry.split("=", 1) for entry in options.adapters)
    truth = {
        s: through(pipe.vae, as_pixels([p for n in nouns if (p := draw(folder, n, s)) is not None])) for s in files
    }

    report: dict[str, object] = {}
    base = draw_prompts(pipe, prompts, options.seed)
    rows = [base]
    report["base"] = judge.scores(base, "noto", nouns)
    blend, made = lv.Blend(pipe), {}
    for style, file in files.items():
        blend.load(file, name=style)
    for style in files:
        entry = {"base": measure(base, truth[style], judge, style, nouns)}
        for scale in (1.0,) if options.quick else (0.5, 1.0):
            blend.set({style: scale})
            made[style, scale] = draw_prompts(pipe, prompts, options.seed)
            entry[f"scale {scale}"] = measure(made[style, scale], truth[style], judge, style, nouns)
            rows.append(made[style, scale])
        entry["ceiling: true pictures"] = measure(truth[style], truth[style], judge, style, nouns)
        kept = entry["scale 1.0"]["subject"] / max(report["base"]["subject"], 1e-9)  # type: ignore[index]
        report[style] = {**entry, "subjects kept": kept}
        rows.append(truth[style])
    for one, other in () if options.quick else itertools.combinations(files, 2):
        blend.set({one: 0.5, other: 0.5})
        mixed = draw_prompts(pipe, prompts, options.seed)
        rows.append(mixed)
        ends = [made[s, 1.0].mean((2, 3)) for s in (one, other)]
        line = ends[1] - ends[0]
        along = ((mixed.mean((2, 3)) - ends[0]) * line).sum(1) / line.square().sum(1)
        report[f"{one} + {other}, 0.5 each"] = {
            "mean colour from the first (0) to the second (1), median": along.median().item(),
            "subject": judge.scores(mixed, one, nouns)["subject"],
        }
    blend.detach()
    print(json.dumps(report, indent=1))
    if options.picture:
        shown = torch.cat([row[:: max(1, len(nouns) // 15)][:15] for row in rows])
        sheet(shown, min(15, len(nouns))).save(options.picture)


if __name__ == "__main__":
    main()
