"""The loop: resumed is unbroken bit for bit, accumulated is one large batch, and what cannot train is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn

from lora_vision.batches import generator
from lora_vision.config import FitConfig
from lora_vision.devices import make_accelerator, weight_dtype
from lora_vision.training import Job, Run, TrainingError, fit

CONFIG = FitConfig(steps=12, batch_size=4, learning_rate=0.05, validate_every=3, checkpoint_every=5, precision="fp32")


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate remembers the first precision it was given for the whole process."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@dataclass(frozen=True)
class Points:
    """Inputs [B, 3] and outputs [B]."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)


def points(position: int, count: int) -> Points:
    """Samples of y = x1 - 2 x2 + 3 x3, each depending on its position only."""
    rows = [torch.randn(3, generator=generator(0, "point", place)) for place in range(position, position + count)]
    x = torch.stack(rows)
    return Points(x, x @ torch.tensor([1.0, -2.0, 3.0]))


class Line(nn.Module):
    """The squared error of a linear guess, which takes a random number as dropout would."""

    def __init__(self, *, noisy: bool = False, broken: tuple[int, ...] = (), room: int = 99) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.noisy, self.broken, self.room, self.calls = noisy, broken, room, 0

    def forward(self, batch: Points) -> Tensor:
        if len(batch) > self.room and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        errors = (batch.x * self.frozen) @ self.weight - batch.y
        if self.training_calls() in self.broken:
            errors = errors * math.nan
        if self.noisy and torch.is_grad_enabled():
            errors = errors * torch.rand(())
        return errors.square().mean()

    def training_calls(self) -> int:
        self.calls += torch.is_grad_enabled()
        return self.calls


def job(folder: Path | None = None, *, stop: int | None = None, **options: Any) -> Job:
    """The task of finding the line, in a run that a keyboard stops after so many samples."""
    line = Line(**options)

    def batch(position: int, count: int) -> Points:
        if stop is not None and position >= stop:
            raise KeyboardInterrupt
        return points(position, count)

    return Job(line, [line.weight], batch, held_out=[points(1000, 8), points(2000, 2)], folder=folder)


def train(work: Job, config: FitConfig = CONFIG) -> tuple[Tensor, Any]:
    """The trained weight and the outcome."""
    fitted = fit(work, config, make_accelerator(config))
    return work.parameters[0].detach().clone(), fitted


def test_it_learns() -> None:
    weight, fitted = train(job(), replace(CONFIG, steps=150, weight_decay=0.0, learning_rate=0.2))
    torch.testing.assert_close(weight, torch.tensor([1.0, -2.0, 3.0]), rtol=0, atol=0.02)
    assert len(fitted.history.losses) == 150 and fitted.history.losses[-1] < 1e-2 * fitted.history.losses[0]
    assert min(fitted.history.validation) == 3 and max(fitted.history.validation) == 150


@pytest.mark.parametrize("stop", [6, 10, 11])
def test_a_resumed_run_is_the_unbroken_run(tmp_path: Path, stop: int) -> None:
    torch.manual_seed(1)
    whole, fitted = train(job(tmp_path / "whole", noisy=True))
    torch.manual_seed(1)
    with pytest.raises(KeyboardInterrupt):
        train(job(tmp_path / "broken", noisy=True, stop=stop * 4))
    torch.manual_seed(2)
    resumed = job(tmp_path / "broken", noisy=True)
    weight, again = train(resumed, replace(CONFIG, resume=True))
    assert torch.equal(weight, whole)
    assert again.history == fitted.history
    assert len(again.resumed) == 1 and 0 < again.resumed[0] <= stop and again.extends is None
    assert all(torch.equal(one, other) for one, other in zip(again.best, fitted.best, strict=True))
    kept = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "broken")]
    first, second = (state["optimizer"]["state"][0] for state in kept)
    assert all(torch.equal(first[key], second[key]) for key in ("exp_avg", "exp_avg_sq", "step"))


