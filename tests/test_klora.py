"""K-LoRA: each attention layer is one adapter's at each step, the style's ever more of them."""

from __future__ import annotations

import pytest
import torch
from kinds import adapter
from test_blend import Blended

from lora_vision.adapter import Adapter
from lora_vision.combine import combine
from lora_vision.errors import AdapterError
from lora_vision.factors import Full, LowRank
from lora_vision.klora import ALPHA, BETA, turning_points
from lora_vision.schedules import Moment, klora

LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn{}.to_q"


def test_turning_points_are_the_papers() -> None:
    """Section 3 written out: Top-K sums, K the product of the ranks, the style's times alpha t + beta, over gamma."""
    g = torch.Generator().manual_seed(0)
    pairs = [
        {LAYER.format(n): LowRank(torch.randn(2, 9, generator=g), torch.randn(7, 2, generator=g), 2.0) for n in (1, 2)}
        for _ in range(2)
    ]
    points = turning_points(*map(Adapter, pairs))
    deltas = [{name: pair.delta().abs() for name, pair in each.items()} for each in pairs]
    gamma = sum(float(deltas[0][n].sum() / deltas[1][n].sum()) for n in points) / 2
    for name, point in points.items():
        tops = [float(each[name].flatten().sort(descending=True).values[:4].sum()) for each in deltas]
        for progress in (point - 0.01, point + 0.01):
            styles = tops[1] * (ALPHA * progress + BETA) > tops[0] / gamma
            assert styles == (progress > point)


def test_scales_do_not_matter_and_equals_share() -> None:
    one = Adapter({LAYER.format(1): Full(diff=torch.ones(3, 3))})
    louder = Adapter({LAYER.format(1): Full(diff=torch.full((3, 3), 50.0))})
    points = [turning_points(a, b) for a, b in ((one, one), (louder, one), (one, louder))]
    assert all(point[LAYER.format(1)] == pytest.approx(1 / 3) for point in points)
    silent = Adapter({LAYER.format(1): Full(diff=torch.zeros(3, 3))})
    assert turning_points(one, silent)[LAYER.format(1)] > 1 and turning_points(silent, one)[LAYER.format(1)] < 0
    with pytest.raises(AdapterError, match="none in common"):
        turning_points(one, Adapter({LAYER.format(2): Full(diff=torch.ones(3, 3))}))


@torch.no_grad()
def test_each_step_takes_each_layer_from_one_adapter() -> None:
    """On a model: the output is that of the changes picked by hand; layers out of attention sound in both."""
    job = Blended()
    layers = {name: layer for name, layer in job.layers.items() if name.startswith("unet.")}
    pair = {"fox": adapter(layers, seed=1), "ink": adapter(layers, seed=2)}
    schedules, points = klora(pair), turning_points(*pair.values())
    assert 0 < len(points) < len(layers)
    middle = sorted(points.values())[len(points) // 2]
    moment = Moment(round(1000 * middle), 1001)
    factors = {name: schedule(moment) for name, schedule in schedules.items()}
    assert all(factors["fox"][name] + factors["ink"][name] == 1 for name in points)
    assert {0, 1} == set(factors["fox"].values())
    kept = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    for key, one in pair.items():
        job.blend.load(one, key, scale=0)
        for name, change in one.layers.items():
            layers[name].weight.data += 0.5 * factors[key].get(name, 1.0) * change.delta(kept[name])
    expected = job.look()
    for name, layer in layers.items():
        layer.weight.data = kept[name]

    class Pipe:
        """As much of a pipeline as a schedule needs."""

        scheduler = type("Scheduler", (), {"timesteps": torch.linspace(999, 0, 5)})()

    job.blend.pipe = Pipe()
    job.t = torch.tensor([499.5, 499.5])  # half way
    half = {name: schedule(Moment(2, 5)) for name, schedule in schedules.items()}
    job.blend.set({"fox": 0.5, "ink": 0.5}, schedule=klora(pair))
    live = job.look()
    job.blend.set({name: {"*": 0.5} | {n: 0.5 * f for n, f in half[name].items()} for name in pair})
    assert torch.allclose(job.look(), live, atol=1e-4)
    job.t = torch.tensor([10, 500])
    job.blend.set({name: {"*": 0.5} | {n: 0.5 * f for n, f in factors[name].items()} for name in pair})
    assert torch.allclose(job.look(), expected, atol=1e-4)


def test_a_file_is_shared_out_half_way() -> None:
    layers = Blended().layers
    pair = [(adapter(layers, seed=1), 0.8), (adapter(layers, seed=2), 0.5)]
    found = combine(pair, "klora")
    points = turning_points(pair[0][0], pair[1][0])
    for name, factors in found.adapter.layers.items():
        both = [one.layers[name].delta() * weight for one, weight in pair]
        picked = both[1] if points.get(name, 0) <= 0.5 else both[0]
        expected = picked if name in points else both[0] + both[1]
        assert torch.allclose(factors.delta(), expected.view_as(factors.delta()), atol=1e-5)
    assert found.errors["unet conv"] < 1e-5 < found.errors["unet attention"]
    with pytest.raises(AdapterError, match="two adapters"):
        combine(pair[:1], "klora")
