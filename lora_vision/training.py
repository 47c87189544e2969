"""The one training loop: fit(), its checkpoints, its validation."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn
from tqdm import tqdm

from lora_vision.config import FitConfig, Precision
from lora_vision.errors import LoraVisionError
from lora_vision.whole import write_whole

logger = logging.getLogger(__name__)

PATIENCE = 20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingError(LoraVisionError):
    """Training cannot start, continue or go on being useful."""


@dataclass(frozen=True)
class Job:
    """What is trained, on what.

    Attributes:
        loss: A batch in, a scalar out; holds the model.
        parameters: What the optimizer changes, in an order that is the same in every run; float32.
        batch: The training samples from a position on: batch(position, count).
        held_out: Batches to validate on.
        sample: Draws sample pictures after this many steps; must leave weights and random numbers as they are.
        folder: Where the checkpoint lies.
        identity: What a run must share with a checkpoint to continue it.
        rates: What the learning rate of each parameter is multiplied by; empty: 1 for all.
        after_step: Called after every step the optimizer has taken, and may change the parameters.
        patience: Looks at the held-out batches without an improvement after which training ends; 0 never ends it.
    """

    loss: nn.Module
    parameters: Sequence[nn.Parameter]
    batch: Callable[[int, int], Any]
    held_out: Sequence[Any] = ()
    sample: Callable[[int], None] | None = None
    folder: Path | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    rates: Sequence[float] = ()
    after_step: Callable[[], None] | None = None
    patience: int = 0


@dataclass
class History:
    """What a run has seen so far.

    Attributes:
        losses: Training loss of every step.
        validation: Held-out loss by number of steps done.
        skipped: Steps whose gradients were not finite.
    """

    losses: list[float] = field(default_factory=list)
    validation: dict[int, float] = field(default_factory=dict)
    skipped: int = 0

    @property
    def best_step(self) -> int | None:
        """The number of steps with the lowest held-out loss."""
        return min(self.validation, key=lambda step: (self.validation[step], step), default=None)


@dataclass(frozen=True)
class Fitted:
    """The outcome of fit(); the parameters hold the values after the last step.

    Attributes:
        history: Losses of the whole run.
        best: The parameters' values at history.best_step; None where nothing was validated.
        resumed: The steps done each time the run went on from its checkpoint.
        extends: The steps of the finished run that this one made longer, if it did.
    """

    history: History
    best: list[Tensor] | None
    resumed: tuple[int, ...] = ()
    extends: int | None = None


def make_accelerator(config: FitConfig, *, unused_parameters: bool = False) -> Accelerator:
    """The Accelerator for this precision and whatever `accelerate launch` has set up.

    Raises:
        TrainingError: For fp16 on a CPU.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if config.precision != "auto":
        chosen = config.precision.replace("fp32", "no")
    elif torch.cuda.is_available() and launched == "no":
        chosen = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    else:
        chosen = launched
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=unused_parameters)]
    try:
        accelerator = Accelerator(mixed_precision=chosen, kwargs_handlers=handlers)
    except ValueError as error:
        raise TrainingError(f"precision {chosen} is not possible here: {error}; use --precision fp32") from error
    if chosen == "fp16" and accelerator.device.type == "cpu":
        raise TrainingError("found precision fp16 on a CPU, which cannot train in it; use --precision fp32 or bf16")
    return accelerator


def precision_of(accelerator: Accelerator) -> Precision:
    """The precision this Accelerator computes in: "fp32", "bf16" or "fp16"."""
    return cast(Precision, accelerator.mixed_precision.replace("no", "fp32"))


def weight_dtype(accelerator: Accelerator) -> torch.dtype:
    """The dtype for frozen weights under this Accelerator's precision."""
    return DTYPES[precision_of(accelerator)]


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """The rate of step `step` (from 0) of `steps`: a linear rise over the share `warmup`, then a cosine to zero."""
    rise = max(1, round(steps * warmup))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def draws(seed: int, turn: int) -> int:
    """The seed of what one micro-batch draws from torch's own generators (dropouts): whatever was resumed, the same."""
    return int.from_bytes(blake2b(f"{seed} {turn}".encode(), digest_size=4).digest())