def test_a_finished_run_resumes_to_itself_and_can_be_made_longer(tmp_path: Path) -> None:
    whole, fitted = train(job(tmp_path))
    weight, again = train(job(tmp_path), replace(CONFIG, resume=True))
    assert torch.equal(weight, whole) and again.history == fitted.history
    longer, more = train(job(tmp_path), replace(CONFIG, resume=True, steps=20))
    assert len(more.history.losses) == 20 and not torch.equal(longer, whole)
    steps = len(fitted.history.losses)
    assert (fitted.resumed, again.resumed, again.extends) == ((), (steps,), None)
    assert (more.resumed[-1], more.extends) == (steps, steps)


def test_a_run_that_ended_early_resumes_to_itself(tmp_path: Path) -> None:
    config = replace(CONFIG, learning_rate=3.0, steps=60, validate_every=1, sample_every=50)
    looks: list[int] = []
    work = replace(job(tmp_path), patience=2, sample=looks.append)
    weight, fitted = train(work, config)
    end = len(fitted.history.losses)
    assert end == fitted.history.best_step + 2 < 50 and looks == [0, end]
    again, more = train(replace(job(tmp_path), patience=2), replace(config, resume=True))
    assert torch.equal(again, weight) and more.history == fitted.history
    _, longer = train(job(tmp_path), replace(config, resume=True))
    assert len(longer.history.losses) == 60


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    train(replace(job(tmp_path), identity={"seed": 1, "rank": 4}))
    with pytest.raises(TrainingError, match=r"of another run: rank 4 \(now 8\), seed 1 \(now None\); use its settings"):
        train(replace(job(tmp_path), identity={"rank": 8}), replace(CONFIG, resume=True))


def test_without_a_checkpoint_resuming_is_starting(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weight, _ = train(job(tmp_path), replace(CONFIG, resume=True))
    assert torch.equal(weight, train(job())[0]) and "starting from the beginning" in caplog.text


def test_a_torn_checkpoint_never_takes_the_place_of_a_whole_one(tmp_path: Path, monkeypatch: Any) -> None:
    whole, _ = train(job(tmp_path / "whole"))
    real = torch.save
    saved: list[object] = []

    def torn(state: object, file: Any) -> None:
        saved.append(state)
        if len(saved) < 2:
            return real(state, file)
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="No space left"):
        train(job(tmp_path / "full"))
    monkeypatch.undo()
    weight, _ = train(job(tmp_path / "full"), replace(CONFIG, resume=True))
    assert torch.equal(weight, whole)


def test_accumulated_batches_are_one_large_batch() -> None:
    large, _ = train(job(), replace(CONFIG, batch_size=8))
    small, _ = train(job(), replace(CONFIG, batch_size=2, accumulate=4))
    torch.testing.assert_close(small, large, rtol=1e-5, atol=1e-6)


def test_the_best_weights_are_those_of_the_best_look() -> None:
    work = job()
    seen: dict[int, Tensor] = {}
    work = replace(work, sample=lambda step: seen.update({step: work.parameters[0].detach().clone()}))
    _, fitted = train(work, replace(CONFIG, learning_rate=2.5, warmup=0.0, steps=30, sample_every=3))
    best = fitted.history.best_step
    assert fitted.history.validation[best] == min(fitted.history.validation.values())
    assert torch.equal(fitted.best[0], seen[best])
    assert sorted(seen) == list(range(0, 31, 3))
    errors = [(len(each.y), _with(seen[best])(each).item()) for each in work.held_out]
    expected = sum(size * error for size, error in errors) / 10
    assert fitted.history.validation[best] == pytest.approx(expected)


def _with(weight: Tensor) -> Line:
    line = Line()
    line.weight.data.copy_(weight)
    return line


