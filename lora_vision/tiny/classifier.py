"""The embedded ViT: the drawings it is pretrained on, the model, its pretraining, and the folder that is shipped."""

from __future__ import annotations

import json
import logging
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import ViTConfig, ViTForImageClassification

from lora_vision.names import classic
from lora_vision.tiny.dataset import SIZE, packages
from lora_vision.tiny.render import Array, Icons, icons, outlines
from lora_vision.tiny.stages import Run, set_rate

log = logging.getLogger(__name__)

VENDORS = ("noto", "noto-v1", "fluent-emoji-flat", "fluent-emoji", "fluent-emoji-high-contrast")
"""Icon packages whose drawings the ViT sees, all Apache-2.0 or MIT."""
GROUPS = (3, 4, 5, 6, 7)
"""Emojibase groups: animals and nature, food, travel, activities, objects; faces and people are too alike."""
LEFT_OUT = re.compile(r"o-?clock|thirty")
HELD_OUT = 8
"""Every so many subjects, the flat drawing is kept out of the pretraining, to measure on."""
BATCH = 32
KEPT = 28
"""Patches a picture shows in most of the pretraining, drawn by how much there is to see: twice as fast."""
DECAY = 0.15
"""Share of the steps at the end in which the rate falls to zero and pictures are seen whole."""
RATE = 1e-3
PREPROCESSING = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": SIZE, "width": SIZE},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
"""What `preprocessor_config.json` says: bicubic to 64 x 64, pixels to [-1, 1]."""


@dataclass(frozen=True)
class Drawings:
    """Drawings RGBA [N, 64, 64, 4] as bytes, colours multiplied by alpha; numbers of their subjects; names of these.

    ``held_out`` [N] marks the drawings that are measured on.
    """

    pixels: NDArray[np.uint8]
    subjects: NDArray[np.int64]
    held_out: NDArray[np.bool_]
    names: list[str]


def subjects(folder: Path) -> list[str]:
    """Returns the icon names that three of the five packages know, in emojibase's order."""
    entries = json.loads((folder.parent / "emojibase-data" / "en" / "data.json").read_text(encoding="utf-8"))
    found: dict[str, None] = {}
    for entry in entries:
        name = re.sub(r"[^a-z0-9]+", "-", entry["label"].lower()).strip("-")
        known = sum(name in icons(folder, vendor) for vendor in VENDORS)
        if entry.get("group") in GROUPS and known >= 3 and not LEFT_OUT.search(name):
            found[name] = None
    return list(found)


def _shrunk(rgba: Array) -> NDArray[np.uint8]:
    """The drawing with its colours multiplied by alpha, 64 pixels a side."""
    straight = np.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], -1)
    planes = [Image.fromarray((p * 255).round().astype(np.uint8)) for p in np.moveaxis(straight.clip(0, 1), -1, 0)]
    return np.stack([np.asarray(p.resize((SIZE, SIZE), Image.Resampling.BOX)) for p in planes], -1)


def _lines(rgba: Array) -> Array:
    """The drawing's contours alone, dark, as RGBA."""
    lines = outlines(rgba)[..., None]
    return np.concatenate([np.full_like(rgba[..., :3], 0.15), lines], -1)


def drawings(work: Path) -> Drawings:
    """Returns every drawing of every subject, and the contours of Noto's; rendered once and cached in ``work``."""
    cache = work / "drawings.npz"
    if not cache.exists():
        folder = packages(work)
        names = subjects(folder)
        pixels, numbers, held_out = [], [], []
        for number, name in enumerate(tqdm(names, desc="drawing")):
            for vendor in VENDORS:
                source: Icons = icons(folder, vendor)
                if name not in source:
                    continue
                rgba = source.draw(name)
                views = [rgba, _lines(rgba)] if vendor == "noto" else [rgba]
                for view in views:
                    pixels.append(_shrunk(view))
                    numbers.append(number)
                    held_out.append(vendor == "fluent-emoji-flat" and number % HELD_OUT == 0)
        np.savez(cache, pixels=np.stack(pixels), subjects=numbers, held_out=held_out, names=names)
        log.info("rendered %d drawings of %d subjects", len(pixels), len(names))
    data = np.load(cache)
    return Drawings(data["pixels"], data["subjects"], data["held_out"], data["names"].tolist())


