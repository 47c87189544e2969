"""The one training loop: fit(), its checkpoints, its validation.

Three sets of weights are told apart: those that learn; those that are looked at and kept, which a running mean (EMA) or
a schedule-free optimizer makes of them; and the best of the latter on held-out batches.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from tqdm import tqdm

from lora_vision.config import FitConfig
from lora_vision.devices import average, check_whole, gather, is_sharded, share_out
from lora_vision.optimizers import TrainingError, by_rate, learning_rate, make_optimizer
from lora_vision.whole import write_whole

logger = logging.getLogger(__name__)

PATIENCE = 20


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
        """The number of steps with the lowest held-out loss that is a number."""
        finite = {step: loss for step, loss in self.validation.items() if math.isfinite(loss)}
        return min(finite, key=lambda step: (finite[step], step), default=None)


@dataclass(frozen=True)
class Fitted:
    """The outcome of fit(); the parameters hold the values to keep after the last step.

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

    def numbers(self) -> dict[str, Any]:
        """The run's numbers for JSON, which knows no NaN: a loss that is none is null."""
        seen = self.history
        return {
            "losses": [loss if math.isfinite(loss) else None for loss in seen.losses],
            "validation": {step: loss if math.isfinite(loss) else None for step, loss in seen.validation.items()},
            "skipped": seen.skipped,
            "best_step": seen.best_step,
            "resumed": list(self.resumed),
        }


def draws(seed: int, turn: int, part: int) -> int:
    """The seed of what a part of a micro-batch draws from torch's own generators (dropouts), in any resumed run too."""
    return int.from_bytes(blake2b(f"{seed} {turn} {part}".encode(), digest_size=4).digest())


def cut(batch: Any, rows: slice) -> Any:
    """Those rows of a batch: of every tensor and tuple in it, and in the dataclasses in it."""
    if isinstance(batch, Tensor | tuple):
        return batch[rows]
    if is_dataclass(batch) and not isinstance(batch, type):
        return replace(batch, **{each.name: cut(getattr(batch, each.name), rows) for each in fields(batch)})
    return batch