@pytest.mark.parametrize("changes", [{}, {"ema": 0.9}, {"optimizer": "schedulefree"}], ids=["adamw", "ema", "free"])
def test_looking_changes_nothing(changes: dict[str, Any]) -> None:
    if "optimizer" in changes:
        pytest.importorskip("schedulefree")
    config = replace(CONFIG, **changes)

    def sample(step: int) -> None:
        torch.rand(7)

    torch.manual_seed(0)
    plain, _ = train(replace(job(noisy=True), held_out=()), replace(config, validate_every=0))
    torch.manual_seed(0)
    looked, _ = train(replace(job(noisy=True), sample=sample), replace(config, sample_every=1, validate_every=1))
    assert torch.equal(plain, looked)


def test_the_mean_of_the_weights_is_looked_at_and_kept_and_the_weights_learn_on(tmp_path: Path) -> None:
    looked: dict[int, Tensor] = {}
    learnt: list[Tensor] = []
    work = job(tmp_path)
    weight = work.parameters[0]
    work = replace(
        work,
        sample=lambda step: looked.update({step: weight.detach().clone()}),
        after_step=lambda: learnt.append(weight.detach().clone()),
    )
    kept, fitted = train(work, replace(CONFIG, ema=0.6, sample_every=4, validate_every=6))
    plain, _ = train(job())
    assert torch.equal(learnt[-1], plain), "averaging does not disturb what learns"
    mean = torch.zeros(3)
    for step, value in enumerate(learnt, 1):
        mean = mean.lerp(value, 1 - min(0.6, step / (9 + step)))
        if step in looked:
            torch.testing.assert_close(looked[step], mean)
    assert torch.equal(kept, looked[12]) and sorted(looked) == [0, 4, 8, 12]
    assert fitted.best is not None and torch.equal(fitted.best[0], kept)


