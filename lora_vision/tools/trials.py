"""What each block of an adapter does to the picture, found by leaving it out and by letting it act alone.

Two distances between pictures, both in [0, 1]: of pixels (root mean square), and of the *look*, which ignores where
things are: the difference of the sorted values of each colour channel and of the edges' strength, that is, the
one-dimensional optimal transport between their distributions (sliced Wasserstein, Rabin et al. 2011).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from lora_vision.adapter import Adapter
from lora_vision.base import Base
from lora_vision.blend import Blend
from lora_vision.errors import AdapterError
from lora_vision.samples import draw
from lora_vision.tools import places

ENOUGH = 2 / 3
"""Blocks carry the look when this share of it goes with them."""

Pictures = list[Image.Image]


@dataclass(frozen=True)
class Trials:
    """Pictures of the same prompts and noise, and what they say.

    Attributes:
        prompts: What was drawn.
        blocks: Blocks that the adapter changes, in the order of the forward pass.
        base: Without the adapter.
        full: With all of it.
        without: Block to pictures with all but this block.
        only: Block to pictures with this block alone.
        carriers: The fewest blocks, taken by what each takes away when left out, without which ENOUGH of the look is
            gone.
        gone: Pictures without the carriers.
        carried: Pictures with the carriers alone.
        steps: At each denoising step (timestep), the difference the adapter makes to the UNet's prediction, relative
            to the prediction itself.
        maps: Where in each picture it makes that difference, summed over the steps: [H, W] in [0, 1].
    """

    prompts: tuple[str, ...]
    blocks: tuple[str, ...]
    base: Pictures
    full: Pictures
    without: Mapping[str, Pictures]
    only: Mapping[str, Pictures]
    carriers: tuple[str, ...]
    gone: Pictures
    carried: Pictures
    steps: Mapping[int, float]
    maps: Sequence[np.ndarray]

    def lost(self, pictures: Pictures, kind: str = "look") -> float:
        """The share of the adapter's effect that these pictures lack: 0 the full adapter, 1 as far from it as the base.

        Args:
            pictures: Of the same prompts.
            kind: ``look`` or ``pixels``.
        """
        distance = DISTANCES[kind]
        return distance(self.full, pictures) / max(distance(self.full, self.base), 1e-9)

    def to_dict(self) -> dict[str, Any]:
        """The numbers as plain values, for JSON."""
        kinds = list(DISTANCES)
        return {
            "prompts": list(self.prompts),
            "carriers": list(self.carriers),
            "lost without the carriers": {kind: self.lost(self.gone, kind) for kind in kinds},
            "lost with the carriers alone": {kind: self.lost(self.carried, kind) for kind in kinds},
            "lost without": {b: {kind: self.lost(self.without[b], kind) for kind in kinds} for b in self.blocks},
            "lost with only": {b: {kind: self.lost(self.only[b], kind) for kind in kinds} for b in self.blocks},
            "effect": {kind: DISTANCES[kind](self.full, self.base) for kind in kinds},
            "by timestep": {str(time): value for time, value in self.steps.items()},
        }


def trials(base: Base, adapter: Adapter, prompts: Sequence[str], seed: int = 0) -> Trials:
    """Pictures of the adapter on a base, whole, in parts and not at all; the base is left as it was.

    Raises:
        AdapterError: The adapter does not fit the base.
    """
    blend = Blend(base.parts)
    blend.load(adapter, "it")
    try:
        studio = _Studio(base, blend, tuple(adapter.layers), tuple(prompts), seed)
        return studio.run()
    finally:
        blend.detach()


class _Studio:
    """A base with one adapter, whose blocks are turned on and off."""

    def __init__(self, base: Base, blend: Blend, names: tuple[str, ...], prompts: tuple[str, ...], seed: int) -> None:
        self.base, self.blend, self.names, self.prompts, self.seed = base, blend, names, prompts, seed
        self.blocks = tuple(places.blocks(names))
        self.side = int(base.unet.config.sample_size) * base.factor
        self.bar = tqdm(desc="trials", total=3 * len(self.blocks) + 3, disable=None)

    def run(self) -> Trials:
        """All pictures, drawn."""
        plain = self.draw(())
        with _Differences(self.base.unet, self.blend) as watch:
            full = self.draw(self.blocks)
        without = {block: self.draw([b for b in self.blocks if b != block]) for block in self.blocks}
        only = {block: self.draw([block]) for block in self.blocks}
        carriers, gone = self.carriers(plain, full, without)
        carried = only[carriers[0]] if len(carriers) == 1 else self.draw(carriers)
        self.bar.close()
        steps, maps = watch.steps(), watch.maps()
        return Trials(self.prompts, self.blocks, plain, full, without, only, carriers, gone, carried, steps, maps)

    def draw(self, blocks: Sequence[str]) -> Pictures:
        """Pictures with these blocks of the adapter."""
        silent = {pattern: 0.0 for b in self.blocks if b not in blocks for pattern in patterns(b, self.names)}
        self.blend.set({"it": {"*": 1.0, **silent}} if blocks else {})
        self.bar.update()
        return draw(self.base, self.prompts, seed=self.seed, resolution=self.side)

    def carriers(
        self, plain: Pictures, full: Pictures, without: Mapping[str, Pictures]
    ) -> tuple[tuple[str, ...], Pictures]:
        """The fewest blocks that carry the look, and the pictures without them."""
        effect = max(look(full, plain), 1e-9)
        order = sorted(self.blocks, key=lambda block: -look(full, without[block]))
        for count in range(1, len(order)):
            gone = without[order[0]] if count == 1 else self.draw(order[count:])
            if look(full, gone) / effect >= ENOUGH:
                return tuple(sorted(order[:count], key=self.blocks.index)), gone
        return self.blocks, plain


class _Differences:
    """While it is on, keeps the difference of every prediction from the base's own, which is asked for the same."""

    def __init__(self, unet: nn.Module, blend: Blend) -> None:
        self.unet, self.blend, self.busy = unet, blend, False
        self.found: dict[int, list[tuple[float, float, Tensor]]] = {}

    def __enter__(self) -> Self:
        self.handle = self.unet.register_forward_hook(self._after, with_kwargs=True)
        return self

    def __exit__(self, *problem: object) -> None:
        self.handle.remove()

    def _after(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Compares a prediction with the base's own; guidance's other half, which has no prompt, is left out."""
        if self.busy:  # this is the base's own
            return
        self.busy = True
        with self.blend.using({}):
            silent = unet(*args, **kwargs)
        self.busy = False
        mine, plain = (each[0].float().cpu() for each in (output, silent))
        mine, plain = mine[len(mine) // 2 :], plain[len(plain) // 2 :]
        time = int(torch.as_tensor(args[1] if len(args) > 1 else kwargs["timestep"]).flatten()[0])
        change = (mine - plain).square()
        self.found.setdefault(time, []).append((float(change.sum()), float(plain.square().sum()), change.mean(1)))

    def steps(self) -> dict[int, float]:
        """Timestep to the relative difference, in the order of denoising."""
        return {
            t: (sum(a for a, _, _ in f) / max(sum(b for _, b, _ in f), 1e-12)) ** 0.5 for t, f in self.found.items()
        }

    def maps(self) -> list[np.ndarray]:
        """For each picture the difference [h, w], root mean square over steps, the largest 1."""
        total = torch.stack([torch.cat([m for _, _, m in found]) for found in self.found.values()]).mean(0).sqrt()
        return [(each / each.max().clamp_min(1e-12)).numpy() for each in total]


def patterns(block: str, names: Sequence[str]) -> list[str]:
    """Globs over layer names that mean one block of an adapter with these layers."""
    if block.startswith(("down", "mid", "up")):
        return [places.glob(block)]
    members = [name for name in names if places.block(name) == block]
    if not members:
        raise AdapterError(f"no layer in the block {block!r}; there are {', '.join(places.blocks(names))}")
    return [block] if block.startswith("text_encoder") else members


def look(some: Sequence[Image.Image], others: Sequence[Image.Image]) -> float:
    """Mean distance of the looks of pictures drawn from the same prompts."""
    gaps = [_look(a) - _look(b) for a, b in zip(some, others, strict=True)]
    return float(np.mean([np.sqrt(np.mean(gap**2)) for gap in gaps]))


def pixels(some: Sequence[Image.Image], others: Sequence[Image.Image]) -> float:
    """Mean distance of the pixels of pictures drawn from the same prompts."""
    gaps = [_array(a) - _array(b) for a, b in zip(some, others, strict=True)]
    return float(np.mean([np.sqrt(np.mean(gap**2)) for gap in gaps]))


DISTANCES = {"look": look, "pixels": pixels}


def _array(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"), dtype=np.float32) / 255


def _look(picture: Image.Image) -> np.ndarray:
    """Sorted values [4, H·W]: red, green, blue, and the strength of edges."""
    values = _array(picture)
    down, right = np.diff(values, axis=0, append=values[-1:]), np.diff(values, axis=1, append=values[:, -1:])
    edges = np.sqrt((down**2 + right**2).mean(-1))
    return np.sort(np.stack([*values.transpose(2, 0, 1), edges]).reshape(4, -1), axis=1)
