"""The embedded base's UNet and noise schedule and how the UNet is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from lora_vision.tiny.autoencoder import LATENT
from lora_vision.tiny.dataset import SIZE, pictures, rows_by_share
from lora_vision.tiny.stages import Run, decayed, set_rate
from lora_vision.tiny.text import new_tokenizer, tokens

BATCH = 48  # pictures in one step, over all processes


def new_unet() -> Any:
    """Returns an untrained UNet, 10.9 M parameters, its residual branches zero at the start."""
    unet: Any = UNet2DConditionModel(
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


def new_scheduler() -> Any:
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


def v_loss(unet: nn.Module, latents: Tensor, states: Tensor, scheduler: Any, draw: torch.Generator) -> Tensor:
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


def train_unet(work: Path, size: int, total: int, accelerator: Accelerator) -> None:
    """Trains the UNet on latents of pictures of this size, from its last checkpoint or the smaller size's result."""
    torch.manual_seed(4)
    rank, world = accelerator.process_index, accelerator.num_processes
    run, batch = Run(work, f"unet{size}"), BATCH // world
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
            run.note(step + 1, loss=mean / min(50, step + 1 - start))
            mean = 0.0
        if accelerator.is_main_process and (run.due() or step == total - 1):
            shadow = dict(zip(names, [p.clone() for p in ema.shadow_params], strict=True))
            run.save({"model": unet.state_dict(), "ema": shadow, "optimizer": optimizer.state_dict(), "step": step + 1})
    accelerator.wait_for_everyone()
