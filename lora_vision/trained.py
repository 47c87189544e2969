"""What a layer learns while it is trained: the first values of each variant, and their place in a wrapped layer.

A plain pair sits in the layer itself, on the fast path. Everything else is a Trained module in the layer's
``lora_trained``: parameters whose factors are differentiable, so that what is trained is what is saved.

Shapes: O/I output/input features, R rank, K kernel.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lora_vision.config import ChangeConfig, LoraConfig
from lora_vision.errors import AdapterError
from lora_vision.factors import Dora, Factors, Hadamard, Kronecker, LowRank
from lora_vision.layers import LoraLayer, put
from lora_vision.quantised import Quantised
from lora_vision.targets import select

F = TypeVar("F", bound=Factors)
UPS = ("up", "inner.up")


@dataclass(frozen=True)
class Plan:
    """The numbers of one layer: rank, alpha, and what its learning rate is multiplied by."""

    rank: int
    alpha: float
    rate: float = 1.0


def plans(config: LoraConfig, layers: Mapping[str, nn.Module]) -> dict[str, Plan]:
    """The plan of each layer that is to be trained, by true name, in the model's order.

    Raises:
        AdapterError: A target or a line of ``config.layers`` matches nothing or makes no sense, or the variant needs
            weights that are quantised.
    """
    chosen = {name: layers[name] for name in select(config.targets, layers)}
    if config.variant not in ("lora", "rslora") and any(isinstance(layer, Quantised) for layer in chosen.values()):
        raise AdapterError(
            f"{config.variant} computes with the base's weights, which are quantised; use lora or rslora"
        )
    values: dict[str, dict[str, float]] = {name: {} for name in chosen}
    for line in config.layers:
        terms, numbers = _line(line)
        for name in select(terms, chosen):
            values[name] |= numbers
    return {name: _plan(name, found, config) for name, found in values.items()}


def _line(line: str) -> tuple[str, dict[str, float]]:
    """The layers and the numbers of "conv:rank=8,alpha=4"."""
    terms, colon, rest = line.rpartition(":")
    pairs = [word.partition("=") for word in rest.split(",")]
    try:
        numbers = {name.strip(): float(value) for name, _, value in pairs}
    except ValueError:
        numbers = {}
    if not colon or not numbers or not numbers.keys() <= {"rank", "alpha", "rate"}:
        raise AdapterError(f"layers {line!r}: expected layers, a colon and numbers, as in conv:rank=8,alpha=4,rate=0.5")
    return terms, numbers


def _plan(name: str, values: Mapping[str, float], config: LoraConfig) -> Plan:
    rank = values.get("rank", config.rank)
    alpha = values.get("alpha", rank if config.alpha is None else config.alpha)
    rate = values.get("rate", 1.0)
    start = config.variant == "pissa" and not alpha > 0
    if rank < 1 or rank != int(rank) or not math.isfinite(alpha) or start or not 0 <= rate < math.inf:
        raise AdapterError(
            f"{name}: rank {rank:g}, alpha {alpha}, rate {rate}; expected a whole rank of at least 1, "
            "a finite alpha (pissa: above 0) and a rate of at least 0"
        )
    return Plan(int(rank), float(alpha), rate)


def fresh(variant: str, weight: Tensor, plan: Plan, generator: torch.Generator) -> Factors:
    """The first factors of a layer, float32 on the weight's device; their change is zero (PiSSA's: see Trained).

    Args:
        variant: A kind that ``ChangeConfig.variant`` names.
        weight: The layer's weight [O, I] or [O, I, K, K].
        plan: Rank and alpha.
        generator: Of the random values, on the CPU.
    """
    shape, rank, alpha = weight.shape, plan.rank, plan.alpha
    if variant == "loha":
        return _moved(_loha(tuple(shape), rank, alpha, generator), weight)
    if variant == "lokr":
        return _moved(_lokr(tuple(shape), rank, alpha, generator), weight)
    if variant == "pissa":
        down, up = _principal(weight.detach().float().flatten(1), rank, generator)
        root = math.sqrt(rank / alpha)
        return LowRank((down * root).reshape(-1, *shape[1:]), _as_up(up * root, shape), alpha)
    pair = LowRank(_kaiming((rank, *shape[1:]), generator), _as_up(torch.zeros(shape[0], rank), shape), alpha)
    if variant == "rslora":
        pair = replace(pair, alpha=alpha * math.sqrt(rank))
    pair = _moved(pair, weight)
    if variant != "dora":
        return pair
    length = weight.detach().float().flatten(1).norm(dim=1) + torch.finfo(torch.float32).eps  # as Dora.delta has it
    return Dora(pair, length)


def _kaiming(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as kohya, PEFT and LyCORIS start."""
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _as_up(up: Tensor, shape: torch.Size) -> Tensor:
    return up.reshape(*up.shape, *(1,) * (len(shape) - 2))


