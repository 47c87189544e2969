"""Pictures from prompts: one base, any adapters, and in every file what is needed to draw it again."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from lora_vision import __version__
from lora_vision.blend import Blend, Weight
from lora_vision.config import GenerateConfig
from lora_vision.errors import DataError, LoraVisionError
from lora_vision.files import load_adapter
from lora_vision.lineage import sha256_of
from lora_vision.regions import Region, composite
from lora_vision.samples import to_pictures
from lora_vision.schedules import Schedule
from lora_vision.sheet import sheet
from lora_vision.voices import (
    PLACES,
    Voice,
    read_parts,
    read_schedules,
    read_shelf,
    read_sweeps,
    read_tags,
    read_voices,
    with_named,
)
from lora_vision.words import teach

logger = logging.getLogger(__name__)

KEY = "lora_vision"
"""The PNG text chunk that holds the recipe; `parameters` holds the same in A1111's words."""

SHARED = ("switch", "klora")
"""Ways in which adapters meet that are schedules of them all."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def generate(config: GenerateConfig) -> list[dict[str, Any]]:
    """The recipe of each picture drawn, with the `file` it was written to.

    One picture is drawn at a time, so that it depends on nothing but its own recipe.

    Raises:
        AdapterError: Where an adapter, a tag, a sweep or a schedule cannot be read or does not fit the base.
        BaseModelError: Where the base cannot be loaded.
        LoraVisionError: Where a picture cannot be written, or comes out as something that is no number.
    """
    folder = Path(config.output).absolute().parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise LoraVisionError(f"--output {config.output}: {folder} is no folder one can write to; make it first")
    studio = Studio(config)
    seeds = range(config.seed, config.seed + config.count)
    shots = [(prompt, seed) for prompt in config.prompts for seed in seeds]
    if config.grid:
        return [studio.draw_grid(shots)]
    if config.sweep:
        return [studio.draw_sweep(shots)]
    numbered = Path(config.output).with_suffix("")
    files = [f"{numbered}-{number}.png" for number in range(1, len(shots) + 1)] if len(shots) > 1 else [config.output]
    bar = tqdm(zip(files, shots, strict=True), "pictures", total=len(shots), disable=len(shots) < 2)
    return [studio.draw_one(file, prompt, seed) for file, (prompt, seed) in bar]


class Studio:
    """A base with its adapters, ready to draw; `config` is the user's with every choice filled in."""

    def __init__(self, config: GenerateConfig) -> None:
        """The base, loaded and moved to the GPU if there is one; adapters are read first, since that takes no time."""
        self.sweeps = read_sweeps(config.sweep)
        self.parts = read_parts(config.region)
        tags = [read_tags(prompt)[1] for prompt in config.prompts] + [part.scales for part in self.parts]
        shelf = read_shelf(config.adapter_dir)
        self.voices = with_named(
            read_voices(config.adapter, shelf),
            [*(name for each in tags for name in each), *self.sweeps],
            shelf,
        )
        self.adapters = {voice.name: load_adapter(voice.file) for voice in self.voices}
        self.plans = (*config.schedule, config.how) if config.how in SHARED else config.schedule
        self.schedules = {tuple(self.adapters): read_schedules(self.plans, self.adapters)}
        from lora_vision.base import load_base  # takes seconds: what is misspelt above is told before

        cuda = torch.cuda.is_available()
        precision = config.precision if config.precision != "auto" else "fp16" if cuda else "fp32"
        base = load_base(config.base, config=config.base_config)
        self.base = base.to("cuda" if cuda else "cpu", DTYPES[precision])
        side = int(base.unet.config.sample_size) * base.factor
        self.config = dataclasses.replace(
            config,
            precision=precision,
            steps=base.recipe.sample_steps if config.steps is None else config.steps,
            guidance=base.recipe.guidance if config.guidance is None else config.guidance,
            size=config.size or f"{side}x{side}",
        )
        teach(base.parts, base.tokenizers, self.adapters.values())
        self.pipe: Any = base.pipeline()
        self.blend = Blend(self.pipe)
        for name, adapter in self.adapters.items():
            self.blend.load(adapter, name, scale=0.0)

    def cast(self, prompt: str) -> list[Voice]:
        """The voices at the scales that a prompt gives them; those that stay silent are left out."""
        tags = read_tags(prompt)[1]
        voices = [dataclasses.replace(voice, scale=tags.get(voice.name, voice.scale)) for voice in self.voices]
        return [voice for voice in voices if voice.scale or any(voice.layers.values())]

    def draw_one(self, file: str, prompt: str, seed: int) -> dict[str, Any]:
        """The recipe of one picture, drawn with all adapters and written to a file."""
        own = dataclasses.replace(self.config, prompts=(prompt,), seed=seed, count=1)
        voices = self.cast(prompt)
        picture = self.draw(prompt, seed, {voice.name: voice.weight() for voice in voices})
        return self.write(picture, file, own, voices)

    def draw_grid(self, shots: Sequence[tuple[str, int]]) -> dict[str, Any]:
        """The recipe of a grid, drawn and written: shots down; across the base, each adapter alone, then all."""
        names = [voice.name for voice in self.voices]
        columns: dict[str, Sequence[str]] = {"base": (), **{name: (name,) for name in names}}
        columns |= {" + ".join(names): names} if names else {}
        cells = [
            [(*shot, {v.name: v.weight() for v in self.cast(shot[0]) if v.name in some}) for some in columns.values()]
            for shot in shots
        ]
        return self.draw_sheet(cells, self.row_labels(shots), list(columns))

    def draw_sweep(self, shots: Sequence[tuple[str, int]]) -> dict[str, Any]:
        """The recipe of a sheet, drawn and written: the first sweep across, the second down, for each shot."""
        across, *down = [[(name, scale) for scale in scales] for name, scales in self.sweeps.items()]
        lines: list[list[tuple[str, float]]] = [[step] for step in down[0]] if down else [[]]
        cells, rows = [], []
        swept = {voice.name: voice for voice in self.voices if voice.name in self.sweeps}
        for label, (prompt, seed) in zip(self.row_labels(shots), shots, strict=True):
            others = {voice.name: voice.weight() for voice in self.cast(prompt) if voice.name not in swept}
            for line in lines:
                steps = [{name: swept[name].weight(scale) for name, scale in (step, *line)} for step in across]
                cells.append([(prompt, seed, {**others, **step}) for step in steps])
                shot = [label] if len(shots) > 1 or not line else []
                rows.append(" ".join([*shot, *(f"{name} {scale:g}" for name, scale in line)]))
        return self.draw_sheet(cells, rows, [f"{name} {scale:g}" for name, scale in across])

    def draw_sheet(
        self, cells: Sequence[Sequence[tuple[str, int, Mapping[str, Weight]]]], rows: list[str], columns: list[str]
    ) -> dict[str, Any]:
        """The recipe of a labelled sheet of pictures, each given as prompt, seed and scales."""
        with tqdm(desc="pictures", total=len(rows) * len(columns)) as bar:
            pictures: list[list[Image.Image]] = []
            for line in cells:
                pictures.append([])
                for cell in line:
                    pictures[-1].append(self.draw(*cell))
                    bar.update()
        return self.write(sheet(pictures, rows, columns), self.config.output, self.config, self.voices)

    def row_labels(self, shots: Sequence[tuple[str, int]]) -> list[str]:
        """What stands beside the row of each shot."""
        return [prompt if self.config.count == 1 else f"{prompt} ({seed})" for prompt, seed in shots]

    def regions(self, scales: Mapping[str, Weight]) -> list[Region]:
        """The regions of a picture: those asked for, or one for each of several adapters that are composed."""
        if self.config.how == "composite" and len(scales) > 1:
            return composite(scales)
        voices = {voice.name: voice for voice in self.voices}
        return [
            Region({name: voices[name].weight(scale) for name, scale in part.scales.items()}, part.mask, part.prompt)
            for part in self.parts
        ]

    def scheduled(self, sounding: Collection[str]) -> dict[str, Schedule]:
        """The schedules of what sounds; one adapter alone neither takes turns nor shares out layers."""
        names = tuple(name for name in self.adapters if name in sounding)
        if names not in self.schedules:
            shared = SHARED if len(names) < 2 else ()
            texts = [
                text
                for text in self.plans
                if text.partition(":")[0] not in shared and text.rpartition("=")[0] in ("", *names)
            ]
            self.schedules[names] = read_schedules(texts, {name: self.adapters[name] for name in names})
        return self.schedules[names]

    def draw(self, prompt: str, seed: int, scales: Mapping[str, Weight]) -> Image.Image:
        """The picture of a prompt with the named adapters at these scales.

        The VAE decodes in fp32, because SDXL's overflows in fp16.

        Raises:
            LoraVisionError: Where the picture holds NaN or infinity, which viewers show as black.
        """
        width, height = self.config.pixels() or (None, None)
        scales = {name: weight for name, weight in scales.items() if weight}
        if scales.keys() != self.blend.scales.keys():
            self.blend.set({})  # the stack in order of names: what was drawn before leaves no trace in the rounding
        regions = self.regions(scales)
        sounding = {*scales, *(name for region in regions for name in region.adapters)}
        self.blend.set(scales, schedule=self.scheduled(sounding), regions=regions)
        latents = self.pipe(
            prompt=read_tags(prompt)[0],
            negative_prompt=self.config.negative,
            num_inference_steps=self.config.steps,
            guidance_scale=self.config.guidance,
            width=width,
            height=height,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="latent",
        ).images
        pixels = self.base.decode(latents)
        if not pixels.isfinite().all():
            raise LoraVisionError(
                f"the picture of {prompt!r} with seed {seed} holds NaN or infinity in {self.config.precision}; "
                "use --precision fp32 or lower scales"
            )
        return to_pictures(pixels)[0]

    def write(self, picture: Image.Image, file: str, config: GenerateConfig, voices: Sequence[Voice]) -> dict[str, Any]:
        """The recipe of a picture, written into its file, which appears whole or not at all."""
        recipe = self.recipe(config, voices)
        chunks = PngInfo()
        chunks.add_text(KEY, json.dumps(recipe))
        chunks.add_text("parameters", self.parameters(config, voices))
        unfinished = Path(f"{file}.unfinished")
        try:
            picture.save(unfinished, "PNG", pnginfo=chunks)
            unfinished.replace(file)
        finally:
            unfinished.unlink(missing_ok=True)
        return {"file": file, **recipe}

    def recipe(self, config: GenerateConfig, voices: Sequence[Voice]) -> dict[str, Any]:
        """All that is needed to draw a picture again: settings, and what the files and libraries were."""
        settings = {name: value for name, value in dataclasses.asdict(config).items() if name != "output"}
        inside = {name for part in self.parts for name in part.scales} - {voice.name for voice in voices}
        elsewhere = [voice for voice in self.voices if voice.name in inside]
        return {
            "config": settings,
            "adapters": [dataclasses.asdict(voice) for voice in (*voices, *elsewhere)],
            "masks": {part.place: sha256_of(part.place) for part in self.parts if part.place not in PLACES},
            "base": {"name": config.base, "family": self.base.family, "fingerprint": self.base.fingerprint},
            "sampler": type(self.pipe.scheduler).__name__,
            "device": self.base.device.type,
            "versions": {KEY: __version__, **{name: version(name) for name in ("torch", "diffusers", "transformers")}},
        }

    def parameters(self, config: GenerateConfig, voices: Sequence[Voice]) -> str:
        """The settings as A1111 writes them, for the tools that read those."""
        tagged = {name for prompt in config.prompts for name in read_tags(prompt)[1]}
        tags = "".join(f" <lora:{voice.name}:{voice.scale:g}>" for voice in voices if voice.name not in tagged)
        hashes = ", ".join(f"{voice.name}: {voice.sha256[:12]}" for voice in voices)
        facts = {
            "Steps": config.steps,
            "Sampler": type(self.pipe.scheduler).__name__.removesuffix("Scheduler"),
            "CFG scale": config.guidance,
            "Seed": config.seed,
            "Size": config.size,
            "Model hash": self.base.fingerprint[:10],
            "Model": config.base,
            **({"Lora hashes": f'"{hashes}"'} if hashes else {}),
            "Version": f"{KEY} {__version__}",
        }
        negative = f"Negative prompt: {config.negative}\n" if config.negative else ""
        return f"{' / '.join(config.prompts)}{tags}\n{negative}" + ", ".join(f"{k}: {v}" for k, v in facts.items())


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe in a picture drawn by `generate`.

    Raises:
        DataError: Where the file is no picture or has no recipe.
    """
    try:
        with Image.open(path) as picture:
            recipe: dict[str, Any] = json.loads(picture.info[KEY])
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"{path} is no picture drawn by `lora-vision generate`: it has no recipe") from error
    files = {voice["file"]: voice["sha256"] for voice in recipe["adapters"]} | recipe.get("masks", {})
    for file, sha256 in files.items():
        if Path(file).exists() and sha256_of(file) != sha256:
            logger.warning("%s is no longer the file that %s was drawn with", file, path)
    return recipe
