"""Combining is linear and says how far it is from the true weighted sum."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kinds import KINDS, adapter
from test_blend import Blended, close
from torch import nn

from lora_vision.adapter import Adapter
from lora_vision.combine import METHODS, Recipe, combine
from lora_vision.errors import AdapterError
from lora_vision.factors import Full, LowRank
from lora_vision.files import save_adapter

LAYERS: dict[str, nn.Module] = {
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": nn.Linear(24, 20),
    "unet.mid_block.resnets.0.conv1": nn.Conv2d(12, 16, 3),
    "text_encoder.text_model.encoder.layers.0.mlp.fc1": nn.Linear(12, 30),
}


def error(name: str, found: Adapter, terms: list[tuple[Adapter, float]]) -> float:
    total = sum(a.layers[name].delta(LAYERS[name].weight) * w for a, w in terms if name in a.layers)
    return float((found.layers[name].delta(LAYERS[name].weight) - total).norm() / torch.as_tensor(total).norm())


@pytest.mark.parametrize("kind", ["lora", "tucker", "loha", "lokr", "full"])
def test_concat_is_exact_for_every_kind(kind: str) -> None:
    terms = [(adapter(LAYERS, kind, seed=1), 0.8), (adapter(LAYERS, "lora", rank=5, seed=2), -0.5)]
    found = combine(terms)
    assert all(error(name, found.adapter, terms) < 1e-5 for name in LAYERS)
    assert set(found.errors) == {"unet attention", "unet conv", "text_encoder", "all"}
    assert all(value < 1e-5 for value in found.errors.values())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_combined_file_is_the_blend(kind: str, tmp_path: Path) -> None:
    """Live = one file made by concat, for every kind of change; DoRA and IA3 with the base at hand."""
    job = Blended()
    layers = {name: layer for name, layer in job.layers.items() if ".attn" in name or ".conv1" in name}
    pair = {"a": adapter(layers, kind, seed=1), "b": adapter(layers, "lora", seed=2)}
    scales = {"a": 0.5, "b": -0.3}
    for name, one in pair.items():
        job.blend.load(one, name)
    job.blend.set(scales)
    live = job.look()
    base = {name: layer.weight for name, layer in layers.items()}
    found = combine([(pair[name], scale) for name, scale in scales.items()], base=base)
    save_adapter(found.adapter, tmp_path / "both.safetensors")
    job.blend.load(tmp_path / "both.safetensors", "both", scale=0)
    job.blend.set({"both": 1.0})
    assert close(job.look(), live) and found.errors["all"] < 1e-5


def test_concat_of_subsets_keeps_every_layer() -> None:
    names = list(LAYERS)
    first, second = ({name: LAYERS[name] for name in some} for some in (names[:2], names[1:]))
    terms = [(adapter(first, seed=1), 1.0), (adapter(second, rank=2, seed=2), 1.0)]
    found = combine(terms).adapter
    assert set(found.layers) == set(names) and found.layers[names[1]].rank == 5
    assert all(error(name, found, terms) < 1e-5 for name in names)


def test_svd_is_the_best_of_its_rank_and_exact_at_the_full_one() -> None:
    terms = [(adapter(LAYERS, rank=4, seed=1), 0.7), (adapter(LAYERS, rank=4, seed=2), 0.6)]
    assert combine(terms, "svd", Recipe(rank=8)).errors["all"] < 1e-5
    found = combine(terms, "svd", Recipe(rank=3))
    for name, layer in LAYERS.items():
        total = sum(a.layers[name].delta(layer.weight) * w for a, w in terms)
        s = torch.linalg.svdvals(torch.as_tensor(total).flatten(1))
        assert error(name, found.adapter, terms) == pytest.approx(float(s[3:].norm() / s.norm()), rel=1e-3)
    dense = combine([(adapter(LAYERS, "full"), 1.0)], "svd", Recipe(rank=3))
    assert isinstance(dense.adapter.layers[next(iter(LAYERS))], LowRank) and 0 < dense.errors["all"] < 1


@pytest.mark.parametrize("how", METHODS)
def test_one_adapter_at_full_density_is_itself(how: str) -> None:
    terms = [(adapter(LAYERS, rank=4, seed=1), -0.7)]
    assert combine(terms, how, Recipe(density=1.0)).errors["all"] < 1e-5


def test_approximations_are_ordered_as_measured_on_peers() -> None:
    terms = [(adapter(LAYERS, rank=4, seed=1), 1.0), (adapter(LAYERS, rank=4, seed=2), 1.0)]
    errors = {how: combine(terms, how).errors["all"] for how in METHODS}
    assert errors["concat"] < 1e-5 < errors["svd"] < min(errors["linear"], errors["ties"], errors["dare"])


def test_ties_keeps_what_agrees_and_dare_keeps_the_mean() -> None:
    one, other = torch.tensor([[1.0, 2.0], [3.0, -4.0]]), torch.tensor([[1.0, -1.0], [0.5, -4.0]])
    terms = [(Adapter({"unet.a": Full(diff=diff)}), 1.0) for diff in (one, other)]
    elected = combine(terms, "ties", Recipe(rank=2, density=1.0)).adapter.layers["unet.a"].delta()
    assert torch.allclose(elected, torch.tensor([[2.0, 2.0], [3.5, -8.0]]), atol=1e-5)
    trimmed = combine(terms, "magnitude", Recipe(rank=2, density=0.25)).adapter.layers["unet.a"].delta()
    assert torch.allclose(trimmed, torch.tensor([[0.0, 0.0], [0.0, -8.0]]), atol=1e-5)
    many = [
        combine(terms[:1], "dare", Recipe(rank=2, seed=seed)).adapter.layers["unet.a"].delta() for seed in range(400)
    ]
    assert torch.allclose(torch.stack(many).mean(0), one, atol=0.8)
    assert torch.equal(many[7], combine(terms[:1], "dare", Recipe(rank=2, seed=7)).adapter.layers["unet.a"].delta())


def test_biases_and_norms_are_summed() -> None:
    changes = Adapter({"unet.a": Full(bias=torch.ones(3)), "unet.norm": Full(diff=torch.ones(4), bias=torch.ones(4))})
    found = combine([(changes, 0.5), (changes, 0.25)]).adapter.layers
    assert torch.equal(found["unet.norm"].delta(), torch.full((4,), 0.75))
    for name, size in (("unet.a", 3), ("unet.norm", 4)):
        bias = found[name].bias_delta()
        assert bias is not None and torch.equal(bias, torch.full((size,), 0.75))


def test_what_cannot_be_combined_is_refused() -> None:
    one = adapter(LAYERS)
    extras = Adapter(one.layers, {"vit.classifier.weight": torch.ones(1)})
    for terms, how, recipe, says in (
        ([(one, 1.0)], "mean", None, "concat, svd"),
        ([], "concat", None, "at least one"),
        ([(one, float("nan"))], "concat", None, "finite"),
        ([(one, 1.0)], "ties", Recipe(density=0.0), "density"),
        ([(adapter(LAYERS, "dora-output"), 1.0)], "concat", None, "depends on the base"),
        ([(one, 1.0), (adapter(LAYERS, rank=2), 1.0)], "linear", None, "one rank"),
        ([(extras, 1.0), (extras, 1.0)], "concat", None, "cannot be summed"),
        ([(one, 1.0), (Adapter({next(iter(LAYERS)): Full(diff=torch.ones(3, 3))}), 1.0)], "concat", None, "to_q"),
    ):
        with pytest.raises(AdapterError, match=says):
            combine(terms, how, recipe)
