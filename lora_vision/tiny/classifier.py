"""The embedded ViT: the model, the teacher it learns from, its pretraining, and the folder that is shipped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from lora_vision.names import classic
from lora_vision.tiny.dataset import SIZE
from lora_vision.tiny.drawings import Drawings, augmented, composed, drawings
from lora_vision.tiny.stages import Run, set_rate

BATCH = 32
KEPT = 28
"""Patches a picture shows in most of the pretraining, drawn by how much there is to see: twice as fast."""
DECAY = 0.15
"""Share of the steps at the end in which the rate falls to zero and pictures are seen whole."""
RATE = 1.5e-3
SHOWN = 50.0
"""What the teacher shows of each patch counts so many times as much as names at first, a tenth of it at last: it is
learnt at once, where names alone are noise to a transformer that sees nothing yet."""
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


class Teacher(nn.Module):
    """A convolutional network that learns the names first, and then shows the ViT what it sees where.

    A ViT that saw only names stood still for its first 19,000 pictures (training top-1 0.003); a teacher with
    convolutions makes up for the few pictures (DeiT, Touvron et al. 2021).
    """

    WIDTH = 256

    def __init__(self, names: int) -> None:
        super().__init__()

        def block(before: int, after: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]

        widths = ((3, 32, 2), (32, 64, 2), (64, 160, 2), (160, self.WIDTH, 1))
        self.grid = nn.Sequential(*(layer for width in widths for layer in block(*width)))
        self.top = nn.Sequential(*block(self.WIDTH, 256, 2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(256 * 16, names))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, names] and what each patch of 8 x 8 pixels shows [B, 64, WIDTH], of pixels [B, 3, 64, 64]."""
        grid: Tensor = self.grid(pixels)
        return self.top(grid), grid.flatten(2).transpose(1, 2)


def train_teacher(work: Path, data: Drawings, total: int) -> Teacher:
    """Returns the teacher, trained to name the subjects; checkpoint and log lie in ``work``."""
    torch.manual_seed(3)
    run, generator = Run(work, "teacher"), torch.Generator()
    teacher = Teacher(len(data.names))
    cast(Any, teacher).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=total, pct_start=0.1)
    start = 0
    if state := run.load():
        teacher.load_state_dict(state["model"])
        if (start := state["step"]) < total:
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
    pool, labels = data.training()
    losses: list[float] = []
    for step in range(start, total):
        generator.manual_seed(step)
        rows = torch.randint(len(pool), (2 * BATCH,), generator=generator)
        pixels = augmented(pool[rows].float() / 255, generator).to(memory_format=torch.channels_last)
        loss = F.cross_entropy(teacher(pixels)[0], labels[rows], label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 200 == 0 or step == total - 1:
            held_out = held_out_accuracy(lambda x: teacher(x)[0], teacher, data)
            run.note(step + 1, loss=sum(losses) / len(losses), held_out=held_out)
            losses.clear()
        if run.due() or step == total - 1:
            state = {"model": teacher.state_dict(), "optimizer": optimizer.state_dict()}
            run.save({**state, "schedule": schedule.state_dict(), "step": step + 1})
    teacher.eval().requires_grad_(False)
    return teacher


class Lesson(nn.Module):
    """What the ViT is taught: the names, the teacher's opinion of them, and what the teacher sees in each patch."""

    def __init__(self, teacher: Teacher, width: int) -> None:
        super().__init__()
        self.patches = nn.Linear(width, teacher.WIDTH)
        self._teacher = [teacher]  # a list: its weights are not this module's

    def forward(self, logits: Tensor, states: Tensor, labels: Tensor, pixels: Tensor, kept: Tensor | None) -> Tensor:
        """The losses [3] of names, opinion and patches."""
        with torch.no_grad():
            opinion, seen = self._teacher[0](pixels.to(memory_format=torch.channels_last))
            if kept is not None:
                seen = seen.gather(1, kept[..., None].expand(-1, -1, seen.shape[-1]))
            seen = (seen - seen.mean((0, 1))) / (seen.std((0, 1)) + 1e-3)
        named = F.cross_entropy(logits, labels, label_smoothing=0.1)
        shown = F.mse_loss(self.patches(states[:, 1:]), seen)
        return torch.stack([named, F.cross_entropy(logits, opinion.softmax(1)), shown])


def rate(step: int, total: int) -> float:
    """Returns the learning rate: a short rise, a long plateau, a linear fall."""
    start = round(total * (1 - DECAY))
    return RATE * min((step + 1) / 200, 1.0, (total - step) / max(1, total - start))


def train_vit(work: Path, total: int, lessons: int) -> None:
    """Trains the teacher for ``lessons`` steps, then the ViT for ``total``.

    Checkpoints and the log lie in ``work``; it continues from there.
    """
    data = drawings(work)
    teacher = train_teacher(work, data, lessons)
    torch.manual_seed(3)
    run, model, generator = Run(work, "vit"), new_vit(data.names), torch.Generator()
    lesson = Lesson(teacher, model.config.hidden_size)
    learning = [*model.parameters(), *lesson.parameters()]
    decaying, others = ([p for p in learning if (p.dim() > 1) == wide] for wide in (True, False))
    groups = [{"params": decaying, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), fused=True)
    start, spent = 0, 0.0
    if state := run.load():
        model.load_state_dict(state["model"])
        lesson.load_state_dict(state["lesson"])
        optimizer.load_state_dict(state["optimizer"])
        start, spent = state["step"], state["spent"]
    pool, labels = data.training()
    began, sums = time.process_time(), torch.zeros(5)
    model.train()
    for step in range(start, total):
        generator.manual_seed(step)
        set_rate(optimizer, rate(step, total))
        rows = torch.randint(len(pool), (BATCH,), generator=generator)
        pixels = augmented(pool[rows].float() / 255, generator)
        whole = step >= round(total * (1 - DECAY))
        kept = None if whole else telling_patches(pixels, generator)
        states = states_of(model, pixels, kept)
        logits = model.classifier(states[:, 0])
        losses = lesson(logits, states, labels[rows], pixels, kept)
        weight = SHOWN * max(0.1, 1 - step / (total * (1 - DECAY)))
        (losses[:2].sum() + weight * losses[2]).backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        right = (logits.argmax(1) == labels[rows]).float().mean()
        sums += torch.cat([losses.detach(), torch.stack([right, torch.ones(())])])
        if (step + 1) % 200 == 0 or step == total - 1:
            means = dict(zip(("loss", "opinion", "patches", "top1"), (sums[:4] / sums[4]).tolist(), strict=True))
            held_out = held_out_accuracy(lambda x: model(x).logits, model, data)
            run.note(step + 1, **means, held_out=held_out, cpu=spent + time.process_time() - began)
            sums.zero_()
        if run.due() or step == total - 1:
            state = {"model": model.state_dict(), "lesson": lesson.state_dict(), "optimizer": optimizer.state_dict()}
            run.save({**state, "step": step + 1, "spent": spent + time.process_time() - began})


@torch.no_grad()
def held_out_accuracy(answer: Callable[[Tensor], Tensor], model: nn.Module, data: Drawings) -> float:
    """Returns the share of the held-out drawings, on white, that the model names rightly."""
    model.eval()
    rgba = torch.from_numpy(data.pixels[data.held_out]).permute(0, 3, 1, 2).float() / 255
    labels = torch.from_numpy(data.subjects[data.held_out])
    answers = torch.cat([answer(part).argmax(1) for part in composed(rgba, torch.ones(len(rgba), 3)).split(64)])
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
