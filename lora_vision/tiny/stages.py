"""One stage of making the embedded base: its log lines, its checkpoint, its learning rate."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)


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