def fit(job: Job, config: FitConfig, accelerator: Accelerator) -> Fitted:
    """The trained job: AdamW over config.steps steps, from the job's checkpoint on if config.resume says so.

    Raises:
        TrainingError: Where the checkpoint is of another run, or gradients stay non-finite.
        ValueError: Where a parameter is not float32, or something else in the loss would be trained.
    """
    return Run(job, config, accelerator).train()


def _check_parameters(job: Job) -> None:
    """Insist on float32 parameters and a frozen rest."""
    wrong = {str(parameter.dtype) for parameter in job.parameters if parameter.dtype != torch.float32}
    if wrong or not job.parameters:
        raise ValueError(f"found {len(job.parameters)} parameters in {sorted(wrong)}; expected some, all float32")
    known = {id(parameter) for parameter in job.parameters}
    extra = [name for name, p in job.loss.named_parameters() if p.requires_grad and id(p) not in known]
    if extra or not all(parameter.requires_grad for parameter in job.parameters):
        raise ValueError(f"expected exactly the job's parameters to be trainable; found also {extra[:3]}")


def _by_rate(parameters: Sequence[nn.Parameter], rates: Sequence[float]) -> list[dict[str, Any]]:
    """The optimizer's groups: parameters with the same multiplier of the learning rate, in their order."""
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter, times in zip(parameters, rates or [1.0] * len(parameters), strict=True):
        groups.setdefault(times, []).append(parameter)
    return [{"params": members, "times": times} for times, members in groups.items()]


