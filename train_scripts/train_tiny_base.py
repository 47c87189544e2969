"""Makes the embedded base: draws the pictures, trains the VAE, the text encoder and the UNet, writes the folder.

One command, from a checkout with the ``dev`` extra and npm on the path:

    python train_scripts/train_tiny_base.py --work DIR

Every stage is seeded, keeps checkpoints in DIR and resumes there; ``--stage`` runs one alone. The UNet can train in
several processes (``torchrun --nproc-per-node 2 train_scripts/train_tiny_base.py --stage unet --work DIR``).
How long it takes and what it reaches stands in ``lora_vision/tiny/README.md``.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lora_vision.tiny.dataset import SIZE, Pictures, further_pixels, packages, pictures, write_style_set
from lora_vision.tiny.subjects import HELD_OUT_STYLES, SUBJECTS

log = logging.getLogger("train_tiny_base")

LATENT = 8  # channels
TOKENS = 20
STEPS = {"vae": 3600, "text": 900, "decoder": 3000, "unet32": 1900, "unet64": 2400}
"""Optimiser steps a stage."""
BATCH = 48  # pictures in one step of the UNet, over all processes
SHARES = {"plain": 0.36, "background": 0.26, "colour": 0.12, "rendered": 0.18, "vendor": 0.08}
"""How often the UNet sees each kind of picture."""


class Run:
    """One stage's log lines and its checkpoint, written to a temporary name and renamed."""

    def __init__(self, work: Path, name: str, every: float = 120) -> None:
        self.path, self.rows, self.every = work / f"{name}.pt", work / "log.jsonl", every
        self.name, self._saved, self._started = name, time.monotonic(), time.monotonic()

    def load(self) -> dict[str, Any] | None:
        return torch.load(self.path, weights_only=True) if self.path.exists() else None

    def due(self) -> bool:
        return time.monotonic() - self._saved > self.every

    def save(self, state: dict[str, Any]) -> None:
        torch.save(state, self.path.with_suffix(".tmp"))
        os.replace(self.path.with_suffix(".tmp"), self.path)
        self._saved = time.monotonic()

    def note(self, step: int, **values: float) -> None:
        row = {"stage": self.name, "step": step, "seconds": round(time.monotonic() - self._started, 1)}
        row |= {k: round(v, 5) for k, v in values.items()}
        log.info("%s", json.dumps(row))
        with self.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")


def decayed(step: int, total: int, peak: float, warm: int = 100) -> float:
    """Returns the learning rate: a linear warm-up, then a cosine to 2 % of the peak."""
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm))))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Writes the learning rate into every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


# --- VAE -------------------------------------------------------------------------------------------------------------


