"""What the custom pipelines add to a stock one: a call that also takes adapters, a schedule, regions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_vision.blend import Blend, Rows
from lora_vision.regions import Region
from lora_vision.schedules import Schedule


class Blending:
    """A mixin before a diffusers pipeline class. It has no ``__init__``, so the pipeline loads as the stock one."""

    @property
    def blend(self) -> Blend:
        """This pipeline's blend, made at first use."""
        held: Blend | None = self.__dict__.get("_blend")
        if held is None:
            held = self.__dict__["_blend"] = Blend(self)
        return held

    def __call__(
        self,
        *args: Any,
        adapters: Mapping[str, Rows] | None = None,
        schedule: Schedule | Mapping[str, Schedule] | None = None,
        regions: Sequence[Region] = (),
        **kwargs: Any,
    ) -> Any:
        """What the stock pipeline returns, drawn with a blend for this call only.

        Args:
            *args: As the stock pipeline takes them.
            adapters: Adapter name or file to weight, as in ``Blend.set``; files are loaded once, under their path.
                None leaves the blend as it was set.
            schedule: As in ``Blend.set``.
            regions: As in ``Blend.set``.
            **kwargs: As the stock pipeline takes them.

        Raises:
            AdapterError: An adapter is neither loaded nor a file, or something does not fit.
        """
        if adapters is None and schedule is None and not regions:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        wanted = dict(self.blend.scales if adapters is None else adapters)
        for name in [*wanted, *(name for region in regions for name in region.adapters)]:
            if name not in self.blend.adapters and Path(name).exists():
                self.blend.load(name, name, scale=0.0)
        with self.blend.using():
            self.blend.set(wanted, schedule=schedule, regions=regions)
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