def _moved(factors: F, weight: Tensor) -> F:
    return mapped(factors, lambda tensor: tensor.to(weight.device))


def _loha(shape: tuple[int, ...], rank: int, alpha: float, generator: torch.Generator) -> Hadamard:
    """LyCORIS' start: normal with 1 and 0.1, and one zero factor."""
    rows, columns = shape[0], math.prod(shape[1:])
    normal = [torch.randn(size, generator=generator) for size in ((rows, rank), (rank, columns), (rank, columns))]
    return Hadamard(normal[0] * 0.1, normal[1], torch.zeros(rows, rank), normal[2], alpha, shape=shape)


def _lokr(shape: tuple[int, ...], rank: int, alpha: float, generator: torch.Generator) -> Kronecker:
    """LyCORIS' start: sizes split near their square roots, the second factor zero, and a pair where that is smaller."""
    (o1, o2), (i1, i2) = _split(shape[0]), _split(shape[1])
    first = _kaiming((o1, i1), generator)
    if rank >= max(o2, i2) / 2:
        return Kronecker(alpha=alpha, w1=first, w2=torch.zeros(o2, i2, *shape[2:]), shape=shape)
    left, right = _kaiming((o2, rank), generator), torch.zeros(rank, i2 * math.prod(shape[2:]))
    return Kronecker(alpha=alpha, w1=first, w2_a=left, w2_b=right, shape=shape)


def _split(size: int) -> tuple[int, int]:
    """The two divisors nearest to the square root, the smaller one first."""
    small = next(n for n in range(math.isqrt(size), 0, -1) if size % n == 0)
    return small, size // small


