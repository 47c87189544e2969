"""Adapters in, one adapter out: exact by concatenation, or smaller and approximate, with the error said.

Every method is measured against the true weighted sum ``Σ weight · delta``, layer by layer, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_vision.adapter import Adapter
from lora_vision.errors import AdapterError
from lora_vision.factors import IA3, Factors, Full, LowRank
from lora_vision.klora import turning_points

Terms = Sequence[tuple[Factors, float]]
"""What the adapters do to one layer: the change and the weight of each that reaches it."""


@dataclass(frozen=True, eq=False)
class Combined:
    """One adapter made of several.

    Attributes:
        adapter: The result; ``alpha`` equals the rank everywhere, weights are inside the factors.
        errors: Relative error against the true weighted sum, ``‖result - sum‖ / ‖sum‖``, by group of layers
            (``unet attention``, ``unet conv``, ``text_encoder`` ...) and under ``all``.
    """

    adapter: Adapter
    errors: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of the approximate methods."""

    rank: int | None = None
    """Rank of the result (default: the largest of the adapters in that layer)."""
    density: float = 0.5
    """Share of each change's elements that TIES, DARE and magnitude pruning keep."""
    seed: int = 0
    """Seed of what DARE drops."""


def combine(
    adapters: Sequence[tuple[Adapter, float]],
    how: str = "concat",
    recipe: Recipe | None = None,
    base: Mapping[str, Tensor] | None = None,
) -> Combined:
    """The adapters as one, and how far it is from their true weighted sum.

    Args:
        adapters: Each adapter with its weight; negative weights subtract.
        how: ``concat``, ``svd``, ``linear``, ``ties``, ``dare`` or ``magnitude`` (see METHODS), or ``klora``.
        recipe: Rank, density and seed of the approximate methods.
        base: True layer name to untouched weight; needed where a change depends on it (DoRA, IA3).

    Raises:
        AdapterError: The method is unknown, a setting is out of range, the adapters do not fit each other, or one
            needs the base weight (DoRA, IA3).
    """
    recipe = recipe or Recipe()
    adapters = [(plain(adapter, base), weight) for adapter, weight in adapters]
    _check(adapters, how, recipe)
    taken = _shared_out(adapters) if how == "klora" else adapters
    generator = torch.Generator().manual_seed(recipe.seed)
    layers: dict[str, Factors] = {}
    with torch.no_grad():
        for name, terms in _by_layer(taken).items():
            try:
                layers[name] = _one_layer(terms, "concat" if how == "klora" else how, recipe, generator)
            except (AdapterError, RuntimeError) as error:
                raise AdapterError(f"{name}: {error}") from error
    extras = [adapter.extras for adapter, _ in adapters if adapter.extras]
    found = Adapter(layers, extras[0] if extras else {}, {"lora_vision_combined": how})
    return Combined(found, errors_of(found, adapters))


@torch.no_grad()
def errors_of(found: Adapter, adapters: Sequence[tuple[Adapter, float]]) -> dict[str, float]:
    """How far an adapter is from the true weighted sum of others, by group of layers: see ``Combined.errors``."""
    missed: dict[str, list[float]] = {}
    for name, terms in _by_layer(adapters).items():
        if not (heavy := _heavy(terms)):
            continue
        total = sum_of(heavy)
        gap = found.layers[name].delta(total) - total if name in found.layers else total
        for group in (_group(name), "all"):
            sums = missed.setdefault(group, [0.0, 0.0])
            sums[0] += float(gap.square().sum())
            sums[1] += float(total.square().sum())
    return {group: math.sqrt(gap / total) if total else 0.0 for group, (gap, total) in missed.items()}


def _by_layer(adapters: Sequence[tuple[Adapter, float]]) -> dict[str, list[tuple[Factors, float]]]:
    found: dict[str, list[tuple[Factors, float]]] = {}
    for adapter, weight in adapters:
        for name, factors in adapter.layers.items():
            found.setdefault(name, []).append((factors, weight))
    return found


@torch.no_grad()
def plain(adapter: Adapter, base: Mapping[str, Tensor] | None) -> Adapter:
    """The adapter with what depends on the base written as the change that it is there."""
    layers = dict(adapter.layers)
    for name, factors in layers.items():
        needs_bias = isinstance(factors, IA3) and factors.with_bias and not factors.on_input
        if factors.needs_base and base is not None and name in base and not needs_bias:
            layers[name] = Full(diff=factors.delta(base[name]), bias=factors.bias_delta())
    return replace(adapter, layers=layers)


