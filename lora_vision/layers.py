"""The equation every wrapped layer computes: ``y = W x + up · (gain ⊙ (down · x))``.

A base layer becomes a LoraLinear, LoraConv2d, LoraEmbedding, LoraLayerNorm or LoraGroupNorm by changing its class in
place: its name, parameters, ``isinstance`` and ``state_dict`` keys stay. What sounds is stacked: R is the sum of the
ranks of all sounding adapters, so any number of them costs one pair of matrix products. What is not low-rank enters as
one effective weight, computed beforehand. With neither, the layer is the base, bit for bit.

Shapes: B batch, T tokens, I/O in/out features, R stacked rank, G rows of gains (1, or one for each row of the batch).
"""

from types import MethodType
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from lora_vision.errors import AdapterError
from lora_vision.factors import Factors
from lora_vision.quantised import Quantised, QuantisedConv2d, QuantisedLinear

STATE: tuple[str, ...] = ("lora_down", "lora_up", "lora_gain", "lora_rows")
STATE += ("lora_weight", "lora_bias", "lora_dense", "lora_dense_bias", "lora_share")


class LoraLayer(nn.Module):
    """What a wrapped layer holds beside its base.

    Everything is a buffer outside ``state_dict()``, except that ``inject`` makes ``lora_down`` and ``lora_up``
    parameters: then ``lora_gain`` is None and alpha/rank takes its place.

    Attributes:
        lora_down: Stacked [R, I], convolutions [R, I, K, K], embeddings [R, width]; None when nothing low-rank sounds.
            What sounds is told by ``stacked`` alone: it may still wait to be copied here.
        lora_up: Stacked [O, R]; embeddings [vocabulary, R].
        lora_gain: What each stacked rank is multiplied by [G, R]: alpha/rank times the user's scale.
        lora_rows: Which ranks each row takes at all [G, S], when that is less than half of them; None for all.
        lora_alpha: Alpha of the trained pair; it is scaled by alpha/rank.
        lora_weight, lora_bias: What the layer uses instead of its weight and bias, or None.
        lora_dense, lora_dense_bias: Dense changes [D, *weight] and [D, O] that differ between rows, or None.
        lora_share: How much of each dense change each row takes [G, D], or None.
        lora_trained: What is trained instead of a plain pair (``trained.Trained``), or None.
        lora_wanted: What shall be in the stack (``rooms.Wanted``) from the next forward on, or None if it is there.
        lora_held: What is in the stack and how it lies in memory (``rooms.Held``), or None.
    """

    weight: Any  # Parameter, or Parameter | None: the base classes differ
    bias: Any
    lora_down: Tensor | None
    lora_up: Tensor | None
    lora_gain: Tensor | None
    lora_rows: Tensor | None
    lora_alpha: float
    lora_weight: Tensor | None
    lora_bias: Tensor | None
    lora_dense: Tensor | None
    lora_dense_bias: Tensor | None
    lora_share: Tensor | None
    lora_trained: Any  # nn.Module | None
    lora_wanted: Any
    lora_held: Any

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: factors and gains without the memory around them that they are views of."""
        self.stacked()
        held = {name: None if buffer is None else buffer.clone() for name, buffer in self._buffers.items()}
        return {**self.__dict__, "_buffers": held, "lora_held": None}

    def stacked(self) -> tuple[Tensor | None, Tensor | None]:
        """Down and up of what sounds; copied together first, if that was left for later."""
        wanted = self.lora_wanted  # once: another thread may be settling it
        if wanted is not None:
            if _is_recorded():
                return cast("tuple[Tensor, Tensor]", wanted.joined(self))
            wanted.settle(self)
        return self.lora_down, self.lora_up

    @property
    def lora_width(self) -> int:
        """R, of what ``stacked`` gives."""
        if self.lora_wanted is not None:
            return cast(int, self.lora_wanted.width)
        return 0 if self.lora_down is None else len(self.lora_down)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.lora_wanted is not None and place(self)[0].type not in ("cpu", "meta"):
            self.lora_wanted.settle(self)  # or a compiled model would bring the factors there in every call
        return self

    def _effective(self) -> tuple[Tensor, Tensor | None]:
        weight = self.weight if self.lora_weight is None else self.lora_weight
        return weight, self.bias if self.lora_bias is None else self.lora_bias

    def _dense_rows(self, x: Tensor, y: Tensor) -> Tensor:
        """y plus the dense changes, each taken by each row to its share."""
        if self.lora_dense is None or self.lora_dense_bias is None or self.lora_share is None:
            return y
        for change, bias, share in zip(self.lora_dense, self.lora_dense_bias, self.lora_share.unbind(1), strict=True):
            y = y + self._apply_dense(x, change, bias) * share.view(-1, *(1,) * (y.dim() - 1))
        return y

    def with_pair(self, x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
        """The layer with one trainable float32 pair, computed in the base's (or autocast's) dtype."""
        raise NotImplementedError

    def _apply_dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError


class LoraLinear(LoraLayer, nn.Linear):
    """A linear layer with adapters. Input [B, T, I] or [B, I], output [B, T, O] or [B, O]."""

    def forward(self, input: Tensor) -> Tensor:
        (down, up), gain = self.stacked(), self.lora_gain
        if down is None or up is None:
            y = self._plain(input) if self.lora_trained is None else self.lora_trained(self, input)
        elif gain is None:
            y = self.with_pair(input, down, up, self.lora_alpha / down.shape[0])
        elif self.lora_rows is not None:
            flat = self._plain(input.reshape(-1, input.shape[-1]))
            y = _own_ranks(flat, input, down, up, gain, self.lora_rows).view(*input.shape[:-1], -1)
        else:
            rank = F.linear(input, down)
            rank = _scaled(rank, gain if gain.shape[0] == 1 else gain.view(-1, *(1,) * (rank.dim() - 2), gain.shape[1]))
            flat = self._plain(input.reshape(-1, input.shape[-1]))
            flat = _accumulated(flat, rank.reshape(-1, rank.shape[-1]), up.t())
            y = flat.view(*input.shape[:-1], -1)
        return y if self.lora_dense is None else self._dense_rows(input, y)

    def with_pair(self, x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
        """The layer with one trainable float32 pair, computed in the base's (or autocast's) dtype."""
        flat, device = x.reshape(-1, x.shape[-1]), x.device.type
        if torch.is_autocast_enabled(device):
            flat = flat.to(torch.get_autocast_dtype(device))  # once for both products
        y = self._plain(flat)
        rank = F.linear(flat, down.to(flat.dtype))
        y.addmm_(rank, up.to(y.dtype).t(), alpha=scale)  # in place: no gradient needs y as it was
        return y.view(*x.shape[:-1], -1)

    def _plain(self, x: Tensor) -> Tensor:
        return F.linear(x, *self._effective())

    def _apply_dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class LoraConv2d(LoraLayer, nn.Conv2d):
    """A convolution with adapters. Input [B, I, H, W], output [B, O, H, W]; ``up`` is a 1x1 convolution."""

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor
        (down, up), gain = self.stacked(), self.lora_gain
        if down is None or up is None:
            y = self._plain(input) if self.lora_trained is None else self.lora_trained(self, input)
        elif gain is None:
            y = self.with_pair(input, down, up, self.lora_alpha / down.shape[0])
        else:
            y = self._plain(input)
            rank = _scaled(self._conv_forward(input, down, None), gain[:, :, None, None])
            y = _accumulated_conv(y, rank, up)
        return y if self.lora_dense is None else self._dense_rows(input, y)

    def with_pair(self, x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
        """The layer with one trainable float32 pair, computed in the base's (or autocast's) dtype."""
        y = self._plain(x)
        rank = self._conv_forward(x, down.to(x.dtype), None)
        return _accumulated_conv(y, rank, up.to(y.dtype), scale)

    def _plain(self, x: Tensor) -> Tensor:
        return cast(Tensor, self._conv_forward(x, *self._effective()))

    def _apply_dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return cast(Tensor, self._conv_forward(x, weight, bias))


class LoraEmbedding(LoraLayer, nn.Embedding):
    """An embedding with adapters. Input [B, T], output [B, T, width]."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight if self.lora_weight is None else self.lora_weight
        y = self._look_up(input, weight)
        (down, up), gain = self.stacked(), self.lora_gain
        if down is not None and up is not None:
            rank = F.embedding(input, up)
            if gain is None:
                return torch.add(y, (rank @ down).to(y.dtype), alpha=self.lora_alpha / down.shape[0])
            rank = rank * gain.view(gain.shape[0], *(1,) * (rank.dim() - 2), -1)
            flat = _accumulated(y.view(-1, y.shape[-1]), rank.view(-1, rank.shape[-1]), down)
            y = flat.view(y.shape)
        return y if self.lora_dense is None else self._dense_rows(input, y)

    def _look_up(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(x, weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq)

    def _apply_dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._look_up(x, weight)


class LoraLayerNorm(LoraLayer, nn.LayerNorm):
    """A layer norm whose scale and shift are adapted. Input and output [..., C]."""

    def forward(self, input: Tensor) -> Tensor:
        y = F.layer_norm(input, self.normalized_shape, *self._effective(), self.eps)
        return y if self.lora_dense is None else self._dense_rows(input, y)

    def _apply_dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class LoraGroupNorm(LoraLayer, nn.GroupNorm):
    """A group norm whose scale and shift are adapted. Input and output [B, C, ...]."""

    def forward(self, input: Tensor) -> Tensor:
        y = F.group_norm(input, self.num_groups, *self._effective(), self.eps)
        return y if self.lora_dense is None else self._dense_rows(input, y)

    def _apply_dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class LoraQuantisedLinear(LoraLinear, QuantisedLinear):
    """The same over an int8 weight, with low-rank changes only."""

    def _plain(self, x: Tensor) -> Tensor:
        return QuantisedLinear.forward(self, x)


class LoraQuantisedConv2d(LoraConv2d, QuantisedConv2d):
    """The same over int8 weights, with low-rank changes only."""

    def _plain(self, x: Tensor) -> Tensor:
        return QuantisedConv2d.forward(self, x)


WRAPPED: dict[type[nn.Module], type[LoraLayer]] = {
    nn.Linear: LoraLinear,
    QuantisedLinear: LoraQuantisedLinear,
    nn.Conv2d: LoraConv2d,
    QuantisedConv2d: LoraQuantisedConv2d,
    nn.Embedding: LoraEmbedding,
    nn.LayerNorm: LoraLayerNorm,
    nn.GroupNorm: LoraGroupNorm,
}
_BASE = {wrapped: base for base, wrapped in WRAPPED.items()}


def check_wrappable(name: str, module: nn.Module) -> None:
    """Nothing, or the reason why this layer cannot be adapted.

    Raises:
        AdapterError: The class is not exactly a supported one, or its forward was replaced by something else.
    """
    kind = type(module)
    if isinstance(module, LoraLayer):
        return
    if kind not in WRAPPED:
        choices = ", ".join(base.__name__ for base in WRAPPED)
        raise AdapterError(f"{name} is a {kind.__module__}.{kind.__name__}; only plain {choices} layers can be adapted")
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        raise AdapterError(f"{name} is a convolution in {module.groups} groups; only groups=1 can be adapted")
    forward = module.__dict__.get("_old_forward", module.__dict__.get("forward"))
    if forward is not None and getattr(forward, "__func__", None) is not kind.forward:
        raise AdapterError(f"the forward of {name} was replaced by {forward!r}; undo that before adapting the layer")


def check_exact(name: str, module: nn.Module, change: Factors) -> None:
    """Nothing, or the reason why this layer cannot have this change.

    Raises:
        AdapterError: Its weight is quantised, and the change is more than a low-rank pair.
    """
    if isinstance(module, Quantised) and (change.low_rank() is None or change.bias is not None):
        raise AdapterError(
            f"found a change of {name} that is more than a low-rank pair, and a quantised base; use the base as it was "
            "before it was quantised"
        )


def wrap(module: nn.Module) -> LoraLayer:
    """The same module, able to hold adapters; it computes what it did before."""
    if isinstance(module, LoraLayer):
        return module
    _change_class(module, WRAPPED[type(module)])
    layer = cast(LoraLayer, module)
    plain: dict[str, Any] = {"lora_alpha": 0.0, "lora_trained": None, "lora_wanted": None, "lora_held": None}
    layer.__dict__.update(plain)  # Module.__setattr__ is ten times as slow
    layer._buffers.update(dict.fromkeys(STATE))
    layer._non_persistent_buffers_set.update(STATE)
    return layer


def unwrap(layer: LoraLayer) -> nn.Module:
    """The same module as it was before ``wrap``; its adapters are gone."""
    hooks = _offload_hooks(layer)
    for name in STATE:
        layer._buffers.pop(name, None)
        layer._parameters.pop(name, None)
        layer._non_persistent_buffers_set.discard(name)
        for hook in hooks:
            hook.original_devices.pop(name, None)
    del layer.lora_alpha, layer.lora_trained, layer.lora_wanted, layer.lora_held
    _change_class(layer, _BASE[type(layer)])
    return layer


def put(layer: LoraLayer, **state: Tensor | None) -> None:
    """Sets parts of a layer's state; an ``nn.Parameter`` becomes trainable, anything else is a buffer."""
    for name, value in state.items():
        if type(value) is not Tensor and isinstance(value, nn.Parameter):
            layer._buffers.pop(name, None)
            layer.register_parameter(name, value)
        else:
            layer._parameters.pop(name, None)
            layer._buffers[name] = value
            layer._non_persistent_buffers_set.add(name)


def place(layer: LoraLayer) -> tuple[torch.device, torch.dtype]:
    """The device and dtype a layer computes in; an offload hook decides the device when the weights are parked."""
    weight = layer.weight
    device = weight.device
    if device.type == "meta":
        devices = [hook.execution_device for hook in _offload_hooks(layer) if hook.execution_device is not None]
        device = torch.device(devices[0]) if devices else device
    return device, layer.scale.dtype if isinstance(layer, Quantised) else weight.dtype


def base_tensor(layer: LoraLayer, name: str) -> Tensor | None:
    """The layer's own ``weight`` or ``bias``, also when an offload hook has parked it; None if it has none.

    Raises:
        AdapterError: The weight is quantised, and so not to be had exactly.
    """
    if name == "weight" and isinstance(layer, Quantised):
        raise AdapterError(
            "found a quantised base, whose weights are not to be had exactly; use the base as it was before, or plain "
            "LoRA without merging"
        )
    tensor = cast("Tensor | None", getattr(layer, name, None))
    if tensor is not None and tensor.device.type == "meta":
        for hook in _offload_hooks(layer):
            if hook.weights_map is not None and name in hook.weights_map:
                return cast(Tensor, hook.weights_map[name])
    return tensor


def _offload_hooks(module: nn.Module) -> list[Any]:
    """Accelerate's hooks on this module that move its weights (recognised without importing accelerate)."""
    hook = module.__dict__.get("_hf_hook")
    hooks = getattr(hook, "hooks", (hook,))
    return [each for each in hooks if getattr(each, "offload", False) and hasattr(each, "original_devices")]


def _change_class(module: nn.Module, to: type[nn.Module]) -> None:
    """Changes the class; a forward that Accelerate's hooks have put aside follows, else they would bypass ours."""
    before = type(module).forward
    for name in ("forward", "_old_forward"):
        held = module.__dict__.get(name)
        if getattr(held, "__func__", None) is before:
            module.__dict__[name] = MethodType(to.forward, module)
    module.__class__ = to


def _is_recorded() -> bool:
    """Whether operations are recorded or transformed now, instead of just run: then no layer may change."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return True
    return is_in_torch_dispatch_mode() or torch._C._functorch.peek_interpreter_stack() is not None


def _scaled(rank: Tensor, gain: Tensor) -> Tensor:
    return rank * gain if rank.requires_grad else rank.mul_(gain)


def _accumulated(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y + a @ b, written into y unless autograd would need a copy of it."""
    return torch.addmm(y, a, b) if y.requires_grad or a.requires_grad else y.addmm_(a.to(y.dtype), b.to(y.dtype))


def _own_ranks(y: Tensor, x: Tensor, down: Tensor, up: Tensor, gain: Tensor, rows: Tensor) -> Tensor:
    """y [B·T, O] plus the pairs of ranks that each row of x [B, T, I] takes: as dear as one adapter, not as all."""
    count = rows.shape[0]
    rank = torch.bmm(x.reshape(count, -1, x.shape[-1]), down[rows].transpose(1, 2))
    rank = _scaled(rank, gain.gather(1, rows)[:, None])
    apart = y.view(count, -1, y.shape[-1])
    total = torch.baddbmm(apart, rank, up.t()[rows]) if y.requires_grad else apart.baddbmm_(rank, up.t()[rows])
    return total.view(y.shape)


def _accumulated_conv(y: Tensor, rank: Tensor, up: Tensor, scale: float = 1.0) -> Tensor:
    """y [B, O, H, W] + scale · up [O, R] applied to rank [B, R, H, W], written into y where possible."""
    if y.is_contiguous():
        flat, right = y.flatten(2), rank.flatten(2).to(y.dtype)
        left = up.to(y.dtype).expand(y.shape[0], -1, -1)
        if y.requires_grad or rank.requires_grad or up.requires_grad:
            return torch.baddbmm(flat, left, right, alpha=scale).view(y.shape)
        flat.baddbmm_(left, right, alpha=scale)
        return y
    channels, ranks = y.permute(0, 2, 3, 1), rank.permute(0, 2, 3, 1)  # channels_last: a plain matrix product
    total = torch.addmm(channels.reshape(-1, y.shape[1]), ranks.reshape(-1, rank.shape[1]), up.t(), alpha=scale)
    return total.view(channels.shape).permute(0, 3, 1, 2)