def new_vit(names: list[str]) -> Any:
    """Returns an untrained ViT: 64 pixels, patches of 8, 192 wide, 6 layers, a head for these names.

    Xavier's weights and places as waves, not the library's small noise, which learns too slowly for so short a run.
    """
    kind: Any = ViTForImageClassification
    config = ViTConfig(
        image_size=SIZE,
        patch_size=8,
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label={number: name.replace("-", " ") for number, name in enumerate(names)},
        label2id={name.replace("-", " "): number for number, name in enumerate(names)},
    )
    model = kind(config)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.classifier:
            nn.init.xavier_uniform_(module.weight)
    patches = model.vit.embeddings.patch_embeddings.projection.weight
    nn.init.xavier_uniform_(patches.view(len(patches), -1))
    with torch.no_grad():
        model.vit.embeddings.position_embeddings[0, 1:] = places(SIZE // 8, config.hidden_size)
    return model


def places(side: int, width: int) -> Tensor:
    """Returns where each patch is [side * side, width]: sines and cosines of row and column (Vaswani et al. 2017)."""
    rates = 10000 ** (-torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    return torch.cat([rows, columns], -1).flatten(0, 1)


def composed(rgba: Tensor, grounds: Tensor) -> Tensor:
    """Returns drawings [B, 4, H, W] in [0, 1] on plain grounds [B, 3], as pixels [B, 3, H, W] in [-1, 1]."""
    return (rgba[:, :3] + grounds[:, :, None, None] * (1 - rgba[:, 3:])) * 2 - 1


def augmented(rgba: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns drawings [B, 4, 64, 64] moved and recoloured, as pixels [B, 3, 64, 64] in [-1, 1], and thumbnails.

    The thumbnails [B, 4 * 16 * 16] show each drawing as it was, mirrored where that was; about unit variance.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(rgba), *shape, generator=generator)

    angle, zoom = uniform(-0.12, 0.12), uniform(0.9, 1.15)
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    rows = [
        torch.stack([cos * mirror, -sin, uniform(-0.08, 0.08)], 1),
        torch.stack([sin * mirror, cos, uniform(-0.08, 0.08)], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), [len(rgba), 4, SIZE, SIZE], align_corners=False)
    moved = F.grid_sample(rgba, grid, align_corners=False)
    plain = torch.where(uniform(0, 1, 1) < 0.5, 1.0, 0.0).expand(-1, 3)
    pixels = composed(moved, torch.where(uniform(0, 1, 1) < 0.7, plain, uniform(0, 1, 3)))
    grey = pixels.mean(1, keepdim=True)
    pixels = torch.lerp(
        grey.expand_as(pixels), pixels, torch.where(uniform(0, 1) < 0.2, 0.0, uniform(0.7, 1.2))[:, None, None, None]
    )
    hue = torch.linalg.qr(torch.eye(3) + 0.1 * torch.randn(len(rgba), 3, 3, generator=generator)).Q
    hue = hue * hue.diagonal(dim1=1, dim2=2).sign()[:, None, :]
    pixels = torch.einsum("bij,bjhw->bihw", hue, pixels)
    sign = torch.where(uniform(0, 1) < 0.04, -1.0, 1.0)
    pixels = pixels * (sign * uniform(0.8, 1.1))[:, None, None, None] + uniform(-0.1, 0.1, 1, 1, 1)
    if float(torch.rand((), generator=generator)) < 0.25:
        side = int(torch.randint(24, 48, (), generator=generator))
        pixels = F.interpolate(F.interpolate(pixels, (side, side), mode="area"), (SIZE, SIZE), mode="bilinear")
    small = F.avg_pool2d(rgba, 4)
    small = torch.where((mirror < 0)[:, None, None, None], small.flip(-1), small)
    noise = 0.02 * torch.randn(pixels.shape, generator=generator)
    return (pixels + noise).clamp(-1, 1), (small.flatten(1) - 0.3) / 0.35


def telling_patches(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Returns the numbers [B, KEPT] of patches drawn without replacement, in proportion to their variance (Gumbel)."""
    variance = (F.avg_pool2d(pixels.square(), 8) - F.avg_pool2d(pixels, 8).square()).mean(1).flatten(1)
    noise = -torch.rand(variance.shape, generator=generator).clamp_min(1e-9).log()
    return ((variance + 0.01).log() - noise.log()).topk(KEPT, dim=1).indices


def states_of(model: Any, pixels: Tensor, kept: Tensor | None = None) -> Tensor:
    """Returns the last states [B, 1 + K, width], of the patches numbered by kept [B, K] only if given."""
    states: Tensor = model.vit.embeddings(pixels)
    if kept is not None:
        rows = kept[..., None].expand(-1, -1, states.shape[-1])
        states = torch.cat([states[:, :1], states[:, 1:].gather(1, rows)], 1)
    for layer in model.vit.layers:
        states = layer(states)
    last: Tensor = model.vit.layernorm(states)
    return last


class Guide(nn.Module):
    """Heads that only help the pretraining: names from the mean patch, the drawing's thumbnail from the first token.

    By names alone the loss of 820 subjects stood still for the first 13,000 pictures.
    """

    def __init__(self, width: int, names: int) -> None:
        super().__init__()
        self.names, self.thumbnail = nn.Linear(width, names), nn.Linear(width, 4 * 16 * 16)

    def forward(self, states: Tensor, labels: Tensor, thumbnails: Tensor) -> Tensor:
        """The loss of both."""
        named = F.cross_entropy(self.names(states[:, 1:].mean(1)), labels, label_smoothing=0.1)
        return 0.5 * named + F.mse_loss(self.thumbnail(states[:, 0]), thumbnails)


def rate(step: int, total: int) -> float:
    """Returns the learning rate: a short rise, a long plateau, a linear fall; only the fall depends on ``total``."""
    start = round(total * (1 - DECAY))
    return RATE * min((step + 1) / 100, 1.0, (total - step) / max(1, total - start))


def train_vit(work: Path, total: int) -> None:
    """Trains the ViT to name the subjects; keeps its checkpoint and its log in ``work`` and continues from there."""
    torch.manual_seed(3)
    data = drawings(work)
    run, model, generator = Run(work, "vit"), new_vit(data.names), torch.Generator()
    guide = Guide(model.config.hidden_size, len(data.names))
    learning = [*model.parameters(), *guide.parameters()]
    decaying, others = ([p for p in learning if (p.dim() > 1) == wide] for wide in (True, False))
    groups = [{"params": decaying, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), fused=True)
    start, spent = 0, 0.0
    if state := run.load():
        model.load_state_dict(state["model"])
        guide.load_state_dict(state["guide"])
        optimizer.load_state_dict(state["optimizer"])
        start, spent = state["step"], state["spent"]
    pool = torch.from_numpy(data.pixels[~data.held_out]).permute(0, 3, 1, 2)
    labels = torch.from_numpy(data.subjects[~data.held_out])
    began, sums = time.process_time(), torch.zeros(4)
    model.train()
    for step in range(start, total):
        generator.manual_seed(step)
        set_rate(optimizer, rate(step, total))
        rows = torch.randint(len(pool), (BATCH,), generator=generator)
        pixels, thumbnails = augmented(pool[rows].float() / 255, generator)
        whole = step >= round(total * (1 - DECAY))
        kept = None if whole else telling_patches(pixels, generator)
        states = states_of(model, pixels, kept)
        logits = model.classifier(states[:, 0])
        loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.1)
        guidance = guide(states, labels[rows], thumbnails)
        (loss + guidance).backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        right = (logits.argmax(1) == labels[rows]).float().mean()
        sums += torch.stack([loss.detach(), guidance.detach(), right, torch.ones(())])
        if (step + 1) % 200 == 0 or step == total - 1:
            means = dict(zip(("loss", "guidance", "top1"), (sums[:3] / sums[3]).tolist(), strict=True))
            seconds = spent + time.process_time() - began
            run.note(step + 1, **means, held_out=held_out_accuracy(model, data), cpu=seconds)
            sums.zero_()
        if run.due() or step == total - 1:
            state = {"model": model.state_dict(), "guide": guide.state_dict(), "optimizer": optimizer.state_dict()}
            run.save({**state, "step": step + 1, "spent": spent + time.process_time() - began})


@torch.no_grad()
def held_out_accuracy(model: Any, data: Drawings) -> float:
    """Returns the share of the held-out drawings, on white, that the model names rightly."""
    model.eval()
    rgba = torch.from_numpy(data.pixels[data.held_out]).permute(0, 3, 1, 2).float() / 255
    labels = torch.from_numpy(data.subjects[data.held_out])
    answers = torch.cat([model(part).logits.argmax(1) for part in composed(rgba, torch.ones(len(rgba), 3)).split(64)])
    model.train()
    return float((answers == labels).float().mean())


def write_vit(work: Path, output: Path) -> None:
    """Writes the folder that is shipped: weights in fp16 under the names of checkpoints, and the preprocessing."""
    data = drawings(work)
    model = new_vit(data.names)
    model.load_state_dict(torch.load(work / "vit.pt", weights_only=True)["model"])
    model.half().save_pretrained(output)
    (output / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING, indent=2) + "\n")
    file = output / "model.safetensors"
    weights = {}
    for name, weight in load_file(file).items():
        path, _, leaf = name.rpartition(".")
        inside = path.startswith("vit.")
        weights[f"vit.{classic('vit', path)}.{leaf}" if inside and path.startswith("vit.layers") else name] = weight
    save_file(weights, file, {"format": "pt"})