def _shared_out(adapters: Sequence[tuple[Adapter, float]]) -> list[tuple[Adapter, float]]:
    """Subject and style as K-LoRA shares out their attention layers half way through denoising.

    A file cannot change from step to step as the paper has it: that is ``schedules.klora`` on a Blend.
    """
    if len(adapters) != 2:
        raise AdapterError(f"klora is for two adapters, the subject and then the style; found {len(adapters)}")
    (subject, amount), (style, share) = adapters
    points = turning_points(subject, style)
    ours = {name: factors for name, factors in subject.layers.items() if points.get(name, 1) > 0.5}
    theirs = {name: factors for name, factors in style.layers.items() if points.get(name, 0) <= 0.5}
    return [(replace(subject, layers=ours), amount), (replace(style, layers=theirs), share)]


def sum_of(terms: Terms) -> Tensor:
    """The true weighted sum of changes to one layer, float32, in the weight's shape."""
    return torch.stack(_weighted(terms)).sum(0)


def concat(terms: Terms, recipe: Recipe, generator: torch.Generator) -> Factors:
    """The exact sum: factors side by side, ranks added up; dense as soon as one change is."""
    pairs = [(factors.low_rank(), weight) for factors, weight in terms]
    found = [(pair, weight) for pair, weight in pairs if pair is not None]
    if len(found) < len(pairs):
        return Full(diff=sum_of(terms))
    kernel = max((pair.down.shape for pair, _ in found), key=len)[1:]
    up = torch.cat([pair.up.float().flatten(1) * (pair.scale * weight) for pair, weight in found], dim=1)
    down = torch.cat([pair.down.float().reshape(pair.rank, *kernel) for pair, _ in found])
    return _pair(up, down)


def svd(terms: Terms, recipe: Recipe, generator: torch.Generator) -> Factors:
    """The best approximation of the sum at that rank (Eckart and Young 1936); no clamping of outliers."""
    exact = concat(terms, recipe, generator)
    rank = recipe.rank or _largest_rank(terms)
    if isinstance(exact, LowRank):
        left, small = torch.linalg.qr(exact.up.flatten(1))
        right, low = torch.linalg.qr(exact.down.flatten(1).t())
        u, s, v = torch.linalg.svd(small @ low.t(), full_matrices=False)
        u, v, kernel = left @ u, v @ right.t(), exact.down.shape[1:]
    else:
        total = exact.delta()
        u, s, v = torch.linalg.svd(total.flatten(1), full_matrices=False)
        kernel = total.shape[1:]
    rank = min(rank, len(s))
    root = s[:rank].sqrt()
    return _pair(u[:, :rank] * root, (root[:, None] * v[:rank]).reshape(rank, *kernel))


def linear(terms: Terms, recipe: Recipe, generator: torch.Generator) -> Factors:
    """Sums of the factors themselves (PEFT's ``linear``): small, but full of cross terms between the adapters."""
    pairs = [(factors.low_rank(), weight) for factors, weight in terms]
    found = [(pair, weight) for pair, weight in pairs if pair is not None]
    if len(found) < len(pairs) or len({pair.rank for pair, _ in found}) > 1:
        raise AdapterError("linear adds factors of one rank; these differ or are not low-rank: use concat or svd")
    up, down = torch.zeros_like(found[0][0].up.float()), torch.zeros_like(found[0][0].down.float())
    for pair, weight in found:
        size = math.sqrt(abs(weight * pair.scale))
        up += pair.up.float().view_as(up) * math.copysign(size, weight * pair.scale)
        down += pair.down.float().view_as(down) * size
    return _pair(up.flatten(1), down)


def ties(terms: Terms, recipe: Recipe, generator: torch.Generator) -> Factors:
    """TIES (Yadav et al. 2023): trim each change, elect a sign per element, sum what agrees; then SVD to the rank."""
    changes = torch.stack([_trimmed(change, recipe.density) for change in _weighted(terms)])
    sign = changes.sum(0).sign()
    return _shrunk((changes * (changes.sign() == sign)).sum(0), terms, recipe)


def dare(terms: Terms, recipe: Recipe, generator: torch.Generator) -> Factors:
    """DARE (Yu et al. 2024): drop elements at random and rescale the rest by 1/density, sum; then SVD to the rank."""
    total = sum(
        change * torch.empty_like(change).bernoulli_(recipe.density, generator=generator) / recipe.density
        for change in _weighted(terms)
    )
    return _shrunk(torch.as_tensor(total), terms, recipe)


def magnitude(terms: Terms, recipe: Recipe, generator: torch.Generator) -> Factors:
    """Magnitude pruning (Han et al. 2015): keep each change's largest elements, sum; then SVD to the rank."""
    return _shrunk(torch.stack([_trimmed(change, recipe.density) for change in _weighted(terms)]).sum(0), terms, recipe)


