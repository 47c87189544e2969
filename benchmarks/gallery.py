"""The pictures of the README's section on blending, drawn on the embedded base.

    python benchmarks/gallery.py night.safetensors duotone.safetensors blueprint.safetensors [--output docs]

writes sweep.png (two adapters against each other), schedule.png, regions.png and composite.png. Subjects and seed are
those of the command line. How the defaults came about: the seed is the first one tried; an owl, which the base drew as
a box at that seed, gave way to a fox; regions show the second and third adapter, because the first resembles the third.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import lora_vision as lv
from lora_vision.config import GenerateConfig
from lora_vision.generate import generate
from lora_vision.regions import Region, composite
from lora_vision.samples import to_pictures
from lora_vision.schedules import constant, cosine, klora, switch, window
from lora_vision.sheet import sheet

Look = Mapping[str, Any]
"""The arguments of ``Blend.set`` for one column, and ``size`` in pixels."""


class Gallery:
    """The base with its adapters, and where the pictures go."""

    def __init__(self, files: Sequence[str], output: Path, seed: int) -> None:
        self.base = lv.load_base("tiny")
        self.pipe = self.base.pipeline()
        self.blend = lv.Blend(self.pipe)
        self.adapters = {Path(file).stem: lv.load_adapter(file) for file in files}
        for name, adapter in self.adapters.items():
            self.blend.load(adapter, name, scale=0)
        self.output, self.seed = output, seed

    @torch.no_grad()
    def draw(self, prompt: str, look: Look) -> Image.Image:
        """The picture of a prompt under one column's blend."""
        self.blend.set(look.get("scales", {}), schedule=look.get("schedule"), regions=look.get("regions", ()))
        width, height = look.get("size", (64, 64))
        recipe = self.base.recipe
        latents = self.pipe(
            prompt,
            width=width,
            height=height,
            num_inference_steps=recipe.sample_steps,
            guidance_scale=recipe.guidance,
            generator=torch.Generator().manual_seed(self.seed),
            output_type="latent",
        ).images
        return to_pictures(self.base.decode(latents))[0]

    def hang(self, name: str, prompts: Sequence[str], columns: Mapping[str, Look]) -> None:
        """Writes one labelled sheet: prompts down, blends across."""
        pictures = [[self.draw(prompt, look) for look in columns.values()] for prompt in prompts]
        page = sheet(pictures, prompts, list(columns))
        save(page, self.output / f"{name}.png")


def save(page: Image.Image, file: Path) -> None:
    """Writes a page in 256 colours and without a recipe, which would name the adapters' folders."""
    page.quantize(256, Image.Quantize.MEDIANCUT).save(file, optimize=True)
    print(file, flush=True)


def schedules(gallery: Gallery, prompts: Sequence[str], one: str, other: str) -> None:
    """What an adapter does early, and what it does late."""
    alone: Look = {"scales": {one: 1.0}}
    columns: dict[str, Look] = {
        "base": {},
        f"{one} throughout": {**alone, "schedule": constant(1)},
        "fading out (cosine 1 to 0)": {**alone, "schedule": cosine(1, 0)},
        "fading in (cosine 0 to 1)": {**alone, "schedule": cosine(0, 1)},
        "first fifth only": {**alone, "schedule": window(0, 0.2)},
        "last four fifths only": {**alone, "schedule": window(0.2, 1)},
        f"{one}, then {other}": {
            "scales": {one: 1.0, other: 1.0},
            "schedule": {one: window(0, 0.5), other: window(0.5001, 1)},
        },
    }
    gallery.hang("schedule", prompts, columns)


def regions(gallery: Gallery, pairs: Sequence[tuple[str, str]], one: str, other: str) -> None:
    """Two halves of one picture, each with an adapter and, in the last column, a subject of its own."""
    left = torch.zeros(1, 2)
    left[0, 0] = 1
    halves = {one: left, other: 1 - left}

    def split(**prompts: str) -> tuple[Region, ...]:
        return tuple(Region({name: 1.0}, mask, prompts.get(name)) for name, mask in halves.items())

    rows = []
    columns = ["base", f"left {one}, right {other}", f"left {other}, right {one}", "both everywhere, 0.5 each"]
    for first, second in pairs:
        swapped = tuple(Region({name: 1.0}, 1 - mask) for name, mask in halves.items())
        looks: list[Look] = [
            {},
            {"regions": split()},
            {"regions": swapped},
            {"scales": {one: 0.5, other: 0.5}},
            {"regions": split(**{one: first, other: second}), "size": (128, 64)},
        ]
        rows.append((f"{first} | {second}", [gallery.draw(first, look) for look in looks]))
    wide = [[line[-1]] for _, line in rows]
    square = sheet([line[:-1] for _, line in rows], [first for first, _ in pairs], columns)
    second = sheet(wide, [""] * len(wide), ["128 px wide: " + " | ".join(f"{n}, own prompt" for n in halves)])
    second = second.crop((2 * 128, 0, second.width, second.height))  # no labels beside the rows: the others have them
    page = Image.new("RGB", (square.width + second.width, max(square.height, second.height)), "white")
    page.paste(square, (0, page.height - square.height))
    page.paste(second, (square.width, page.height - second.height))
    save(page, gallery.output / "regions.png")


def composites(gallery: Gallery, prompts: Sequence[str], one: str, other: str) -> None:
    """Ways to let two adapters sound at once."""
    both = {one: 1.0, other: 1.0}
    pair = {name: gallery.adapters[name] for name in both}
    columns: dict[str, Look] = {
        one: {"scales": {one: 1.0}},
        other: {"scales": {other: 1.0}},
        "plain sum, 1 + 1": {"scales": both},
        "plain sum, 0.5 + 0.5": {"scales": {one: 0.5, other: 0.5}},
        "composite": {"regions": composite(both)},
        "switch": {"scales": both, "schedule": switch(list(both))},
        f"K-LoRA, {one} as subject": {"scales": both, "schedule": klora(pair)},
    }
    gallery.hang("composite", prompts, columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs=3)
    parser.add_argument("--prompts", nargs=3, default=["a red apple", "a fox", "a bicycle"])
    parser.add_argument("--output", type=Path, default=Path("docs"))
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--only", choices=["sweep", "schedule", "regions", "composite"])
    options = parser.parse_args()
    first, second, third = (Path(file).stem for file in options.adapters)
    prompts = options.prompts
    if options.only in (None, "sweep"):
        steps = f"{first}=0,0.25,...,1 {second}=0,0.5,1"
        settings = {"adapter": tuple(options.adapters[:2]), "sweep": (steps,), "seed": options.seed}
        generate(GenerateConfig(prompts=tuple(prompts[:1]), output=str(options.output / "sweep.png"), **settings))
        save(Image.open(options.output / "sweep.png").convert("RGB"), options.output / "sweep.png")
    gallery = Gallery(options.adapters, options.output, options.seed)
    if options.only in (None, "composite"):
        composites(gallery, prompts, first, second)
    if options.only in (None, "regions"):
        regions(gallery, [(prompts[0], prompts[1]), (prompts[1], prompts[2])], second, third)
    if options.only in (None, "schedule"):
        schedules(gallery, prompts, first, second)


if __name__ == "__main__":
    main()