class Run:
    """One run on its way: parameters, optimizer, history, number of steps done."""

    def __init__(self, job: Job, config: FitConfig, accelerator: Accelerator) -> None:
        """The run at its beginning or, if config.resume says so, at its checkpoint; raises as fit() does."""
        if config.steps is None or config.batch_size is None or config.learning_rate is None:
            raise ValueError("steps, batch_size and learning_rate are open; StyleConfig.filled() sets them")
        _check_parameters(job)
        self.job, self.config, self.accelerator = job, config, accelerator
        self.steps, self.batch_size, self.rate = config.steps, config.batch_size, config.learning_rate
        self.history = History()
        self.best: list[Tensor] | None = None
        self.done = 0
        self.resumed: tuple[int, ...] = ()
        self.extends: int | None = None
        self.failures = 0
        fused = accelerator.device.type in ("cpu", "cuda")
        groups = _by_rate(job.parameters, job.rates)
        optimizer = torch.optim.AdamW(groups, lr=self.rate, weight_decay=config.weight_decay, fused=fused)
        self.model, self.optimizer = accelerator.prepare(job.loss, optimizer)
        if config.resume:
            self._load()

    def train(self) -> Fitted:
        """The outcome of all remaining steps."""
        config = self.config
        quiet = not self.accelerator.is_main_process
        smooth = math.nan
        if self.done == 0:
            self._look(sample=bool(config.sample_every))
        with tqdm(total=self.steps, initial=self.done, desc="training", unit="step", disable=quiet) as bar:
            while self.done < self.steps:
                loss = self.step()
                smooth = loss if math.isnan(smooth) else 0.95 * smooth + 0.05 * loss
                bar.set_postfix(loss=f"{smooth:.4f}", lr=f"{self.optimizer.param_groups[0]['lr']:.1e}", refresh=False)
                bar.update()
                self._look(
                    validate=self._due(config.validate_every),
                    sample=self._due(config.sample_every or 0),
                )
                if self._due(config.checkpoint_every):
                    self._save()
                if self._tired():
                    logger.info(
                        "stopped at step %d: no better held-out loss since %s", self.done, self.history.best_step
                    )
                    break
        return Fitted(self.history, self.best, self.resumed, self.extends)

    def _due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and after the last, happens now; 0 is never."""
        return bool(every) and (self.done == self.steps or self.done % every == 0)

    def _tired(self) -> bool:
        """Whether the held-out loss has not fallen for as many looks as the job's patience."""
        since = [step for step in self.history.validation if step > (self.history.best_step or 0)]
        return 0 < self.job.patience <= len(since)

    def step(self) -> float:
        """The loss of the next optimizer step over all its micro-batches, taken unless its gradients are not finite."""
        config, accelerator = self.config, self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = group["times"] * learning_rate(self.done, self.steps, self.rate, config.warmup)
        total = 0.0
        for micro in range(config.accumulate):
            turn = (self.done * config.accumulate + micro) * accelerator.num_processes + accelerator.process_index
            batch = self.job.batch(turn * self.batch_size, self.batch_size)
            torch.manual_seed(draws(config.seed, turn))
            wait = accelerator.no_sync(self.model) if micro < config.accumulate - 1 else nullcontext()
            with wait:
                loss = self.model(batch) / config.accumulate
                accelerator.backward(loss)
            total += loss.detach()
        norm = accelerator.clip_grad_norm_(self.job.parameters, config.clip or math.inf)
        finite = bool(torch.isfinite(norm))
        if finite or accelerator.scaler is not None:  # the scaler skips by itself, and must see that it should
            self.optimizer.step()
        if self.job.after_step is not None:
            self.job.after_step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        self._count(finite)
        mean = accelerator.reduce(torch.as_tensor(total), "mean") if accelerator.num_processes > 1 else total
        self.history.losses.append(float(mean))
        return float(mean)

    def _count(self, finite: bool) -> None:
        """Count the steps that had to be skipped, and give up after many in a row."""
        self.failures = 0 if finite else self.failures + 1
        self.history.skipped += not finite
        if self.failures == PATIENCE:
            raise TrainingError(
                f"gradients were not finite in {PATIENCE} steps up to step {self.done}; lower --learning-rate "
                f"(now {self.rate:g}) or use --precision fp32"
            )
        if not finite:
            logger.warning("step %d skipped: its gradients are not finite", self.done)

    def _look(self, *, validate: bool = False, sample: bool = False) -> None:
        """Validate and draw samples, changing neither weights nor random numbers."""
        if validate and self.job.held_out:
            self.history.validation[self.done] = self._validate()
            if self.history.best_step == self.done:
                self.best = [parameter.detach().clone() for parameter in self.job.parameters]
        if sample and self.job.sample is not None and self.accelerator.is_main_process:
            with torch.random.fork_rng(), torch.no_grad():
                self.job.sample(self.done)

    @torch.no_grad()
    def _validate(self) -> float:
        """The mean loss over the held-out batches."""
        model = self.accelerator.unwrap_model(self.model)
        sizes = [len(batch) for batch in self.job.held_out]
        losses = [float(model(batch)) for batch in self.job.held_out]
        return sum(size * loss for size, loss in zip(sizes, losses, strict=True)) / sum(sizes)

    @property
    def _path(self) -> Path | None:
        return None if self.job.folder is None else self.job.folder / "checkpoint.pt"

    def _save(self) -> None:
        """Write everything needed to continue, so that there is always one whole checkpoint."""
        if self._path is None or not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        state = {
            "identity": dict(self.job.identity),
            "done": self.done,
            "steps": self.steps,
            "resumed": list(self.resumed),
            "extends": self.extends,
            "history": asdict(self.history),
            "parameters": [parameter.detach() for parameter in self.job.parameters],
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        content = BytesIO()
        torch.save(state, content)
        write_whole(self._path, content.getvalue())

    def _load(self) -> None:
        """Continue from the checkpoint, if there is one."""
        if self._path is None or not self._path.is_file():
            logger.warning("no checkpoint in %s: starting from the beginning", self.job.folder)
            return
        state = torch.load(self._path, map_location="cpu", weights_only=True)
        mine, theirs = dict(self.job.identity), state["identity"]
        changed = [name for name in sorted(mine | theirs) if mine.get(name) != theirs.get(name)]
        if changed:
            was = ", ".join(f"{name} {theirs.get(name)!r} (now {mine.get(name)!r})" for name in changed)
            raise TrainingError(f"{self._path} is of another run: {was}; use its settings, or start without --resume")
        with torch.no_grad():
            for parameter, value in zip(self.job.parameters, state["parameters"], strict=True):
                parameter.copy_(value)
        if state["best"] is not None:
            self.best = [value.to(self.accelerator.device) for value in state["best"]]
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.history = History(**state["history"])
        self.done = state["done"]
        self.resumed = (*state.get("resumed", ()), self.done)
        self.extends = self.done if state.get("steps") == self.done < self.steps else state.get("extends")
