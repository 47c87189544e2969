"""approximate: any change as a low-rank pair, by singular values, with the error it costs."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from lora_vision.adapter import Adapter
from lora_vision.errors import AdapterError
from lora_vision.factors import Dora, Factors, LowRank
from lora_vision.spectrum import spectrum


def approximate(
    adapter: Adapter, rank: int, base: Mapping[str, Tensor] | None = None
) -> tuple[Adapter, dict[str, float]]:
    """Returns (adapter of plain LoRA layers, relative error of each layer that changed its form).

    Layers that are a LoRA pair already stay untouched, whatever their rank. The others become the best pair of at most
    this rank (Eckart and Young 1936); the error is the Frobenius norm of what is lost over that of the change.

    Args:
        adapter: what to approximate.
        rank: the largest rank of a new pair.
        base: true layer name -> untouched weight; needed where a change multiplies the base (DoRA, (IA)3).

    Raises:
        AdapterError: the rank is below 1, a change needs the base, or is no matrix (biases and norms).
    """
    if rank < 1:
        raise AdapterError(f"rank {rank}; expected at least 1")
    layers: dict[str, Factors] = {}
    errors: dict[str, float] = {}
    for name, factors in adapter.layers.items():
        if isinstance(factors, LowRank) and factors.mid is None and factors.bias is None:
            layers[name] = factors
            continue
        try:
            layers[name], errors[name] = _pair(factors, rank, None if base is None else base.get(name))
        except AdapterError as error:
            raise AdapterError(f"layer {name}: {error}") from None
    return replace(adapter, layers=layers), errors


def _pair(factors: Factors, rank: int, base: Tensor | None) -> tuple[LowRank, float]:
    """Returns (pair, relative error) for one layer's change."""
    inner = factors.inner if isinstance(factors, Dora) else factors
    if factors.bias is not None or inner.bias is not None:
        raise AdapterError("it changes the bias too, which no low-rank pair can")
    exact = factors.low_rank()
    if exact is not None and exact.rank <= rank:
        return exact, 0.0
    if factors.size is not None and factors.size[1] == 1:
        raise AdapterError("it changes a norm, which no low-rank pair can")
    found = spectrum(factors, base)
    return found.pair(rank), found.lost(rank)
