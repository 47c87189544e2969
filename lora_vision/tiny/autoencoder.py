"""The embedded base's VAE and how it is trained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from lora_vision.tiny.dataset import SIZE, Pictures, further_pixels, pictures
from lora_vision.tiny.stages import Run, decayed, set_rate

LATENT = 8  # channels


def new_vae() -> Any:
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


def palette_jitter(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Returns the pictures [B, 3, H, W], half of them in another palette: a random linear map of their colours."""
    half = len(pixels) // 2
    maps = torch.linalg.qr(torch.randn(half, 3, 3, generator=generator)).Q
    strength = 0.8 + torch.rand(half, 1, 1, 1, generator=generator)
    ground = 0.4 * torch.rand(half, 3, 1, 1, generator=generator) - 0.2
    mapped = torch.einsum("bij,bjhw->bihw", maps, pixels[:half]) * strength + ground
    return torch.cat([mapped.clamp(-1, 1), pixels[half:]])


def vae_batch(pool: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Returns pictures [B, 3, 32, 32] in [-1, 1]: 32-pixel crops, a quarter of them whole pictures at half size."""
    rows = torch.randint(len(pool), (size,), generator=generator)
    whole = pool[rows].permute(0, 3, 1, 2).float() / 127.5 - 1
    small = F.avg_pool2d(whole[: size // 4], 2)
    y, x = (int(v) * 4 for v in torch.randint(9, (2,), generator=generator))
    return colour_jitter(torch.cat([whole[size // 4 :, :, y : y + 32, x : x + 32], small]), generator)


def train_vae(work: Path, total: int) -> None:
    """Trains encoder and decoder on 32-pixel crops, then makes the latents zero-mean and unit-variance a channel."""
    torch.manual_seed(1)
    run, vae, generator = Run(work, "vae"), new_vae(), torch.Generator().manual_seed(1)
    pool = torch.from_numpy(np.concatenate([pictures(work).pixels[::2], further_pixels(work)]))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    start = 0
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
def standardise(vae: Any, data: Pictures) -> None:
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


def train_decoder(work: Path, total: int) -> None:
    """Trains the decoder alone on whole pictures; the latents stay, so it can run beside the UNet's training."""
    torch.manual_seed(2)
    run, vae = Run(work, "decoder"), AutoencoderKL.from_pretrained(work / "vae")
    generator = torch.Generator().manual_seed(2)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    trained = [p for p in vae.parameters() if p.requires_grad]
    data = pictures(work)
    outlined = np.array([kind == "rendered" for kind in data.kinds])  # thin lines are the hardest: seen three times
    parts = [data.pixels, data.pixels[outlined], data.pixels[outlined], further_pixels(work)]
    pool = torch.from_numpy(np.concatenate(parts))
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
    start = 0
    if state := run.load():
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
        generator.manual_seed(2 + start)
    for step in range(start, total):
        set_rate(optimizer, decayed(step, total, 1e-3))
        rows = torch.randint(len(pool), (16,), generator=generator)
        real = palette_jitter(pool[rows].permute(0, 3, 1, 2).float() / 127.5 - 1, generator)
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