def fit(job: Job, config: FitConfig, accelerator: Accelerator) -> Fitted:
    """The trained job: config.steps steps, from the job's checkpoint on if config.resume says so.

    Raises:
        TrainingError: Where the checkpoint is of another run, gradients stay non-finite, or memory runs out.
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
        self.parts = 1
        optimizer = make_optimizer(by_rate(job.parameters, job.rates), config, accelerator.device)
        self.sharded = is_sharded(accelerator)
        if self.sharded:
            share_out(accelerator, job.parameters)
        self.model, self.optimizer = accelerator.prepare(job.loss, optimizer)
        if self.sharded:
            check_whole(self.model, job.parameters)
        self.optimizer.train()  # schedule-free wants to be told
        self.mean = [each.detach().clone() for each in job.parameters] if config.ema else None
        if config.resume:
            self._load()
        if accelerator.log_with:
            accelerator.init_trackers("tracked")

    def train(self) -> Fitted:
        """The outcome of all remaining steps."""
        config = self.config
        quiet = not self.accelerator.is_main_process
        smooth = math.nan
        if self.sharded:  # FSDP wants the first forward to be the whole model's, not that of a sample picture
            with torch.no_grad():
                self.model(self.job.batch(0, 1))
        if self.done > self.steps:
            logger.info("%d steps are done already, more than the %d asked for", self.done, self.steps)
        if self.done == 0:
            self._look(sample=bool(config.sample_every))
        with tqdm(total=self.steps, initial=self.done, desc="training", unit="step", disable=quiet) as bar:
            while not self._over():
                loss = self.step()
                smooth = loss if math.isnan(smooth) else 0.95 * smooth + 0.05 * loss
                bar.set_postfix(loss=f"{smooth:.4f}", lr=f"{self.optimizer.param_groups[0]['lr']:.1e}", refresh=False)
                bar.update()
                self._look(validate=self._due(config.validate_every))
                self._look(sample=self._due(config.sample_every or 0))
                if self._due(config.checkpoint_every):
                    self._save()
        if self.done < self.steps:
            logger.info("stopped at step %d: no better held-out loss since %s", self.done, self.history.best_step)
        self._average()
        self._gather(True)
        for tracker in self.accelerator.trackers:
            tracker.finish()
        return Fitted(self.history, self.best, self.resumed, self.extends)

    def _due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and after the last, happens now; 0 is never."""
        return bool(every) and (self._over() or self.done % every == 0)

    def _over(self) -> bool:
        """Whether all steps are done, or the held-out loss has not fallen for as many looks as the job's patience."""
        since = [step for step in self.history.validation if step > (self.history.best_step or 0)]
        return self.done >= self.steps or 0 < self.job.patience <= len(since)

    def step(self) -> float:
        """The loss of the next optimizer step over all its micro-batches, taken unless its gradients are not finite."""
        config, accelerator = self.config, self.accelerator
        rate = learning_rate(
            self.done, self.steps, self.rate, config.warmup, falling=config.optimizer != "schedulefree"
        )
        for group in self.optimizer.param_groups:
            group["lr"] = group["times"] * rate
        while (total := self._gradients()) is None:
            self.optimizer.zero_grad(set_to_none=True)
            clear_device_cache(garbage_collection=True)
        if self.sharded:
            average(accelerator, self.job.parameters)
        norm = accelerator.clip_grad_norm_(self.job.parameters, config.clip or math.inf)
        finite = bool(torch.isfinite(norm))
        if finite or accelerator.scaler is not None:  # the scaler skips by itself, and must see that it should
            self.optimizer.step()
        if self.job.after_step is not None:
            self.job.after_step()
        if self.mean is not None:
            decay = min(config.ema, (1 + self.done) / (10 + self.done))  # as diffusers warms it up
            torch._foreach_lerp_(self.mean, [each.detach() for each in self.job.parameters], 1 - decay)
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        self._count(finite)
        mean = accelerator.reduce(total, "mean") if accelerator.num_processes > 1 else total
        self.history.losses.append(float(mean))
        accelerator.log({"loss": float(mean), "learning rate": rate}, step=self.done)
        return float(mean)

    def _gradients(self) -> Tensor | None:
        """The loss of this step's micro-batches, gradients added up; None where memory ran out, and less is tried next.

        A micro-batch that is too large is taken in parts from then on, which gives the same gradients.
        """
        config, accelerator = self.config, self.accelerator
        size = -(-self.batch_size // self.parts)
        starts = range(0, self.batch_size, size)
        losses: list[Tensor] = []
        try:
            for micro in range(config.accumulate):
                turn = (self.done * config.accumulate + micro) * accelerator.num_processes + accelerator.process_index
                batch = self.job.batch(turn * self.batch_size, self.batch_size)
                for number, start in enumerate(starts):
                    part = cut(batch, slice(start, start + size)) if self.parts > 1 else batch
                    torch.manual_seed(draws(config.seed, turn, number))
                    last = micro == config.accumulate - 1 and start == starts[-1]
                    with nullcontext() if last else accelerator.no_sync(self.model):
                        loss = self.model(part) * (len(part) / len(batch)) / config.accumulate
                        accelerator.backward(loss)
                    losses.append(loss.detach())
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            if size == 1 or accelerator.num_processes > 1:  # other processes would wait for this one
                raise TrainingError(
                    f"out of memory with {size} of {self.batch_size} pictures at a time; use --gradient-checkpointing, "
                    "a lower --resolution, --precision bf16, or a smaller --batch-size with --accumulate"
                ) from error
            self.parts *= 2
            logger.warning("out of memory: batches of %d are taken in %d parts from here on", len(batch), self.parts)
            return None
        return torch.stack(losses).sum()

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
        validate, sample = validate and bool(self.job.held_out), sample and self.job.sample is not None
        with self._kept() if validate or sample else nullcontext():
            if validate:
                loss = self.history.validation[self.done] = self._validate()
                self.accelerator.log({"held-out loss": loss}, step=self.done)
                if self.history.best_step == self.done:
                    self.best = [parameter.detach().clone() for parameter in self.job.parameters]
            if sample and self.job.sample is not None:
                self._gather(True)
                if self.accelerator.is_main_process:
                    with torch.random.fork_rng(), torch.no_grad():
                        self.job.sample(self.done)
                self._gather(False)

    def _gather(self, whole: bool) -> None:
        """Give every process all of a sharded base, so that one may use it alone, or let each keep its share again."""
        if self.sharded:
            gather(self.model, whole)

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """A context in which the parameters are those to look at and to keep; afterwards they are what they were."""
        if self.mean is None and self.config.optimizer != "schedulefree":
            yield
            return
        learning = [parameter.detach().clone() for parameter in self.job.parameters]
        self._average()
        try:
            yield
        finally:
            self.optimizer.train()
            put(self.job.parameters, learning)

    def _average(self) -> None:
        """Turn the parameters that learn into those to keep."""
        self.optimizer.eval()
        if self.mean is not None:
            put(self.job.parameters, self.mean)

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
            "mean": self.mean,
            "parts": self.parts,
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
        put(self.job.parameters, state["parameters"])
        if self.mean is not None:
            self.mean = [value.to(self.accelerator.device) for value in state["mean"]]
        self.parts = state["parts"]
        if state["best"] is not None:
            self.best = [value.to(self.accelerator.device) for value in state["best"]]
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.history = History(**state["history"])
        self.done = state["done"]
        self.resumed = (*state.get("resumed", ()), self.done)
        self.extends = self.done if state.get("steps") == self.done < self.steps else state.get("extends")


@torch.no_grad()
def put(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Set the parameters to these values."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