def test_schedule_free_weights_are_looked_at_averaged() -> None:
    pytest.importorskip("schedulefree")
    seen: list[tuple[Tensor, Any]] = []
    work = job()
    config = replace(CONFIG, optimizer="schedulefree", sample_every=12, validate_every=0)
    run = Run(work, config, make_accelerator(config))
    run.job = replace(work, sample=lambda step: seen.append((work.parameters[0].detach().clone(), step)))
    run.train()
    inner = run.optimizer.optimizer
    assert not inner.param_groups[0]["train_mode"]
    assert [step for _, step in seen] == [0, 12] and torch.equal(seen[-1][0], work.parameters[0])
    inner.train()
    assert not torch.equal(seen[-1][0], work.parameters[0])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_too_large_for_the_memory_is_taken_in_parts(
    accumulate: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(CONFIG, batch_size=6, accumulate=accumulate)
    whole, fitted = train(job(), config)
    weight, again = train(job(tmp_path, room=2), config)
    torch.testing.assert_close(weight, whole, rtol=1e-5, atol=1e-6)
    assert again.history.losses == pytest.approx(fitted.history.losses, rel=1e-5)
    told = [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]
    assert [line.split(":")[1] for line in told] == [
        " batches of 6 are taken in 2 parts from here on",
        " batches of 6 are taken in 4 parts from here on",
    ]
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["parts"] == 4


def test_what_does_not_fit_alone_ends_with_advice() -> None:
    with pytest.raises(TrainingError, match="out of memory with 1 of 4 pictures at a time; use --gradient-checkpoint"):
        train(job(room=0))


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    work = job()
    work = replace(work, batch=lambda position, count: points(position, 2) if position else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(work)


def test_losses_are_tracked_where_a_tracker_is_there(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accelerator = make_accelerator(CONFIG, folder=tmp_path)
    fitted = fit(job(), CONFIG, accelerator)
    seen = EventAccumulator(str(tmp_path / "tracked")).Reload()
    losses = [event.value for event in seen.Scalars("loss")]
    assert losses == pytest.approx(fitted.history.losses) and len(seen.Scalars("learning rate")) == 12
    held_out = {event.step: event.value for event in seen.Scalars("held-out loss")}
    assert held_out == pytest.approx(fitted.history.validation)


def test_trackers_are_asked_for_by_name(tmp_path: Path) -> None:
    assert not make_accelerator(replace(CONFIG, tracker="none"), folder=tmp_path).log_with
    with pytest.raises(TrainingError, match="--tracker wandbb is not there; choose auto, none or one of aim"):
        make_accelerator(replace(CONFIG, tracker="wandbb"), folder=tmp_path)
    with pytest.raises(TrainingError, match="--tracker clearml is not there; install it"):
        make_accelerator(replace(CONFIG, tracker="clearml"), folder=tmp_path)


def test_held_out_losses_that_are_no_numbers_are_null_and_never_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([math.nan, 0.5, math.inf, 0.7])
    monkeypatch.setattr(Run, "_validate", lambda run: next(looks))
    fitted = train(job())[1]
    numbers = json.loads(json.dumps(fitted.numbers(), allow_nan=False))
    assert numbers["validation"] == {"3": None, "6": 0.5, "9": None, "12": 0.7}
    assert numbers["best_step"] == 6 and fitted.best is not None


def test_steps_with_gradients_that_are_no_numbers_are_skipped(caplog: pytest.LogCaptureFixture) -> None:
    work = job(broken=(2, 5))
    weight, fitted = train(work)
    assert weight.isfinite().all() and fitted.history.skipped == 2
    assert [math.isnan(loss) for loss in fitted.history.losses] == [step in (1, 4) for step in range(12)]
    assert "step 2 skipped" in caplog.text and "step 5 skipped" in caplog.text


def test_a_run_that_stays_broken_ends_with_advice(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"not finite in 20 steps up to step 33; lower --learning-rate"):
        train(job(tmp_path, broken=tuple(range(14, 60))), replace(CONFIG, steps=60))
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert kept["parameters"][0].isfinite().all()


def test_only_float32_parameters_train_and_all_else_is_frozen() -> None:
    half = Line()
    half.weight.data = half.weight.data.half()
    for work, words in (
        (Job(half, [half.weight], points), "float16"),
        (Job(Line(), [], points), "0 parameters"),
        (replace(job(), parameters=[nn.Parameter(torch.zeros(3))]), r"found also \['weight'\]"),
        (replace(job(), parameters=[Line().frozen]), "trainable"),
    ):
        with pytest.raises(ValueError, match=words):
            train(work)
    with pytest.raises(ValueError, match="steps, batch_size and learning_rate are open"):
        fit(job(), FitConfig(), make_accelerator(CONFIG))


def test_gradients_are_clipped() -> None:
    seen: list[float] = []
    for clip in (1.0, 0.0):
        work = job()
        run = Run(work, replace(CONFIG, clip=clip), make_accelerator(CONFIG))
        work.parameters[0].register_post_accumulate_grad_hook(lambda p: seen.append(float(p.grad.norm())))
        step = run.optimizer.step

        def check(step: Any = step, weight: nn.Parameter = work.parameters[0]) -> None:
            assert weight.grad is not None
            seen.append(float(weight.grad.norm()))
            step()

        run.optimizer.step = check
        run.step()
    assert seen[0] > 1 and seen[1] == pytest.approx(1, abs=1e-4)
    assert seen[2] == seen[3] > 1


def test_fp16_on_a_cpu_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"use --precision (fp32|bf16)"):
        make_accelerator(FitConfig(precision="fp16"))


def test_bf16_keeps_the_parameters_in_fp32() -> None:
    config = replace(CONFIG, precision="bf16")
    accelerator = make_accelerator(config)
    assert weight_dtype(accelerator) == torch.bfloat16
    work = job()
    fit(work, config, accelerator)
    assert work.parameters[0].dtype == torch.float32 and work.parameters[0].abs().sum() > 0


def test_a_launcher_chooses_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert make_accelerator(FitConfig()).mixed_precision == "bf16"
