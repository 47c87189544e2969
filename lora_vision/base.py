"""One Stable Diffusion under one roof: its parts, whatever they were stored as, and what depends on which one it is."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers import schedulers as diffusers_schedulers
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lora_vision.config import Recipe
from lora_vision.errors import BaseModelError

logger = logging.getLogger(__name__)

Family = Literal["sd1", "sd2", "sdxl"]

EMBEDDED = {"tiny": Path(__file__).parent / "tiny" / "base"}
EXPECTED = (
    f"Stable Diffusion 1.x, 2.x or SDXL: {', '.join(EMBEDDED)}, a diffusers folder, a .safetensors checkpoint, a Hub id"
)

# What a run takes for everything the user leaves open, by kind of base.
RECIPES = {
    "tiny": Recipe(
        rank=16,
        targets="self-attention+ff+conv",
        learning_rate=3e-3,
        steps=150,
        batch_size=8,
        resolution=64,
        sample_steps=25,
        guidance=2.0,
    ),
    "sd1": Recipe(
        rank=16,
        targets="attention",
        learning_rate=1e-4,
        steps=2000,
        batch_size=1,
        resolution=512,
        sample_steps=30,
        guidance=7.5,
    ),
    "sd2": Recipe(
        rank=16,
        targets="attention",
        learning_rate=1e-4,
        steps=2000,
        batch_size=1,
        resolution=768,
        sample_steps=30,
        guidance=7.5,
    ),
    "sdxl": Recipe(
        rank=16,
        targets="attention",
        learning_rate=1e-4,
        steps=2000,
        batch_size=1,
        resolution=1024,
        sample_steps=30,
        guidance=5.0,
    ),
}


@dataclass(frozen=True)
class TextStates:
    """What the UNet is told about B captions.

    Attributes:
        states: Token states for cross-attention [B, T, C].
        pooled: SDXL's pooled caption [B, P]; None for SD 1.x and 2.x.
    """

    states: Tensor
    pooled: Tensor | None = None

    def rows(self, index: Tensor) -> TextStates:
        """The states of the captions numbered by index [B]."""
        return TextStates(self.states[index], None if self.pooled is None else self.pooled[index])

    def to(self, device: torch.device | str) -> TextStates:
        """The same states on another device."""
        return TextStates(self.states.to(device), None if self.pooled is None else self.pooled.to(device))


@dataclass(frozen=True)
class Base:
    """A loaded Stable Diffusion, every weight frozen.

    Attributes:
        parts: The modules an adapter can act on: "unet", "text_encoder" and, for SDXL, "text_encoder_2".
        vae: Pictures [-1, 1] to latents and back.
        tokenizers: A tokenizer for each text encoder, under the encoder's name.
        scheduler: Noise schedule and sampler as stored with the base.
        family: Which Stable Diffusion it is built like.
        source: What it was loaded from.
        fingerprint: Hash of its weights, the same in fp32 and fp16.
        pipeline_options: What a stock pipeline needs to know beyond the parts.
    """

    parts: dict[str, nn.Module]
    vae: Any
    tokenizers: dict[str, Any]
    scheduler: Any
    family: Family
    source: str
    fingerprint: str
    pipeline_options: Mapping[str, Any]

    @property
    def unet(self) -> Any:
        """The UNet."""
        return self.parts["unet"]

    @property
    def device(self) -> torch.device:
        """Where the UNet lies."""
        weight: Tensor = next(self.unet.parameters())
        return weight.device

    @property
    def prediction(self) -> str:
        """What the UNet predicts: "epsilon" or "v_prediction"."""
        return str(self.scheduler.config.prediction_type)

    @property
    def factor(self) -> int:
        """How many pixels one latent stands for along a side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def recipe(self) -> Recipe:
        """Training settings that suit this base: "tiny" for any UNet below 100 million weights, else its family's."""
        weights = sum(parameter.numel() for parameter in self.unet.parameters())
        return RECIPES["tiny" if weights < 100_000_000 else self.family]

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Self:
        """This base, every part of it moved."""
        for part in (*self.parts.values(), self.vae):
            part.to(device)
            if part.dtype != dtype:
                part.to(dtype)
        return self

    def pipeline(self) -> Any:
        """A stock diffusers pipeline that shares this base's modules."""
        encoders = {name: part for name, part in self.parts.items() if name != "unet"}
        tokenizers = {name.replace("text_encoder", "tokenizer"): t for name, t in self.tokenizers.items()}
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        kind: Any = StableDiffusionXLPipeline if self.family == "sdxl" else StableDiffusionPipeline
        shared = {"vae": self.vae, "unet": self.unet, "scheduler": scheduler}
        pipe = kind(**shared, **encoders, **tokenizers, **self.pipeline_options)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def encode_text(self, captions: Sequence[str]) -> TextStates:
        """Text states of the captions, as the stock pipelines compute them; gradients flow where they are enabled."""
        states, pooled = [], None
        for name, tokenizer in self.tokenizers.items():
            tokens = tokenizer(
                list(captions),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            encoder = self.parts[name]
            mask = tokens.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
            ids = tokens.input_ids.to(next(encoder.parameters()).device)
            if self.family == "sdxl":  # the last layer but one of both encoders, side by side
                output = encoder(ids, output_hidden_states=True)
                states.append(output.hidden_states[-2])
                pooled = output[0]
            else:
                states.append(encoder(ids, attention_mask=None if mask is None else mask.to(ids.device))[0])
        return TextStates(torch.cat(states, -1), pooled)

    @torch.no_grad()
    def encode_pictures(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [B, C, h, w] of the scaled latents of pixels [B, 3, H, W] in [-1, 1]."""
        posterior = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        return (posterior.mean - shift) * self.vae.config.scaling_factor, posterior.std * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] of latents [B, C, h, w] scaled for the UNet, in the VAE's own dtype."""
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        latents = latents.to(self.vae.device, self.vae.dtype) / self.vae.config.scaling_factor + shift
        pixels: Tensor = self.vae.decode(latents).sample
        return pixels.clamp(-1, 1)


def load_base(name: str | Path, *, dtype: torch.dtype = torch.float32, config: str | Path | None = None) -> Base:
    """The Stable Diffusion called `name`, in evaluation mode, frozen, on the CPU.

    Args:
        name: "tiny", a diffusers folder, a single .safetensors checkpoint of SD 1.x, 2.x or SDXL, or a Hub id.
        dtype: Of its weights.
        config: For a single checkpoint: "tiny", diffusers folder or Hub id of a model built alike, whose configuration
            and tokenizer are used. Without it diffusers recognises the kind and takes these from the Hub.

    Raises:
        BaseModelError: Where there is no such model, or it is not a Stable Diffusion.
    """
    name = str(name)
    path = EMBEDDED.get(name, Path(name).expanduser())
    if path.is_file():
        return _from_checkpoint(path, dtype, EMBEDDED.get(str(config), config))
    if not path.is_dir() and (name in EMBEDDED or path.suffix or path.is_absolute() or name.count("/") != 1):
        meant = "".join(f", did you mean {near}?" for near in difflib.get_close_matches(name, EMBEDDED, n=1))
        raise BaseModelError(f"there is no base {name!r}{meant}; expected {EXPECTED}")
    return _from_folder(str(path) if path.is_dir() else name, name, dtype)


def _from_folder(place: str, source: str, dtype: torch.dtype) -> Base:
    """The base in a diffusers folder or on the Hub."""
    try:
        index = DiffusionPipeline.load_config(place)
    except (OSError, ValueError) as error:
        found = "no readable model_index.json" if Path(place).is_dir() else f"nothing on the Hub ({_first_line(error)})"
        raise BaseModelError(f"{source} has {found}; expected {EXPECTED}") from error
    _check_index(index, source)
    has_second = index.get("text_encoder_2", (None, None))[1] is not None
    scheduler_class = getattr(diffusers_schedulers, index["scheduler"][1])
    classes: dict[str, Any] = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}
    if has_second:
        classes["text_encoder_2"] = CLIPTextModelWithProjection
    try:
        parts = {part: _load_part(kind, place, part, dtype) for part, kind in classes.items()}
        vae = _load_part(AutoencoderKL, place, "vae", dtype)
        tokenizers = {
            part: CLIPTokenizer.from_pretrained(place, subfolder=part.replace("text_encoder", "tokenizer"))
            for part in parts
            if part != "unet"
        }
        scheduler = scheduler_class.from_pretrained(place, subfolder="scheduler")
    except (OSError, ValueError, RuntimeError) as error:
        raise BaseModelError(f"{source} cannot be loaded: {_first_line(error)}; expected {EXPECTED}") from error
    zeros = index.get("force_zeros_for_empty_prompt", True)
    return _assemble(parts, vae, tokenizers, scheduler, source, zeros)


def _load_part(kind: Any, place: str, part: str, dtype: torch.dtype) -> Any:
    """One part of a diffusers folder or Hub model, from its full-precision or, failing that, its fp16 file.

    A weight that the files lack would be drawn at random and only logged: transformers before 5.6 misses a whole text
    encoder where a later one left ``text_model.`` out of the names.
    """
    dtype_option = {"dtype" if part.startswith("text") else "torch_dtype": dtype}
    options = {"subfolder": part, "output_loading_info": True, **dtype_option}
    if Path(place).is_dir() and not (Path(place) / part / "config.json").is_file():
        raise OSError(f"it has no {part}/config.json")
    try:
        model, found = kind.from_pretrained(place, **options)
    except OSError as error:
        try:
            model, found = kind.from_pretrained(place, variant="fp16", **options)
        except OSError:
            raise OSError(f"{part}: {_first_line(error)}") from error
    if missing := sorted(found["missing_keys"]):
        raise BaseModelError(f"{part} lacks {len(missing)} of its weights ({missing[0]}, ...)")
    return model


def _check_index(index: Mapping[str, Any], source: str) -> None:
    """Refuse a diffusers model whose parts are not those of a Stable Diffusion."""
    needed = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
    for part, wanted in needed.items():
        entry = index.get(part)
        found = entry[1] if isinstance(entry, list | tuple) else None
        if found != wanted:
            kind = index.get("_class_name", "an unknown pipeline")
            raise BaseModelError(
                f"{source} is not a Stable Diffusion: a {kind} whose {part} is {found or 'missing'} "
                f"(wanted {wanted}); expected {EXPECTED}"
            )


def _from_checkpoint(path: Path, dtype: torch.dtype, config: str | Path | None) -> Base:
    """The base in a single file with the original (LDM) keys; diffusers does the renaming."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise BaseModelError(f"{path} is not a safetensors file ({_first_line(error)}); expected {EXPECTED}") from error
    if not any(key.startswith("model.diffusion_model.input_blocks.") for key in keys):
        hint = "it looks like an adapter, not a model" if any("lora" in key for key in keys) else "no LDM UNet in it"
        raise BaseModelError(f"{path} is not a Stable Diffusion checkpoint ({hint}); expected {EXPECTED}")
    if any(key.startswith("conditioner.embedders.0.model.") for key in keys):
        raise BaseModelError(f"{path} is an SDXL refiner, which has one text encoder; expected the SDXL base")
    sdxl = any(key.startswith("conditioner.embedders.1.") for key in keys)
    kind = StableDiffusionXLPipeline if sdxl else StableDiffusionPipeline
    options: dict[str, Any] = (
        {} if config is None else {"config": str(config), "local_files_only": Path(config).is_dir()}
    )
    if not sdxl:
        options |= {"safety_checker": None, "feature_extractor": None}
    try:
        pipe = kind.from_single_file(str(path), torch_dtype=dtype, **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise BaseModelError(
            f"{path} cannot be loaded: {_first_line(error)}; a single file needs the configuration and tokenizer "
            "of its kind, from the Hub or from a diffusers folder of a model built alike (--base-config)"
        ) from error
    parts = {name: getattr(pipe, name) for name in ("unet", "text_encoder", "text_encoder_2") if hasattr(pipe, name)}
    tokenizers = {name: getattr(pipe, name.replace("text_encoder", "tokenizer")) for name in parts if name != "unet"}
    zeros = pipe.config.get("force_zeros_for_empty_prompt", True)
    return _assemble(parts, pipe.vae, tokenizers, pipe.scheduler, str(path), zeros)


def _assemble(
    parts: dict[str, Any], vae: Any, tokenizers: dict[str, Any], scheduler: Any, source: str, force_zeros: bool
) -> Base:
    """The checked, frozen base of these modules."""
    unet = parts["unet"]
    if unet.config.in_channels != vae.config.latent_channels:
        raise BaseModelError(
            f"{source} takes {unet.config.in_channels} latent channels and its VAE gives {vae.config.latent_channels}: "
            "an inpainting, editing or upscaling model; expected a text-to-image base"
        )
    if not hasattr(scheduler, "alphas_cumprod") or scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise BaseModelError(
            f"{source} uses {type(scheduler).__name__} predicting {scheduler.config.get('prediction_type')!r}; "
            "expected a schedule of noise levels with epsilon or v_prediction"
        )
    for module in (*parts.values(), vae):
        module.eval().requires_grad_(False)
    sdxl = unet.config.addition_embed_type == "text_time" and "text_encoder_2" in parts
    family: Family = "sdxl" if sdxl else "sd2" if unet.config.use_linear_projection else "sd1"
    options: dict[str, Any] = (
        {"force_zeros_for_empty_prompt": force_zeros, "add_watermarker": False}
        if sdxl
        else {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    )
    fingerprint = fingerprint_of({**parts, "vae": vae})
    return Base(parts, vae, tokenizers, scheduler, family, source, fingerprint, options)


def fingerprint_of(parts: Mapping[str, nn.Module], samples: int = 256) -> str:
    """Hash (hex) of the names, shapes and evenly spaced values of every weight, rounded to fp16.

    Reading samples only keeps it under a second for SDXL; a fine-tuned or merged model moves whole matrices and is
    always told apart. Rounding makes the fp16 and fp32 copies of one model equal.
    """
    digest = hashlib.sha256()
    for part, module in sorted(parts.items()):
        for name, weight in sorted(module.state_dict().items()):
            if not weight.is_floating_point():
                continue
            name = name.removeprefix("text_model.")  # transformers dropped it from some module paths in 5.6
            digest.update(json.dumps([part, name, list(weight.shape)]).encode())
            flat = weight.detach().flatten()
            chosen = flat[:: max(1, flat.numel() // samples)].to("cpu", torch.float16)
            digest.update(chosen.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    """The first line of an error's text, at most 200 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
