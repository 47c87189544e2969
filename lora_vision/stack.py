"""Several adapters in one model's layers: what sounds is stacked, silent ones wait beside and cost nothing.

A change of what sounds tells the layers, which copy factors into their stacks (see rooms.py); a change of weights alone
writes numbers into one flat tensor of gains, which the layers see as views. Merging writes the same sum into the
weights and keeps the untouched ones.

Shapes: G rows of weights (1, or one for each row of the batch), L layers of one adapter, O/I/R as in layers.py.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lora_vision.errors import AdapterError, BaseModelError
from lora_vision.factors import Factors, Full, LowRank
from lora_vision.gains import Bank, Loaded, banks
from lora_vision.layers import LoraLayer, base_tensor, check_exact, check_wrappable, place, put, unwrap, wrap
from lora_vision.originals import Keep, Originals, add_pairs
from lora_vision.rooms import Wanted, empty

logger = logging.getLogger(__name__)


class Stack:
    """The adapters of one set of layers. Nothing here decides what should sound: see Blend."""

    def __init__(self, layers: Mapping[str, nn.Module], reserve: Mapping[str, int] | None = None) -> None:
        """A stack without adapters.

        Args:
            layers: True name to module, as ``names.index`` gives them.
            reserve: Layers whose stack is never narrower than that many ranks, so that a compiled model stays valid.
        """
        self.layers = layers
        self.loaded: dict[str, Loaded] = {}
        self.sounding: tuple[str, ...] = ()
        self.merged: dict[str, Tensor] = {}
        self._reserve = dict(reserve or {})
        self._banks: list[Bank] = []
        self._mode = (1, False)
        self._originals = Originals()
        self._numbers = {name: number for number, name in enumerate(layers)}
        for name in self._reserve:
            check_wrappable(name, layers[name])
        for name in self._reserve:
            wrap(layers[name])
            self._want(name)
        self._banks = self._filed()

    def add(self, name: str, changes: Mapping[str, Factors]) -> None:
        """Registers an adapter, silent; its layers can hold it from now on.

        Args:
            name: What to call it.
            changes: True layer name to factors; every one must fit its layer.

        Raises:
            AdapterError: A layer cannot be adapted; nothing was changed.
        """
        pairs: dict[str, LowRank] = {}
        dense: dict[str, Factors] = {}
        for layer, factors in changes.items():
            check_wrappable(layer, self.layers[layer])
            pair = None if isinstance(self.layers[layer], nn.LayerNorm | nn.GroupNorm) else factors.low_rank()
            if pair is None:
                dense[layer] = factors
                continue
            pairs[layer] = pair
            if factors.bias is not None:
                dense[layer] = Full(bias=factors.bias)
        for layer in dense:
            check_exact(layer, self.layers[layer], changes[layer])
        for layer in changes:
            wrap(self.layers[layer])
        self.loaded[name] = Loaded.of(changes, pairs, dense, self._numbers)

    def remove(self, name: str) -> None:
        """Forgets an adapter that is not merged; layers no other adapter uses are plain again."""
        if name in self.sounding:  # what varies is arranged by the next forward only
            self.arrange((other for other in self.sounding if other != name), *self._mode)
        gone = self.loaded.pop(name)
        self._originals.drop_idle()
        used = {layer for other in self.loaded.values() for layer in other.columns} | self._reserve.keys()
        for layer in gone.columns.keys() - used:
            unwrap(self._wrapped(layer))
        for layer in gone.pairs.keys() & used:
            if (held := self._wrapped(layer).lora_held) and any(pair is gone.pairs[layer] for pair in held.pairs):
                empty(self._wrapped(layer))

    def apply(self, weights: Mapping[str, Tensor]) -> None:
        """Lets exactly these adapters sound, at these weights [G, L] (float32, CPU); zeros are silent."""
        weights = {name: value for name, value in weights.items() if bool(value.any())}
        rows = max((value.shape[0] for value in weights.values()), default=1)
        self.arrange(weights, rows)
        self.write(weights)

    @torch.inference_mode(False)
    @torch.no_grad()
    def arrange(self, sounding: Iterable[str], rows: int = 1, fluid: bool = False) -> None:
        """Tells the layers to stack these adapters' factors; a weight for each must be written next.

        Args:
            sounding: Adapter names; those that did not sound before are appended to the stack.
            rows: G, how many different rows of weights there will be.
            fluid: Weights will change often, so dense changes are kept apart instead of summed into one weight.
        """
        before, wanted = self.sounding, dict.fromkeys(sounding)
        mode, self._mode = self._mode, (rows, fluid or rows > 1)
        self.sounding = (*(name for name in before if name in wanted), *sorted(wanted.keys() - set(before)))
        changed = set(before) ^ set(self.sounding)
        known = [self.loaded[name] for name in changed if name in self.loaded]
        if changed:
            self._grow()
            for layer in {layer: None for loaded in known for layer in loaded.pairs}:
                self._want(layer)
            self._banks = self._filed()
        restless = known if mode == self._mode else self.loaded.values()
        for layer in {layer for loaded in restless for layer in loaded.dense}:
            self._arrange_dense(layer)

    @torch.inference_mode(False)
    @torch.no_grad()
    def write(self, weights: Mapping[str, Tensor]) -> None:
        """Sets the weights [G, L] of the sounding adapters: numbers only, no weight moves, nothing recompiles."""
        rows = self._mode[0]
        if any(not bank.fresh(rows) for bank in self._banks):
            self._banks = self._filed()
        if not self.sounding:
            return
        values = torch.cat([weights[name].expand(rows, -1) for name in self.sounding], dim=1)
        for bank in self._banks:
            bank.write(values)
        for layer in {layer for name in self.sounding for layer in self.loaded[name].dense}:
            self._write_dense(layer, weights)

    @torch.no_grad()
    def merge(self, weights: Mapping[str, Tensor], keep: Keep = "device") -> None:
        """Writes exactly these adapters, at these weights [1, L], into the model's weights, from the untouched ones.

        Computed in float32 and rounded once. Adapters that sound must not be among them; see ``restore``.

        Args:
            weights: Adapter name to one weight for each of its layers.
            keep: Where the untouched weights wait: beside the model, in CPU memory, or ``"nowhere"``.

        Raises:
            BaseModelError: The weights are parked by an offload hook, or the untouched ones were not kept.
            AdapterError: Rows have different weights, or the base is quantised.
        """
        self.check_merge(weights)
        touched = {layer for name in {*self.merged, *weights} for layer in self.loaded[name].columns}
        self.merged = dict(sorted(weights.items()))
        for layer in touched:
            self._merge_layer(layer, keep)

    def check_merge(self, weights: Mapping[str, Tensor]) -> None:
        """Nothing, or the reason why ``merge`` would refuse; it touches nothing."""
        if any(value.shape[0] != 1 for value in weights.values()):
            raise AdapterError("different weights for each row cannot be merged; set one weight for all rows first")
        touched = {layer for name in {*self.merged, *weights} for layer in self.loaded[name].columns}
        for layer in touched:
            base_tensor(self._wrapped(layer), "weight")  # refuses a quantised one
            found = (self.loaded[name].dense.get(layer) for name in weights)
            if base_tensor(self._wrapped(layer), "bias") is None and any(
                f and f.bias_delta() is not None for f in found
            ):
                raise AdapterError(f"{layer} has no bias but the adapter adds one: it can be live, not merged")
            if self._wrapped(layer).weight.device.type == "meta":
                raise BaseModelError(f"{layer} is parked by CPU offload; merge before turning offload on, or use live")
            if layer in self._originals.forgotten:
                raise BaseModelError(f"{layer} was merged with keep='nowhere': its untouched weight is gone")

    def restore(self) -> None:
        """Puts every untouched weight back, bit for bit; nothing is merged afterwards.

        Raises:
            BaseModelError: They were not kept.
        """
        if self._originals.forgotten:
            raise BaseModelError("merged with keep='nowhere': the untouched weights are gone; load the base again")
        self.merge({})

    def clear(self) -> None:
        """Takes everything out: merged weights restored (if kept), all layers plain again."""
        if not self._originals.forgotten:
            self.restore()
        self.sounding, self._banks, self.merged, self._reserve = (), [], {}, {}
        self.loaded.clear()
        self._originals.drop_idle()
        for layer in self.layers.values():
            if isinstance(layer, LoraLayer):
                unwrap(layer)

    def _wrapped(self, layer: str) -> LoraLayer:
        module = self.layers[layer]
        assert isinstance(module, LoraLayer), layer
        return module

    def _untouched(self, layer: str, name: str) -> Tensor | None:
        kept = self._originals.get(layer, name)
        return base_tensor(self._wrapped(layer), name) if kept is None else kept

    def _grow(self) -> None:
        """Widens the reserve where the sounding adapters need more, once and with a warning."""
        wider = {}
        for name, held in self._reserve.items():
            needed = sum(self.loaded[a].pairs[name].rank for a in self.sounding if name in self.loaded[a].pairs)
            if needed > held:
                wider[name] = needed
        if wider:
            name, needed = next(iter(wider.items()))
            message = "%s needs %d ranks and exceeds the capacity of %d reserved; a compiled model recompiles once"
            logger.warning(message, name, needed, self._reserve[name])
            self._reserve.update(wider)

    def _want(self, name: str) -> None:
        """Tells a layer what its stack shall hold now."""
        layer, number = self._wrapped(name), self._numbers[name]
        pairs = tuple(self.loaded[a].pairs[name] for a in self.sounding if name in self.loaded[a].pairs)
        wanted = Wanted(pairs, max(sum(pair.rank for pair in pairs), self._reserve.get(name, 0)), number)
        if (down := layer._buffers["lora_down"]) is not None and wanted.width < len(down):
            empty(layer)  # what fell silent takes no memory
        if not wanted.width:
            put(layer, lora_gain=None, lora_rows=None)
        layer.__dict__["lora_wanted"] = wanted if wanted.width else None  # as in wrap(): fast
        if name in self._reserve or (wanted.width and place(layer)[0].type != "cpu"):
            wanted.settle(layer)

    def _filed(self) -> list[Bank]:
        stacked = {name: None for a in self.sounding for name in self.loaded[a].pairs} | dict.fromkeys(self._reserve)
        layers = {self._numbers[name]: self._wrapped(name) for name in stacked}
        sounding = [self.loaded[a] for a in self.sounding]
        return banks(layers, sounding, self._mode[0], self._banks, sparse=not self._reserve)

    def _arrange_dense(self, name: str) -> None:
        """Makes room for the dense changes of a layer: apart when fluid, else nothing (``_write_dense`` sums them)."""
        layer = self._wrapped(name)
        rows, fluid = self._mode
        put(layer, lora_weight=None, lora_bias=None, lora_dense=None, lora_dense_bias=None, lora_share=None)
        if not fluid:
            return
        weight, bias = self._untouched(name, "weight"), self._untouched(name, "bias")
        assert weight is not None
        device, dtype = place(layer)
        found = [self.loaded[a].dense[name] for a in self.sounding if name in self.loaded[a].dense]
        if not found:
            return
        changes = torch.stack([f.delta(weight).to(device, dtype) for f in found])
        biases = torch.zeros(len(found), weight.shape[0], device=device, dtype=dtype)
        for row, factors in zip(biases, found, strict=True):
            if (shift := factors.bias_delta(bias)) is not None:
                row.copy_(shift.flatten())
        share = torch.zeros(rows, len(found), device=device, dtype=dtype)
        put(layer, lora_dense=changes, lora_dense_bias=biases, lora_share=share)

    def _write_dense(self, name: str, weights: Mapping[str, Tensor]) -> None:
        layer = self._wrapped(name)
        found = [(a, self.loaded[a].dense[name]) for a in self.sounding if name in self.loaded[a].dense]
        columns = torch.stack([weights[a][:, self.loaded[a].columns[name]].expand(self._mode[0]) for a, _ in found], 1)
        if layer.lora_share is not None:
            layer.lora_share.copy_(columns)
            return
        parts = [(factors, float(share)) for (_, factors), share in zip(found, columns[0], strict=True)]
        device, dtype = place(layer)
        weight, bias = self._dense_sum(name, parts)
        put(
            layer,
            lora_weight=None if weight is None else weight.to(device, dtype),
            lora_bias=None if bias is None else bias.to(device, dtype),
        )

    def _dense_sum(self, name: str, parts: list[tuple[Factors, float]]) -> tuple[Tensor | None, Tensor | None]:
        """The layer's present weight and bias plus these changes, float32; None where nothing changes."""
        layer = self._wrapped(name)
        weight, bias = base_tensor(layer, "weight"), base_tensor(layer, "bias")
        base, base_bias = self._untouched(name, "weight"), self._untouched(name, "bias")
        assert weight is not None and base is not None
        total: Tensor | None = None
        shift: Tensor | None = None
        for factors, share in parts:
            if not (isinstance(factors, Full) and factors.diff is None):
                total = weight.float() if total is None else total
                total = total.add(factors.delta(base).to(total.device), alpha=share)
            if (extra := factors.bias_delta(base_bias)) is not None:
                start = torch.zeros(len(base)) if bias is None else bias.float()
                shift = (start if shift is None else shift).add(extra.to(start.device).flatten(), alpha=share)
        return total, shift

    def _merge_layer(self, name: str, keep: Keep) -> None:
        """Weight and bias = untouched + every merged change, float32, rounded once."""
        layer = self._wrapped(name)
        parts, pairs = [], []
        for adapter, weights in self.merged.items():
            loaded = self.loaded[adapter]
            if name not in loaded.columns:
                continue
            share = float(weights[0, loaded.columns[name]])
            if name in loaded.pairs and share:
                pairs.append((loaded.pairs[name], share))
            if name in loaded.dense and share:
                parts.append((loaded.dense[name], share))
        self._originals.put_back(name, layer)
        weight, bias = self._dense_sum(name, parts)
        if pairs or weight is not None:
            self._originals.save(name, layer, "weight", keep)
        if bias is not None:
            self._originals.save(name, layer, "bias", keep)
            layer.bias.data.copy_(bias)
        if pairs:
            add_pairs(layer.weight.data if weight is None else weight, pairs)
        if weight is not None:
            layer.weight.data.copy_(weight)