def new_vae() -> AutoencoderKL:
    """Returns an untrained VAE: 64 pixels to 16 x 16 x 8 latents, 0.65 M parameters."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIZE,
        scaling_factor=1.0,
    )


def reconstruction_loss(made: Tensor, real: Tensor) -> Tensor:
    """Returns L1 + 4 MSE + 0.5 L1 of the gradients + 3 L1 of the 8 x 8 colour means; [B, 3, H, W] to a scalar."""
    gradients = (made.diff(dim=-1) - real.diff(dim=-1)).abs().mean() + (
        made.diff(dim=-2) - real.diff(dim=-2)
    ).abs().mean()
    means = (F.avg_pool2d(made, 8) - F.avg_pool2d(real, 8)).abs().mean()
    return (made - real).abs().mean() + 4 * F.mse_loss(made, real) + 0.5 * gradients + 3 * means


def colour_jitter(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Returns the pictures, half with channels permuted and some inverted, so that the VAE knows every colour."""
    out = pixels.clone()
    for row in range(len(out) // 2):
        out[row] = out[row][torch.randperm(3, generator=generator)]
        if row % 3 == 0:
            out[row] = -out[row]
    return out


def vae_batch(pool: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Returns pictures [B, 3, 32, 32] in [-1, 1]: 32-pixel crops, a quarter of them whole pictures at half size."""
    rows = torch.randint(len(pool), (size,), generator=generator)
    whole = pool[rows].permute(0, 3, 1, 2).float() / 127.5 - 1
    small = F.avg_pool2d(whole[: size // 4], 2)
    y, x = (int(v) * 4 for v in torch.randint(9, (2,), generator=generator))
    return colour_jitter(torch.cat([whole[size // 4 :, :, y : y + 32, x : x + 32], small]), generator)


def train_vae(work: Path) -> None:
    """Trains encoder and decoder on 32-pixel crops, then makes the latents zero-mean and unit-variance a channel."""
    torch.manual_seed(1)
    run, vae, generator = Run(work, "vae"), new_vae(), torch.Generator().manual_seed(1)
    pool = torch.from_numpy(np.concatenate([pictures(work).pixels[::2], further_pixels(work)]))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    start, total = 0, STEPS["vae"]
    if state := run.load():
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
        generator.manual_seed(1 + start)
    for step in range(start, total):
        set_rate(optimizer, decayed(step, total, 2e-3))
        real = vae_batch(pool, 12, generator)
        posterior = vae.encode(real).latent_dist
        made = vae.decode(posterior.sample(generator)).sample
        loss = reconstruction_loss(made, real)
        divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        (loss + 3e-4 * divergence).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 200 == 0:
            mse = F.mse_loss(made.detach().clamp(-1, 1), real) / 4
            run.note(step, loss=loss.item(), kl=divergence.item(), psnr=-10 * math.log10(mse.item()))
        if run.due() or step == total - 1:
            run.save({"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1})
    standardise(vae, pictures(work))
    vae.save_pretrained(work / "vae")


@torch.no_grad()
def standardise(vae: AutoencoderKL, data: Pictures) -> None:
    """Folds a per-channel shift and scale into the 1x1 convolutions around the latent; the reconstruction is unchanged.

    A Stable Diffusion pipeline knows one scaling factor only, and mostly white pictures put the mean far from zero.
    """
    sample = data.batch(np.arange(0, len(data.pixels), 17))
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in sample.split(64)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    into, back = vae.quant_conv, vae.post_quant_conv
    into.bias[:LATENT] = (into.bias[:LATENT] - mean) / std
    into.weight[:LATENT] /= std[:, None, None, None]
    into.bias[LATENT:] -= 2 * std.log()
    back.bias += torch.einsum("oikl,i->o", back.weight, mean)
    back.weight *= std[None, :, None, None]


def train_decoder(work: Path) -> None:
    """Trains the decoder alone on whole pictures; the latents stay, so it can run beside the UNet's training."""
    torch.manual_seed(2)
    run, vae = Run(work, "decoder"), AutoencoderKL.from_pretrained(work / "vae")
    generator = torch.Generator().manual_seed(2)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    trained = [p for p in vae.parameters() if p.requires_grad]
    pool = torch.from_numpy(np.concatenate([pictures(work).pixels, further_pixels(work)]))
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
    start, total = 0, STEPS["decoder"]
    if state := run.load():
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
        generator.manual_seed(2 + start)
    for step in range(start, total):
        set_rate(optimizer, decayed(step, total, 1e-3))
        rows = torch.randint(len(pool), (16,), generator=generator)
        real = colour_jitter(pool[rows].permute(0, 3, 1, 2).float() / 127.5 - 1, generator)
        with torch.no_grad():
            latents = vae.encode(real).latent_dist.sample(generator)
        made = vae.decode(latents).sample
        loss = reconstruction_loss(made, real)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            mse = F.mse_loss(made.detach().clamp(-1, 1), real) / 4
            run.note(step, loss=loss.item(), psnr=-10 * math.log10(mse.item()))
        if run.due() or step == total - 1:
            run.save({"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1})
    vae.save_pretrained(work / "vae-final")


# --- text encoder ----------------------------------------------------------------------------------------------------


def new_tokenizer(work: Path) -> CLIPTokenizer:
    """Returns a CLIP tokenizer whose pairs were learnt on the captions and on emoji names and tags."""
    folder = work / "tokenizer"
    if not folder.exists():
        base = packages(work).parent
        entries = json.loads((base / "emojibase-data" / "en" / "data.json").read_text(encoding="utf-8"))
        words = [w for e in entries for w in (e["label"], *e.get("tags", ()))]
        learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
        learner.pre_tokenizer = Split(Regex(r"[a-z]+|[0-9]|[^\sa-z0-9]+"), behavior="removed", invert=True)
        trainer = BpeTrainer(vocab_size=2300, min_frequency=2, end_of_word_suffix="</w>", show_progress=False)
        texts = [text.lower() for text in (*pictures(work).captions, *words) if text.isascii()]
        learner.train_from_iterator(texts, trainer)
        merges = [" ".join(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
        letters = sorted(ByteLevel.alphabet())
        pieces = [*letters, *(f"{c}</w>" for c in letters), *(m.replace(" ", "") for m in merges)]
        vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"]))}
        folder.mkdir()
        (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
        CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS).save_pretrained(
            folder
        )
    return cast(CLIPTokenizer, CLIPTokenizer.from_pretrained(folder))


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Returns an untrained CLIP text encoder, 128 wide, three layers."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            projection_dim=128,
        )
    )


def tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Returns token ids [B, 20]."""
    out = tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    return cast(Tensor, out.input_ids)


def train_text(work: Path) -> None:
    """Trains the text encoder to tell the pictures apart (InfoNCE) and to say how they look (regression of 16 px).

    Trained through the UNet alone it learns nothing in the time there is.
    """
    torch.manual_seed(3)
    run, data, tokenizer = Run(work, "text"), pictures(work), new_tokenizer(work)
    model, rng = new_text_encoder(tokenizer), np.random.default_rng(3)
    look = nn.Sequential(nn.Flatten(), nn.Linear(768, 256), nn.GELU(), nn.Linear(256, 128))
    heads = nn.ModuleDict({"pooled": nn.Linear(128, 768), "last": nn.Linear(128, 768), "look": look})
    trained = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    ids = tokens(tokenizer, data.captions)
    same = {text: i for i, text in enumerate(dict.fromkeys(data.captions))}
    group = torch.tensor([same[text] for text in data.captions])
    order, total = rows_by_share(data, rng, 64), STEPS["text"]
    for step in range(total):
        set_rate(optimizer, decayed(step, total, 1e-3))
        rows = next(order)
        small = F.avg_pool2d(data.batch(rows), 4)
        out = model(ids[rows])
        want = small.flatten(1)
        regression = F.mse_loss(heads["pooled"](out.pooler_output), want) + F.mse_loss(
            heads["last"](out.last_hidden_state[:, -1]), want
        )
        a, b = F.normalize(out.pooler_output, dim=-1), F.normalize(heads["look"](small), dim=-1)
        logits = a @ b.T * 15
        positive = (group[rows][:, None] == group[rows][None]).float()
        target = positive / positive.sum(1, keepdim=True)
        contrast = F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
        (2 * regression + 0.5 * contrast).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == total - 1:
            hits = positive.gather(1, logits.argmax(1, keepdim=True)).mean()
            run.note(step, regression=regression.item(), contrast=contrast.item(), top1=hits.item())
    model.save_pretrained(work / "text_encoder")


# --- UNet ------------------------------------------------------------------------------------------------------------


def rows_by_share(data: Pictures, rng: np.random.Generator, size: int) -> Iterator[NDArray[np.int64]]:
    """Yields row numbers [size]: kinds by ``SHARES``, and within a kind every noun equally often."""
    kinds = np.array(data.kinds)
    by_kind = {kind: np.flatnonzero(kinds == kind) for kind in SHARES}
    weights = np.zeros(len(kinds))
    for kind, rows in by_kind.items():
        counts = np.bincount(data.nouns[rows], minlength=len(SUBJECTS))
        share = 1 / counts[data.nouns[rows]]
        weights[rows] = SHARES[kind] * share / share.sum()
    while True:
        yield rng.choice(len(kinds), size, p=weights)


def new_unet() -> UNet2DConditionModel:
    """Returns an untrained UNet, 10.9 M parameters, its residual branches zero at the start."""
    unet = UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=LATENT,
        out_channels=LATENT,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
    )
    for name, module in unet.named_modules():
        if name.endswith(("conv2", "proj_out", "conv_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return unet


def new_scheduler() -> DDIMScheduler:
    """Returns the noise schedule: squared cosine, zero terminal SNR, v-prediction, trailing steps."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


@torch.no_grad()
def encoded(work: Path, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns latents [N, 8, h, w] of every picture at this size, text states [M, 20, 128], and each picture's text."""
    cache = work / f"latents{size}.pt"
    data = pictures(work)
    if not cache.exists():
        vae = AutoencoderKL.from_pretrained(work / "vae").eval()
        parts = []
        for start in range(0, len(data.pixels), 128):
            pixels = data.batch(slice(start, start + 128))
            parts.append(vae.encode(F.interpolate(pixels, size=size, mode="area")).latent_dist.mean)
        text = CLIPTextModel.from_pretrained(work / "text_encoder").eval()
        ids = tokens(new_tokenizer(work), ["", *dict.fromkeys(data.captions)])
        states = torch.cat([text(part).last_hidden_state for part in ids.split(256)])
        torch.save({"latents": torch.cat(parts).half(), "states": states}, cache)
    state = torch.load(cache, weights_only=True)
    number = {text: i for i, text in enumerate(dict.fromkeys(data.captions), start=1)}
    return state["latents"].float(), state["states"], torch.tensor([number[text] for text in data.captions])


def v_loss(unet: nn.Module, latents: Tensor, states: Tensor, scheduler: DDIMScheduler, draw: torch.Generator) -> Tensor:
    """Returns the v-prediction loss weighted by min(SNR + 1, 5) / (SNR + 1), timesteps stratified over the batch.

    Salimans & Ho, "Progressive Distillation", eq. 9 (SNR + 1), cut at 5 as Hang et al. cut SNR ("Min-SNR").
    """
    count = len(latents)
    spread = (torch.arange(count) + torch.rand(count, generator=draw)) / count
    times = (spread * 1000).long().clamp(max=999)[torch.randperm(count, generator=draw)]
    noise = torch.randn(latents.shape, generator=draw)
    noisy = scheduler.add_noise(latents, noise, times)
    target = scheduler.get_velocity(latents, noise, times)
    kept = scheduler.alphas_cumprod[times]
    weight = (5 * (1 - kept)).clamp(max=1.0)  # 1 / (SNR + 1) = 1 - alphas_cumprod
    made = unet(noisy, times, states, return_dict=False)[0]
    return cast(Tensor, (weight * (made - target).square().mean((1, 2, 3))).mean())


def train_unet(work: Path, size: int, accelerator: Accelerator) -> None:
    """Trains the UNet on latents of pictures of this size, from its last checkpoint or the smaller size's result."""
    torch.manual_seed(4)
    rank, world = accelerator.process_index, accelerator.num_processes
    run, total, batch = Run(work, f"unet{size}"), STEPS[f"unet{size}"], BATCH // world
    with accelerator.main_process_first():
        latents, states, texts = encoded(work, size)
    unet, scheduler, data = new_unet(), new_scheduler(), pictures(work)
    unet.set_attn_processor(AttnProcessor())
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    ema = EMAModel(unet.parameters(), decay=0.995, min_decay=0.9)
    start = 0
    if state := run.load():
        unet.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.shadow_params = list(state["ema"].values())
        ema.optimization_step = start = state["step"]
    elif size == SIZE:
        unet.load_state_dict(torch.load(work / "unet32.pt", weights_only=True)["ema"])
        ema = EMAModel(unet.parameters(), decay=0.995, min_decay=0.9)
    peak = 1e-3 if size < SIZE else 8e-4
    model = accelerator.prepare(unet)
    order = rows_by_share(data, np.random.default_rng([4, size, start, rank]), batch)
    draw = torch.Generator().manual_seed(4 + 1000 * start + rank)
    names, mean = [n for n, _ in unet.named_parameters()], 0.0
    for step in range(start, total):
        set_rate(optimizer, decayed(step, total, peak))
        rows = torch.from_numpy(next(order))
        dropped = torch.where(torch.rand(batch, generator=draw) < 0.1, 0, texts[rows])
        loss = v_loss(model, latents[rows], states[dropped], scheduler, draw)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        mean += loss.item()
        if accelerator.is_main_process and (step + 1) % 50 == 0:
            run.note(step + 1, loss=mean / 50)
            mean = 0.0
        if accelerator.is_main_process and (run.due() or step == total - 1):
            shadow = dict(zip(names, [p.clone() for p in ema.shadow_params], strict=True))
            run.save({"model": unet.state_dict(), "ema": shadow, "optimizer": optimizer.state_dict(), "step": step + 1})
    accelerator.wait_for_everyone()


# --- the folder ------------------------------------------------------------------------------------------------------


def assemble(work: Path, output: Path) -> StableDiffusionPipeline:
    """Writes the diffusers folder in fp16 from whatever checkpoints there are, and returns the pipeline."""
    stage = "unet64" if (work / "unet64.pt").exists() else "unet32"
    unet = new_unet()
    unet.load_state_dict(torch.load(work / f"{stage}.pt", weights_only=True)["ema"])
    vae = AutoencoderKL.from_pretrained(work / "vae")
    if (work / "decoder.pt").exists():
        vae.load_state_dict(torch.load(work / "decoder.pt", weights_only=True)["model"])
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=CLIPTextModel.from_pretrained(work / "text_encoder").half(),
        tokenizer=new_tokenizer(work),
        unet=unet.half(),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(output, safe_serialization=True)
    return pipeline


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
    stories = {
        "pictures": lambda: (pictures(options.work), further_pixels(options.work)),
        "vae": lambda: train_vae(options.work),
        "text": lambda: train_text(options.work),
        "unet32": lambda: train_unet(options.work, 32, accelerator),
        "decoder": lambda: train_decoder(options.work),
        "unet64": lambda: train_unet(options.work, 64, accelerator),
        "assemble": lambda: assemble(options.work, options.output or options.work / "base"),
    }
    stories["sets"] = lambda: [write_style_set(options.work, s, options.work / "sets" / s) for s in HELD_OUT_STYLES]
    for stage in options.stage or stages:
        stories[stage]()


if __name__ == "__main__":
    main()
