"""Classifiers that judge generated pictures: which style, which subject. Trained on real renderings only.

Half of the training pictures go through the base's VAE, or blur would be taken for a style. The style judge is held out
by subject, the subject judge by (subject, style) pairs; both accuracies are printed before they judge anything.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from lora_vision.tiny.dataset import packages, pictures
from lora_vision.tiny.render import draw, shrink
from lora_vision.tiny.subjects import HELD_OUT_STYLES, RENDERED_STYLES, SUBJECTS, VENDOR_STYLES

log = logging.getLogger("judges")
STYLES = (*VENDOR_STYLES, *RENDERED_STYLES, *HELD_OUT_STYLES)
NOUNS = tuple(SUBJECTS)
POSES = 5
KIN = torch.tensor([0 if style in VENDOR_STYLES else number for number, style in enumerate(STYLES)])
"""Style number -> the number it counts as: the vendors, whom 64 pixels hardly tell apart, are one style."""


class Judge(nn.Module):
    """A small convolutional classifier: pixels [B, 3, 64, 64] in [-1, 1] to logits [B, classes]."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 32), (32, 64), (64, 128), (128, 256)):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(256 * 16, classes))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.trunk(pixels))

    @torch.no_grad()
    def rank(self, pixels: Tensor) -> Tensor:
        """Returns class numbers [B, classes], the likeliest first."""
        self.eval()
        return torch.cat([self(part) for part in pixels.split(256)]).argsort(1, descending=True)


@dataclass(frozen=True)
class Judges:
    """Both classifiers and their held-out accuracy on real pictures passed through the VAE."""

    style: Judge
    subject: Judge
    style_accuracy: float
    subject_accuracy: float
    ceilings: dict[str, tuple[float, float]]
    """Style word -> (style, subject) accuracy on held-out real pictures of it passed through the VAE."""

    def scores(self, pixels: Tensor, style: str, nouns: list[str]) -> dict[str, float]:
        """Returns the shares called this style, and naming the right noun first and among five."""
        rank = self.subject.rank(pixels)
        want = torch.tensor([NOUNS.index(noun) for noun in nouns])
        hits = rank == want[:, None]
        called = KIN[self.style.rank(pixels)[:, 0]] == KIN[STYLES.index(style)]
        return {
            "style": called.float().mean().item(),
            "subject": hits[:, 0].float().mean().item(),
            "subject5": hits[:, :5].any(1).float().mean().item(),
        }


@torch.no_grad()
def through(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Returns the pictures [B, 3, H, W] as the VAE reconstructs them."""
    return torch.cat([vae.decode(vae.encode(p).latent_dist.mean).sample.clamp(-1, 1) for p in pixels.split(64)])


def real_pictures(work: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Returns bytes [N, 64, 64, 3], noun numbers [N] and style numbers [N] of real renderings in every style."""
    data, folder, jitter = pictures(work), packages(work), np.random.default_rng(11)
    cache = work / "judge_pictures.npz"
    if not cache.exists():
        drawn, nouns, styles = [], [], []
        for style in HELD_OUT_STYLES:
            for number, noun in enumerate(NOUNS):
                for _ in range(POSES):
                    picture = draw(folder, noun, style, jitter)
                    assert picture is not None
                    drawn.append(shrink(picture, 64))
                    nouns.append(number)
                    styles.append(STYLES.index(style))
        for row, (text, kind) in enumerate(zip(data.captions, data.kinds, strict=True)):
            if kind in ("plain", "rendered", "vendor") and (kind != "plain" or row % 2):
                word = text.rsplit(", ", 1)[1].split()[0] if ", " in text else "noto"
                drawn.append(data.pixels[row])
                nouns.append(int(data.nouns[row]))
                styles.append(STYLES.index(word))
        np.savez(cache, pixels=np.stack(drawn), nouns=nouns, styles=styles)
    found = np.load(cache)
    return tuple(torch.from_numpy(found[key]) for key in ("pixels", "nouns", "styles"))  # type: ignore[return-value]


def _train(pixels: Tensor, labels: Tensor, classes: int, steps: int) -> Judge:
    torch.manual_seed(21)
    judge, draw_rows = Judge(classes), torch.Generator().manual_seed(21)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(pixels), (64,), generator=draw_rows)
        batch = pixels[rows].float()
        shift = torch.randint(-3, 4, (2,), generator=draw_rows).tolist()
        batch = F.pad(batch, (4,) * 4, mode="replicate")[
            ..., 4 + shift[0] : 68 + shift[0], 4 + shift[1] : 68 + shift[1]
        ]
        F.cross_entropy(judge(batch), labels[rows], label_smoothing=0.05).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return judge


def judges(work: Path, vae: AutoencoderKL) -> Judges:
    """Returns the trained judges, cached in ``work`` under the VAE they were trained for."""
    key = f"{sum(p.double().sum().item() for p in vae.parameters()):.6f}"
    cache = work / f"judges{key}.pt"
    if not cache.exists():
        torch.save(_make(work, vae), cache)
    state = torch.load(cache, weights_only=True)
    style, subject = Judge(len(STYLES)), Judge(len(NOUNS))
    style.load_state_dict(state.pop("style"))
    subject.load_state_dict(state.pop("subject"))
    return Judges(style.eval(), subject.eval(), **state)


def _make(work: Path, vae: AutoencoderKL) -> dict[str, object]:
    shown, nouns, styles = real_pictures(work)
    pixels = (shown.permute(0, 3, 1, 2).float() / 127.5 - 1).half()
    rebuilt = torch.cat([through(vae, p.float()).half() for p in pixels.split(256)])
    held_noun = nouns % 4 == 3  # no style judge sees these nouns
    held_pair = (nouns * 7 + styles * 3) % 8 == 0  # the subject judge never sees these nouns in these styles
    both = torch.cat([pixels, rebuilt])

    def fit(labels: Tensor, held: Tensor, classes: int, steps: int) -> Judge:
        rows = (~held).repeat(2)
        return _train(both[rows], labels.repeat(2)[rows], classes, steps)

    style, subject = fit(styles, held_noun, len(STYLES), 600), fit(nouns, held_pair, len(NOUNS), 1800)
    right_style = KIN[style.rank(rebuilt.float()[held_noun])[:, 0]] == KIN[styles[held_noun]]
    right_noun = subject.rank(rebuilt.float()[held_pair])[:, 0] == nouns[held_pair]
    ceilings = {
        word: (
            right_style[styles[held_noun] == number].float().mean().item(),
            right_noun[styles[held_pair] == number].float().mean().item(),
        )
        for number, word in enumerate(STYLES)
    }
    return {
        "style": style.state_dict(),
        "subject": subject.state_dict(),
        "style_accuracy": right_style.float().mean().item(),
        "subject_accuracy": right_noun.float().mean().item(),
        "ceilings": ceilings,
    }
