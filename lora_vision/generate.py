"""Pictures from prompts: one base, any adapters, and in every file what is needed to draw it again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from lora_vision import __version__
from lora_vision.base import load_base
from lora_vision.blend import Blend
from lora_vision.config import GenerateConfig
from lora_vision.errors import AdapterError, DataError, LoraVisionError
from lora_vision.files import load_adapter
from lora_vision.samples import to_pictures
from lora_vision.sheet import sheet

logger = logging.getLogger(__name__)

KEY = "lora_vision"
"""The PNG text chunk that holds the recipe; `parameters` holds the same in A1111's words."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Voice:
    """An adapter that sounds in a picture.

    Attributes:
        name: What it is called here: the file's stem, numbered where two are alike.
        file: The file, as the user names it.
        scale: The user's multiplier.
        sha256: Hash (hex) of the file's bytes.
    """

    name: str
    file: str
    scale: float
    sha256: str


def generate(config: GenerateConfig) -> list[dict[str, Any]]:
    """The recipe of each picture drawn, with the `file` it was written to.

    One picture is drawn at a time, so that it depends on nothing but its own recipe.

    Raises:
        AdapterError: Where an adapter cannot be read or does not fit the base.
        BaseModelError: Where the base cannot be loaded.
        LoraVisionError: Where a picture cannot be written, or comes out as something that is no number.
    """
    folder = Path(config.output).absolute().parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise LoraVisionError(f"--output {config.output}: {folder} is no folder one can write to; make it first")
    voices = read_voices(config.adapter)
    studio = Studio(config, voices)
    seeds = range(config.seed, config.seed + config.count)
    shots = [(prompt, seed) for prompt in config.prompts for seed in seeds]
    if config.grid:
        return [studio.draw_grid(shots)]
    numbered = Path(config.output).with_suffix("")
    files = [f"{numbered}-{number}.png" for number in range(1, len(shots) + 1)] if len(shots) > 1 else [config.output]
    bar = tqdm(zip(files, shots, strict=True), "pictures", total=len(shots), disable=len(shots) < 2)
    return [studio.draw_one(file, prompt, seed) for file, (prompt, seed) in bar]


class Studio:
    """A base with its adapters, ready to draw; `config` is the user's with every choice filled in."""

    def __init__(self, config: GenerateConfig, voices: Sequence[Voice]) -> None:
        """The base, loaded and moved to the GPU if there is one; adapters are read first, since that takes no time."""
        adapters = {voice.name: load_adapter(voice.file) for voice in voices}
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
        self.voices = voices
        self.pipe: Any = base.pipeline()
        self.blend = Blend(self.pipe)
        for name, adapter in adapters.items():
            self.blend.load(adapter, name)

    def draw_one(self, file: str, prompt: str, seed: int) -> dict[str, Any]:
        """The recipe of one picture, drawn with all adapters and written to a file."""
        own = dataclasses.replace(self.config, prompts=(prompt,), seed=seed, count=1)
        picture = self.draw(prompt, seed, {voice.name: voice.scale for voice in self.voices})
        return self.write(picture, file, own)

    def draw_grid(self, shots: Sequence[tuple[str, int]]) -> dict[str, Any]:
        """The recipe of a grid, drawn and written: shots down; across the base, each adapter alone, then all."""
        columns: dict[str, dict[str, float]] = {"base": {}}
        columns |= {voice.name: {voice.name: voice.scale} for voice in self.voices}
        columns |= (
            {" + ".join(v.name for v in self.voices): {v.name: v.scale for v in self.voices}} if self.voices else {}
        )
        with tqdm(desc="pictures", total=len(columns) * len(shots)) as bar:
            pictures: list[list[Image.Image]] = []
            for prompt, seed in shots:
                pictures.append([])
                for scales in columns.values():
                    pictures[-1].append(self.draw(prompt, seed, scales))
                    bar.update()
        rows = [prompt if self.config.count == 1 else f"{prompt} ({seed})" for prompt, seed in shots]
        return self.write(sheet(pictures, rows, list(columns)), self.config.output, self.config)

    def draw(self, prompt: str, seed: int, scales: Mapping[str, float]) -> Image.Image:
        """The picture of a prompt with the named adapters at these scales.

        The VAE decodes in fp32, because SDXL's overflows in fp16.

        Raises:
            LoraVisionError: Where the picture holds NaN or infinity, which viewers show as black.
        """
        width, height = self.config.pixels() or (None, None)
        self.blend.set(scales)
        latents = self.pipe(
            prompt=prompt,
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

    def write(self, picture: Image.Image, file: str, config: GenerateConfig) -> dict[str, Any]:
        """The recipe of a picture, written into its file, which appears whole or not at all."""
        recipe = self.recipe(config)
        chunks = PngInfo()
        chunks.add_text(KEY, json.dumps(recipe))
        chunks.add_text("parameters", self.parameters(config))
        unfinished = Path(f"{file}.unfinished")
        try:
            picture.save(unfinished, "PNG", pnginfo=chunks)
            unfinished.replace(file)
        finally:
            unfinished.unlink(missing_ok=True)
        return {"file": file, **recipe}

    def recipe(self, config: GenerateConfig) -> dict[str, Any]:
        """All that is needed to draw a picture again: settings, and what the files and libraries were."""
        settings = {name: value for name, value in dataclasses.asdict(config).items() if name != "output"}
        return {
            "config": settings,
            "adapters": [dataclasses.asdict(voice) for voice in self.voices],
            "base": {"name": config.base, "family": self.base.family, "fingerprint": self.base.fingerprint},
            "sampler": type(self.pipe.scheduler).__name__,
            "device": self.base.device.type,
            "versions": {KEY: __version__, **{name: version(name) for name in ("torch", "diffusers", "transformers")}},
        }

    def parameters(self, config: GenerateConfig) -> str:
        """The settings as A1111 writes them, for the tools that read those."""
        tags = "".join(f" <lora:{voice.name}:{voice.scale:g}>" for voice in self.voices)
        hashes = ", ".join(f"{voice.name}: {voice.sha256[:12]}" for voice in self.voices)
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


def read_voices(texts: Sequence[str]) -> list[Voice]:
    """The adapters that FILE or FILE:SCALE name; a colon inside a path, as on Windows, stays with it.

    Raises:
        AdapterError: Where there is no such file, or its scale is no finite number.
    """
    voices: list[Voice] = []
    for text in texts:
        file, colon, tail = text.rpartition(":")
        scale = 1.0
        if not colon or Path(text).exists():
            file = text
        elif Path(file).exists():
            try:
                scale = float(tail)
            except ValueError:
                scale = math.nan
            if not math.isfinite(scale):
                raise AdapterError(f"--adapter {text}: {tail!r} is no scale; a number is needed, as {file}:0.8")
        if not Path(file).exists():
            raise AdapterError(f"--adapter {text}: there is no such file; expected FILE or FILE:SCALE")
        names = {voice.name for voice in voices}
        stem = Path(file).stem
        name = next(n for n in (stem, *(f"{stem}-{i}" for i in range(2, len(texts) + 2))) if n not in names)
        voices.append(Voice(name, file, scale, _sha256(Path(file))))
    return voices


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
    for voice in recipe["adapters"]:
        if Path(voice["file"]).exists() and _sha256(Path(voice["file"])) != voice["sha256"]:
            logger.warning("%s is no longer the file that %s was drawn with", voice["file"], path)
    return recipe


def _sha256(path: Path) -> str:
    """Hash (hex) of the bytes of a file, or of all files of a folder in order of their names."""
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        digest.update(file.read_bytes())
    return digest.hexdigest()
