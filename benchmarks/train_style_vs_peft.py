"""The same style trained twice, by this library and by PEFT in a plain diffusers loop: seconds a step, both adapters.

    python benchmarks/train_style_vs_peft.py --data DIR --base tiny --output runs/versus

Same base, pictures, captions, cached latents and text states, number of steps, rank, alpha, layers, learning rate,
schedule, optimizer (fused AdamW for both), clipping and min-SNR weighting. Steps of the two alternate in one process,
so that whatever else the machine does meets both. What differs is the layer, the loop and the draws: the plain loop is
that of diffusers' train_text_to_image_lora.py (shuffled epochs, torch.randint timesteps, its min-SNR).

Writes ours.safetensors (kohya), peft.safetensors (diffusers' own save_lora_weights) and times.json into the folder;
benchmarks/style_quality.py scores the two files.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_snr
from diffusers.utils import convert_state_dict_to_diffusers
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from lora_vision import names
from lora_vision.base import Base, load_base
from lora_vision.batches import StyleBatches
from lora_vision.config import LoraConfig, StyleConfig
from lora_vision.data import read_pictures
from lora_vision.devices import make_accelerator, weight_dtype
from lora_vision.encoding import EncodedPictures, Encoding, encode
from lora_vision.files import save_adapter
from lora_vision.inject import collect, inject
from lora_vision.losses import DiffusionLoss, NoiseSchedule
from lora_vision.targets import select
from lora_vision.training import Job, Run


def ours(base: Base, pictures: EncodedPictures, config: StyleConfig) -> Callable[[], float]:
    """A function that takes the next step of our loop."""
    accelerator = make_accelerator(config)
    parameters = inject({"unet": base.unet}, lora_config(config))
    schedule = NoiseSchedule(base.scheduler)
    batches = StyleBatches(pictures, len(schedule), config.seed, accelerator.device)
    loss = DiffusionLoss(base.unet, schedule, objective=config)
    return Run(Job(loss=loss, parameters=parameters, batch=batches), config, accelerator).step


def theirs(base: Base, pictures: EncodedPictures, config: StyleConfig) -> Callable[[], float]:
    """A function that takes the next step of a plain diffusers loop over a PEFT adapter."""
    torch.manual_seed(config.seed)
    paths = names.paths("unet", base.unet)
    chosen = [paths[name] for name in select(lora_config(config).targets, names.index({"unet": base.unet}))]
    alpha = config.rank if config.alpha is None else config.alpha
    base.unet.add_adapter(peft.LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=chosen))
    parameters = [parameter for parameter in base.unet.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    accelerator = make_accelerator(config)
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    warmup = round(config.steps * config.warmup)
    rates = get_scheduler("cosine", optimizer, num_warmup_steps=warmup, num_training_steps=config.steps)
    unet, optimizer, rates = accelerator.prepare(base.unet, optimizer, rates)
    scheduler = DDPMScheduler.from_config(base.scheduler.config)
    draws = plain_batches(pictures, config, scheduler.config.num_train_timesteps, accelerator.device)

    def step() -> float:
        total = 0.0
        for _ in range(config.accumulate):
            latents, states, extra, timesteps = next(draws)
            noise = torch.randn_like(latents)
            noisy = scheduler.add_noise(latents, noise, timesteps)
            velocity = scheduler.config.prediction_type == "v_prediction"
            target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
            answer = unet(noisy, timesteps, states, added_cond_kwargs=extra, return_dict=False)[0]
            errors = F.mse_loss(answer.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
            if config.snr_gamma:
                snr = compute_snr(scheduler, timesteps)
                weights = snr.clamp(max=config.snr_gamma) / (snr + 1 if velocity else snr)
                errors = errors * weights
            loss = errors.mean() / config.accumulate
            accelerator.backward(loss)
            total += loss.item()
        accelerator.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        return total

    return step


def plain_batches(
    pictures: EncodedPictures, config: StyleConfig, timesteps: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor] | None, Tensor]]:
    """Endless latents [B, C, h, w], text states [B, T, C], SDXL's extras and timesteps [B], in shuffled passes."""
    data = torch.utils.data.TensorDataset(torch.arange(len(pictures)))
    size = min(config.batch_size, len(pictures))
    while True:
        for (index,) in torch.utils.data.DataLoader(data, size, shuffle=True, drop_last=True):
            mean, std, text = pictures.mean[index], pictures.std[index], pictures.text.rows(index).to(device)
            latents = (mean + std * torch.randn_like(mean)).to(device)
            extra = None
            if pictures.time_ids is not None:
                extra = {"text_embeds": text.pooled, "time_ids": pictures.time_ids[index].to(device)}
            yield latents, text.states, extra, torch.randint(0, timesteps, (len(index),), device=device)


