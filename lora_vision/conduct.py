"""What changes while a model runs: weights by denoising step, by row of the batch, by region of the picture.

Hooks before and after the model's own forward do it, so that every stock pipeline has it without a copied loop. They
are there only while something varies.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lora_vision.errors import AdapterError
from lora_vision.regions import Region, averaged, repeated, shares
from lora_vision.schedules import Moment, Schedule
from lora_vision.stack import Stack


class _Hook(partial[Any]):
    """A hook that a copied or pickled model leaves behind: the copy goes on with the gains it had at that moment."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return partial, (_pass,)


def _pass(*args: Any) -> None:
    return None


class Conductor:
    """One model of a pipeline, its stack, and what varies in it."""

    def __init__(self, part: str, model: nn.Module, stack: Stack) -> None:
        """A conductor that does nothing yet.

        Args:
            part: ``unet``, a text encoder or ``vit``; only a UNet has moments and regions.
            model: The model whose forward is hooked while something varies.
            stack: Its adapters.
        """
        self.part, self.model, self.stack = part, model, stack
        self._weights: dict[str, Tensor] = {}
        self._schedules: dict[str, Schedule] = {}
        self._regions: tuple[Region, ...] = ()
        self._texts: tuple[dict[str, Tensor], ...] = ()
        self._pipe: Any = None
        self._handles: list[RemovableHandle] = []
        self._playing: tuple[Any, ...] | None = None
        self._batch = 0

    def play(
        self,
        weights: Mapping[str, Tensor],
        schedules: Mapping[str, Schedule],
        regions: Sequence[Region] = (),
        texts: Sequence[dict[str, Tensor]] = (),
        pipe: Any = None,
    ) -> None:
        """Lets these adapters sound from now on.

        Args:
            weights: Adapter name to weights [G, L]; with regions one row for each of them.
            schedules: Adapter name to schedule.
            regions: Places with a blend of their own; UNet only.
            texts: For each region what replaces the prompt's text states there: ``encoder_hidden_states`` [1, T, C],
                ``text_embeds`` [1, C]; empty where the region has no prompt.
            pipe: The pipeline that will call; it knows the scheduler, and whether guidance doubles the batch.
        """
        self.quiet()
        self._weights = {name: value for name, value in weights.items() if bool(value.any())}
        self._schedules = {name: schedule for name, schedule in schedules.items() if name in self._weights}
        self._regions, self._texts, self._pipe = tuple(regions), tuple(texts), pipe
        rows = max((len(value) for value in self._weights.values()), default=1)
        if not self._schedules and not self._regions and rows == 1:
            self.stack.apply(self._weights)
            return
        self._handles.append(
            self.model.register_forward_pre_hook(_Hook(torch.compiler.disable(self._before)), with_kwargs=True)
        )
        if self._regions:
            self._handles.append(self.model.register_forward_hook(_Hook(torch.compiler.disable(self._after))))

    def quiet(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._playing = [], None

    def at(self, moment: Moment | None, batch: int) -> None:
        """Sets the gains for a moment and a batch of that many rows, if they differ from the present ones."""
        if self._playing == (moment, batch):
            return
        rows = self._rows(batch)
        weights = {n: w.expand(len(rows), -1) if len(w) == 1 else w[rows] for n, w in self._weights.items()}
        if moment is not None:
            weights.update({name: weights[name] * self._factor(name, moment) for name in self._schedules})
        self.stack.arrange(weights, len(rows), fluid=True)
        self.stack.write(weights)
        self._playing = (moment, batch)

    def _rows(self, batch: int) -> list[int]:
        """Which row of weights each row of the (repeated) batch takes."""
        if self._regions:
            return [region for region in range(len(self._regions)) for _ in range(batch)]
        count = max((len(value) for value in self._weights.values()), default=1)
        if count == 1:
            return [0]
        copies = 1 + self._guided + self._perturbed if self.part == "unet" else 1
        pictures, odd = divmod(batch, copies)
        if odd or pictures % count:
            guided = " with guidance" if copies > 1 else ""
            raise AdapterError(
                f"{self.part} runs on a batch of {batch}{guided}, which {count} rows of weights do not divide; "
                "give one row for each prompt, or one for each picture"
            )
        return [row for row in range(count) for _ in range(pictures // count)] * copies

    @property
    def _guided(self) -> bool:
        return bool(getattr(self._pipe, "do_classifier_free_guidance", False))

    @property
    def _perturbed(self) -> bool:
        """Whether perturbed-attention guidance adds a third copy of the batch."""
        return bool(getattr(self._pipe, "do_perturbed_attention_guidance", False))

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        self._pipe = _caller(model) or self._pipe
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim())
        self._batch = len(first)
        self.at(self._moment(args, kwargs) if self._schedules else None, self._batch)
        if self._regions:
            count = len(self._regions)
            args, kwargs = repeated(args, self._batch, count), repeated(kwargs, self._batch, count)
            args, kwargs = self._retold(args, kwargs)
        return args, kwargs

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        prediction = output[0]
        share = shares(self._regions, *prediction.shape[-2:])
        mixed = averaged(prediction, share.to(prediction.device))
        return (mixed, *output[1:]) if isinstance(output, tuple) else type(output)(sample=mixed)

    def _moment(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Moment:
        """Where the UNet's timestep stands in the scheduler's list."""
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        times = torch.as_tensor(self._pipe.scheduler.timesteps).flatten()
        now = torch.as_tensor(timestep).flatten()[0].to(times)
        step = int((times - now).abs().argmin())
        return Moment(step, len(times))

    def _factor(self, name: str, moment: Moment) -> float | Tensor:
        """What the weights [G, L] of an adapter are multiplied by: one number, or [L]."""
        found = self._schedules[name](moment)
        factors = list(found.values()) if isinstance(found, Mapping) else [float(found)]
        if odd := [factor for factor in factors if not math.isfinite(factor)]:
            raise AdapterError(f"the schedule of {name} gives {odd[0]} at step {moment.step}; expected a finite number")
        if not isinstance(found, Mapping):
            return factors[0]
        columns = self.stack.loaded[name].columns
        if strange := found.keys() - columns.keys():
            raise AdapterError(f"the schedule of {name} names {min(strange)}, which that adapter does not change")
        return torch.tensor([found.get(layer, 1.0) for layer in columns])

    def _retold(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with the text states of regions that have a prompt put in, guidance's other half left alone."""
        if not any(self._texts):
            return args, kwargs
        args, kwargs = list(args), dict(kwargs)  # type: ignore[assignment]
        added = dict(kwargs.get("added_cond_kwargs") or {})
        first = self._batch // 2 if self._guided else 0
        for number, texts in enumerate(self._texts):
            rows = slice(number * self._batch + first, (number + 1) * self._batch)
            for name, states in texts.items():
                holder: Any = added if name in added else kwargs if name in kwargs else args
                key: Any = 2 if holder is args else name
                whole = holder[key] = holder[key].clone()
                if whole.shape[1:] != states.shape[1:]:
                    found, expected = tuple(states.shape[1:]), tuple(whole.shape[1:])
                    raise AdapterError(f"a region's prompt gives {name} {found}, the picture's own {expected}")
                whole[rows] = states.to(whole)
        if added:
            kwargs["added_cond_kwargs"] = added
        return tuple(args), kwargs


def _caller(model: nn.Module) -> Any:
    """The pipeline that is calling this UNet right now, or None.

    ``from_pipe`` puts the same models into another pipeline, with a guidance and perhaps a scheduler of its own; asking
    the one the Blend was made on would give each row of weights to the wrong picture, silently.
    """
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if callable(owner) and not isinstance(owner, nn.Module) and hasattr(owner, "scheduler"):
            unet = getattr(owner, "unet", None)
            if getattr(unet, "_orig_mod", unet) is model:
                return owner
        frame = frame.f_back  # type: ignore[assignment]
    return None