def _principal(weight: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The pair of the largest singular values [R, N], [O, R] (PiSSA, Meng et al. 2024, eq. 2 and 3).

    Found by power iterations on a random subspace (Halko et al. 2011), since whole decompositions take minutes.
    """
    start = torch.randn(weight.shape[1], min(rank + 16, *weight.shape), generator=generator).to(weight.device)
    for _ in range(8):
        start = torch.linalg.qr(weight.T @ torch.linalg.qr(weight @ start)[0])[0]
    left, values, right = torch.linalg.svd(weight @ start, full_matrices=False)
    root = values[:rank].sqrt()
    down, up = root[:, None] * (right[:rank] @ start.T), left[:, :rank] * root
    missing = rank - len(root)  # a rank beyond the weight's own
    return nn.functional.pad(down, (0, 0, 0, missing)), nn.functional.pad(up, (0, missing))


class Trained(nn.Module):
    """A layer's change as parameters, for every variant but the plain pair.

    PiSSA starts from the weight's own principal values: its change is the difference to that start, a pair of twice
    the rank, so that the base's weights stay as they are and the file is a LoRA like any other.

    Attributes:
        factors: The change whose tensors are this module's parameters.
        start: What PiSSA began with, frozen; None for the others.
    """

    def __init__(self, factors: Factors, config: ChangeConfig) -> None:
        """The parameters with these first values."""
        super().__init__()
        self.start = mapped(factors, torch.Tensor.clone) if config.variant == "pissa" else None
        self.factors = mapped(factors, nn.Parameter)
        for name, parameter in self.factors.tensors().items():
            self.register_parameter(name.replace(".", "_"), cast(nn.Parameter, parameter))
        self.rank_dropout, self.module_dropout = config.rank_dropout, config.module_dropout

    def change(self, keep: Tensor | None = None) -> Factors:
        """The change there is now, with those ranks only that keep [R] does not set to zero."""
        now: Factors = _kept(self.factors, keep)
        start = _kept(self.start, keep)
        if not isinstance(now, LowRank) or not isinstance(start, LowRank):
            return now
        down, up = torch.cat([now.down, start.down]), torch.cat([now.up, -start.up], 1)
        return LowRank(down, up, 2 * now.alpha)

    def forward(self, layer: LoraLayer, x: Tensor) -> Tensor:
        """The layer's output for x, change included; where gradients are enabled, dropouts act."""
        keep: Tensor | None = None
        share = 1.0
        if torch.is_grad_enabled() and (self.rank_dropout or self.module_dropout):
            count = self.factors.rank or layer.weight.shape[0]
            draws = torch.rand(count + 1)  # from torch's global generator, which the training loop seeds
            keep = (draws[1:] >= self.rank_dropout).to(x.device, torch.float32) / (1 - self.rank_dropout)
            share = float(draws[0] >= self.module_dropout)
        change = self.change(keep)
        if isinstance(change, LowRank):
            return layer.with_pair(x, change.down, change.up.flatten(1), change.scale * share)
        with torch.autocast(x.device.type, enabled=False):
            delta = change.delta(layer.weight) * share
        if layer.weight.dtype == torch.float32:
            return layer._apply_dense(x, layer.weight + delta, layer.bias)
        return layer._apply_dense(x, layer.weight, layer.bias) + layer._apply_dense(x, delta.to(x.dtype), None)


def _kept(factors: Any, keep: Tensor | None) -> Any:
    """The factors with each rank multiplied by keep [R]; where there is no rank, each row of the second factor."""
    if keep is None or factors is None:
        return factors
    if isinstance(factors, Dora):
        return replace(factors, inner=_kept(factors.inner, keep))
    field = {LowRank: "down", Hadamard: "w1_b"}.get(type(factors), "w2" if factors.rank is None else "w2_b")
    tensor = getattr(factors, field)
    return replace(factors, **{field: tensor * keep[: len(tensor)].view(-1, *(1,) * (tensor.dim() - 1))})


def mapped(factors: F, function: Callable[[Tensor], Tensor]) -> F:
    """The factors with every tensor passed through the function."""
    changed: dict[str, Any] = {n: function(t) for n, t in factors.tensors().items() if "." not in n}
    if isinstance(factors, Dora):
        changed["inner"] = mapped(factors.inner, function)
    return replace(factors, **changed)


def is_trained(layer: nn.Module) -> bool:
    """Whether this layer holds something that is trained."""
    return isinstance(layer, LoraLayer) and (
        layer.lora_trained is not None or isinstance(layer.lora_down, nn.Parameter)
    )


def factors_of(layer: LoraLayer) -> Factors:
    """The factors of a trained layer whose tensors are its parameters."""
    if layer.lora_trained is not None:
        return layer.lora_trained.factors  # type: ignore[no-any-return]
    assert layer.lora_down is not None and layer.lora_up is not None  # is_trained() was asked
    return LowRank(layer.lora_down, layer.lora_up, layer.lora_alpha)


@torch.no_grad()
def limit_norms(layers: Mapping[str, nn.Module], most: float) -> None:
    """Shrinks the changes whose Frobenius norm is above `most` (kohya's scale_weight_norms), tensors alike."""
    for layer in layers.values():
        if not isinstance(layer, LoraLayer) or not is_trained(layer):
            continue
        factors = factors_of(layer)
        inner = factors.inner if isinstance(factors, Dora) else factors
        if isinstance(inner, LowRank):
            up, down = inner.up.flatten(1), inner.down.flatten(1)
            norm = abs(inner.scale) * ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt()
        else:
            norm = inner.delta().norm()
        tensors = inner.tensors().values()
        for tensor in tensors:
            tensor.mul_((most / norm).clamp(max=1.0) ** (1 / len(tensors)))


@contextmanager
def silenced(parts: Mapping[str, nn.Module]) -> Iterator[None]:
    """A context in which what is trained does nothing: the model is its base."""
    layers = [layer for part in parts.values() for layer in part.modules() if is_trained(layer)]
    held = [(layer, layer.lora_down, layer.lora_up, layer.lora_trained) for layer in cast(list[LoraLayer], layers)]
    for layer, *_ in held:
        put(layer, lora_down=None, lora_up=None)
        layer.lora_trained = None
    try:
        yield
    finally:
        for layer, down, up, trained in held:
            put(layer, lora_down=down, lora_up=up)
            layer.lora_trained = trained