METHODS: Mapping[str, Callable[[Terms, Recipe, torch.Generator], Factors]] = {
    "concat": concat,
    "svd": svd,
    "linear": linear,
    "ties": ties,
    "dare": dare,
    "magnitude": magnitude,
}
"""How several changes of one layer become one; only ``concat`` is exact."""


def _check(adapters: Sequence[tuple[Adapter, float]], how: str, recipe: Recipe) -> None:
    if how not in (*METHODS, "klora"):
        raise AdapterError(f"no way to combine is called {how!r}; choose one of {', '.join(METHODS)}, klora")
    if not adapters:
        raise AdapterError("no adapters to combine; give at least one")
    if recipe.rank is not None and recipe.rank < 1:
        raise AdapterError(f"rank {recipe.rank}; expected 1 or more")
    if not 0 < recipe.density <= 1:
        raise AdapterError(f"density {recipe.density}; expected a share above 0, at most 1")
    if any(not math.isfinite(weight) for _, weight in adapters):
        raise AdapterError(f"weights {[weight for _, weight in adapters]}; expected finite numbers")
    if sum(bool(adapter.extras) for adapter, _ in adapters) > 1:
        raise AdapterError(
            "several adapters carry extras such as classifier heads, which cannot be summed; drop all but one"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for adapter, _ in adapters:
        for name, factors in adapter.layers.items():
            if factors.size is not None and shapes.setdefault(name, factors.size) != factors.size:
                raise AdapterError(
                    f"{name} is {shapes[name]} in one and {factors.size} in another: made for different bases"
                )
            if factors.needs_base:
                kind = type(factors).__name__
                raise AdapterError(
                    f"{name} is {kind}, which depends on the base weight; name that base, or blend it on a model"
                )


def _one_layer(terms: Terms, how: str, recipe: Recipe, generator: torch.Generator) -> Factors:
    """The layer's one change; biases are summed, changes of biases alone pass through."""
    shifts = [(factors.bias_delta(), weight) for factors, weight in terms]
    total = [shift.flatten() * weight for shift, weight in shifts if shift is not None]
    bias = torch.stack(total).sum(0) if total else None
    weights = [
        (factors, weight) for factors, weight in terms if not (isinstance(factors, Full) and factors.diff is None)
    ]
    if not weights:
        return Full(bias=bias)
    if weights[0][0].delta().dim() == 1:
        return Full(bias=bias, diff=sum_of(weights))
    found = METHODS[how](weights, recipe, generator)
    if bias is None:
        return found
    if isinstance(found, LowRank):
        return LowRank(found.down, found.up, found.alpha, bias=bias)
    return Full(bias=bias, diff=found.delta())


def _heavy(terms: Terms) -> Terms:
    """The terms that change the weight, not the bias alone."""
    return [(factors, weight) for factors, weight in terms if not (isinstance(factors, Full) and factors.diff is None)]


def _pair(up: Tensor, down: Tensor) -> LowRank:
    """up [O, R] and down [R, I(, K, K)] as factors that are scaled by 1."""
    rank = down.shape[0]
    return LowRank(down.contiguous(), up.reshape(-1, rank, *(1,) * (down.dim() - 2)).contiguous(), float(rank))


def _weighted(terms: Terms) -> list[Tensor]:
    """Each change times its weight, all in the most detailed shape among them (a kernel may be flattened)."""
    changes = [factors.delta() * weight for factors, weight in terms]
    shape = max((change.shape for change in changes), key=len)
    return [change.reshape(shape) for change in changes]


def _trimmed(change: Tensor, density: float) -> Tensor:
    """The change with only its largest elements left."""
    count = max(1, round(change.numel() * density))
    kept = torch.zeros_like(change).flatten()
    largest = change.abs().flatten().topk(count).indices
    kept[largest] = change.flatten()[largest]
    return kept.view_as(change)


def _shrunk(total: Tensor, terms: Terms, recipe: Recipe) -> Factors:
    rank = recipe.rank or _largest_rank(terms)
    return svd([(Full(diff=total), 1.0)], Recipe(rank=rank), torch.Generator())


def _largest_rank(terms: Terms) -> int:
    return max(factors.rank or 1 for factors, _ in terms)


def _group(name: str) -> str:
    """The group a layer's error is summed in."""
    part, _, path = name.partition(".")
    if part != "unet":
        return part
    kinds = {"attn": "attention", "ff.": "ff", "resnets": "conv", "samplers": "conv"}
    return f"unet {next((kind for mark, kind in kinds.items() if mark in path.split('attentions')[-1]), 'other')}"