def lora_config(config: StyleConfig) -> LoraConfig:
    """The layers and sizes that both sides use."""
    return LoraConfig(rank=config.rank, alpha=config.alpha, targets=config.targets, seed=config.seed)


def alternate(sides: dict[str, Callable[[], float]], steps: int, device: str) -> dict[str, list[float]]:
    """Seconds of every step of each side; they take turns, and turns at going first."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(steps):
        for name in sorted(sides, reverse=bool(number % 2)):
            start = time.perf_counter()
            loss = sides[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
            if number % 50 == 49:
                print(f"step {number + 1} {name}: loss {loss:.4f}, {statistics.median(times[name]):.4f} s a step")
    return times


def save_peft(unet: nn.Module, family: str, output: Path) -> None:
    """Write the PEFT adapter as diffusers' training scripts do."""
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    kind: Any = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    kind.save_lora_weights(output.parent, unet_lora_layers=state, weight_name=output.name)


def main() -> None:
    """Train both, print the ratio, write both adapters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of pictures")
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--output", type=Path, required=True, help="folder for the adapters and times.json")
    for name, kind in (("steps", int), ("batch-size", int), ("rank", int), ("resolution", int)):
        parser.add_argument(f"--{name}", type=kind, help="default: the base's own")
    parser.add_argument("--learning-rate", type=float, help="default: the base's own")
    parser.add_argument("--targets", help="default: the base's own")
    parser.add_argument("--alpha", type=float, help="default: the rank")
    parser.add_argument("--trigger")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", default="auto")
    given = vars(parser.parse_args())
    output: Path = given.pop("output")
    output.mkdir(parents=True, exist_ok=True)
    config = StyleConfig(output=str(output / "ours.safetensors"), sample_every=0, holdout=0.0, **given)

    accelerator = make_accelerator(config)
    dtype = weight_dtype(accelerator)
    bases = [load_base(config.base, dtype=dtype).to(accelerator.device, dtype) for _ in range(2)]
    for base in bases:
        base.vae.float()
    config = config.filled(bases[0].recipe)
    found = read_pictures(config.data, trigger=config.trigger, holdout=0.0).train
    (pictures,) = encode(bases[0], found, Encoding(resolution=config.resolution))
    sides = {"ours": ours(bases[0], pictures, config), "peft": theirs(bases[1], pictures, config)}
    times = alternate(sides, config.steps, accelerator.device.type)

    save_adapter(collect({"unet": bases[0].unet}), output / "ours.safetensors", format="kohya")
    save_peft(bases[1].unet, bases[1].family, output / "peft.safetensors")
    warm = {name: sorted(seconds[min(5, len(seconds) // 2) :]) for name, seconds in times.items()}
    medians = {name: statistics.median(seconds) for name, seconds in warm.items()}
    ratio = medians["ours"] / medians["peft"]
    result = {"seconds_per_step": medians, "fastest": {n: s[0] for n, s in warm.items()}, "ratio": ratio}
    result |= {"steps": config.steps, "batch_size": config.batch_size, "rank": config.rank, "targets": config.targets}
    (output / "times.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"ours {medians['ours']:.4f} s, PEFT {medians['peft']:.4f} s a step (medians): ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
