"""Laws of spectra and of resizing: nothing is lost that the discarded singular values do not tell."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import CONV, LINEAR, TEXT, Maker, every_kind

from lora_vision import AdapterError, lineage, load_adapter, save_adapter
from lora_vision.adapter import Adapter
from lora_vision.factors import Dora, Full, LowRank
from lora_vision.spectrum import of_matrix, spectrum
from lora_vision.tools.resize import METHODS, Size, parse_size, resize

Run = Callable[..., Any]


def big(ranks: int = 8) -> Adapter:
    """Three layers of different shapes and spectra, alpha not the rank."""
    make = Maker(3)
    decay = 0.6 ** torch.arange(ranks)
    layers = {
        LINEAR: LowRank(make.tensor(ranks, 40), make.tensor(32, ranks) * decay, 3.0),
        CONV: LowRank(make.tensor(ranks, 12, 3, 3), make.tensor(24, ranks, 1, 1), 5.0),
        TEXT: LowRank(make.tensor(ranks, 16), make.tensor(64, ranks) * decay.sqrt(), 8.0),
    }
    return Adapter(layers, {}, {"ss_network_dim": str(ranks), "note": "kept"})


@pytest.mark.parametrize("kind", ["lora", "lora-ranks", "locon", "tucker", "loha", "lokr", "full"])
def test_a_spectrum_is_the_change(kind: str) -> None:
    for factors in every_kind()[kind].layers.values():
        if isinstance(factors, Full) and factors.diff is None:
            continue
        found, true = spectrum(factors), factors.delta()
        rebuilt = (found.left * found.values @ found.right).reshape(true.shape)
        assert torch.allclose(rebuilt, true, atol=1e-5 * float(true.abs().max()))
        exact = torch.linalg.svdvals(true.double().flatten(1)).float()
        assert torch.allclose(found.values, exact[: len(found.values)], atol=1e-5 * float(exact[0]))
        assert found.norm == pytest.approx(float(true.norm()), rel=1e-5)
        assert 1 <= found.effective_rank <= found.rank + 1e-3


def test_the_effective_rank_of_equal_directions_is_their_number() -> None:
    assert of_matrix(torch.eye(6)[:, :5]).effective_rank == pytest.approx(5, rel=1e-5)
    assert of_matrix(torch.zeros(3, 4)).effective_rank == 0


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_the_error_of_resizing_is_the_discarded_spectrum(rank: int) -> None:
    adapter = big()
    found = resize(adapter, Size(rank=rank))
    for name, factors in adapter.layers.items():
        true, cut = factors.delta(), found.adapter.layers[name].delta()
        values = torch.linalg.svdvals(true.double().flatten(1))
        told = float(values[rank:].norm() / values.norm())
        assert found.errors[name] == pytest.approx(told, rel=1e-4)
        assert float((cut - true).norm() / true.norm()) == pytest.approx(told, rel=1e-4)
        assert found.ranks[name] == (8, rank)
        assert cut.shape == true.shape


@pytest.mark.parametrize("kind", sorted(every_kind().keys() - {"loha", "lokr", "lokr-full", "full", "norm", "whole"}))
def test_resizing_to_the_full_rank_is_the_identity(kind: str) -> None:
    adapter = every_kind()[kind]
    found = resize(adapter, Size(rank=64))
    for name, factors in adapter.layers.items():
        for field, tensor in factors.tensors().items():
            assert torch.equal(found.adapter.layers[name].tensors()[field], tensor), (name, field)
        if not factors.needs_base:
            assert torch.equal(found.adapter.layers[name].delta(), factors.delta())
    assert all(error == 0 for error in found.errors.values())


@pytest.mark.parametrize("kind", ["loha", "lokr", "full"])
def test_what_is_no_pair_becomes_one_without_loss_at_full_rank(kind: str) -> None:
    adapter = every_kind()[kind]
    found = resize(adapter, Size(rank=256)).adapter
    for name, factors in adapter.layers.items():
        if isinstance(factors, Full) and factors.diff is None:
            assert found.layers[name] is factors
            continue
        assert isinstance(found.layers[name], LowRank)
        true = factors.delta()
        assert float((found.layers[name].delta() - true).norm()) < 1e-5 * float(true.norm())
        bias = found.layers[name].bias_delta()
        assert (bias is None) == (factors.bias_delta() is None)


def test_dora_keeps_its_magnitude() -> None:
    make = Maker()
    dora = make.dora(make.lora(inp=12), 0, 16)
    cut = resize(Adapter({LINEAR: dora}), Size(rank=2)).adapter.layers[LINEAR]
    assert isinstance(cut, Dora)
    assert torch.equal(cut.magnitude, dora.magnitude)
    assert cut.rank == 2


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_energy_keeps_at_least_that_share_with_the_smallest_rank(energy: float) -> None:
    adapter = big()
    found = resize(adapter, Size(energy=energy))
    for name, (_, rank) in found.ranks.items():
        squares = torch.linalg.svdvals(adapter.layers[name].delta().double().flatten(1)).square()
        shares = squares.cumsum(0) / squares.sum()
        assert shares[rank - 1] >= energy - 1e-6
        assert rank == 1 or shares[rank - 2] < energy
        assert found.errors[name] ** 2 <= 1 - energy + 1e-6


def test_dynamic_methods_choose_as_kohya_does() -> None:
    """Values worked out by hand from what `resize_lora.py` documents."""
    values = torch.tensor([4.0, 2.0, 1.0, 1.0])
    assert METHODS["sv_ratio"](values, 3) == 2  # above 4 / 3
    assert METHODS["sv_cumulative"](values, 0.75) == 2  # 6 of 8
    assert METHODS["sv_cumulative"](values, 0.76) == 3
    assert METHODS["sv_fro"](values, 0.95) == 2  # sqrt(20 / 22) = 0.953
    assert METHODS["sv_fro"](values, 0.96) == 3
    assert METHODS["sv_fro"](values, 1.0) == 4


def test_the_rank_caps_a_dynamic_method() -> None:
    found = resize(big(), Size(dynamic_method="sv_fro", dynamic_param=1.0, rank=3))
    assert {rank for _, rank in found.ranks.values()} == {3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_size_is_kept_and_used(tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = big(16)
    whole = save_adapter(resize(adapter, Size(rank=16, dtype=dtype)).adapter, tmp_path / "w.safetensors").stat().st_size
    for share in (0.4, 0.7, 1.0):
        budget = int(whole * share)
        found = resize(adapter, Size(size=budget, dtype=dtype))
        size = save_adapter(found.adapter, tmp_path / "a.safetensors").stat().st_size
        assert budget - 2000 < size <= budget
    even = resize(adapter, Size(rank=6))
    cut = resize(adapter, Size(size=save_adapter(even.adapter, tmp_path / "e.safetensors").stat().st_size + 64))
    assert lost(adapter, cut.adapter) <= lost(adapter, even.adapter)
    with pytest.raises(AdapterError, match="rank 1 everywhere takes"):
        resize(adapter, Size(size=500))


def lost(whole: Adapter, cut: Adapter) -> float:
    """Norm of what is missing, all layers together."""
    gaps = (float((cut.layers[name].delta() - factors.delta()).norm()) for name, factors in whole.layers.items())
    return math.hypot(*gaps)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"rank": 0},
        {"energy": 1.5},
        {"energy": 0.5, "size": 100},
        {"dynamic_method": "sv_fro"},
        {"dynamic_method": "sv_ratio", "dynamic_param": 0.5},
        {"dynamic_method": "sv_sum", "dynamic_param": 0.5},
    ],
)
def test_senseless_sizes_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(AdapterError, match="expected"):
        Size(**wrong)


def test_sizes_are_read_in_every_unit() -> None:
    assert [parse_size(text) for text in ("5MB", "800 kB", "1.5GiB", "77")] == [5_000_000, 800_000, 3 << 29, 77]
    for text in ("", "MB", "5 apples", "-3MB"):
        with pytest.raises(AdapterError, match="no size"):
            parse_size(text)


def test_not_finite_layers_are_named() -> None:
    layers = {LINEAR: LowRank(torch.full((2, 8), math.nan), torch.ones(8, 2), 2.0)}
    with pytest.raises(AdapterError, match=LINEAR):
        resize(Adapter(layers), Size(rank=1))


def test_the_command_tells_its_parent_and_the_new_rank(lora_vision: Run, tmp_path: Path) -> None:
    file, out = save_adapter(big(), tmp_path / "big.safetensors"), tmp_path / "small.safetensors"
    told = lora_vision("resize", file, "--rank", 2, "--output", out, "--precision", "fp16", "--json")
    assert told.code == 0, told.err
    assert told.json["bytes"] == out.stat().st_size < told.json["bytes_before"]
    found = load_adapter(out)
    assert found.metadata["ss_network_dim"] == "2" and found.metadata["note"] == "kept"
    born = lineage.read(found.metadata)
    assert born is not None and born.how == "resize" and born.settings == {"rank": 2}
    assert born.parents == ({"file": "big.safetensors", "sha256": lineage.sha256_of(file)},)
    assert next(iter(found.layers.values())).tensors()["down"].dtype == torch.float16
    assert lora_vision("resize", file).code == 2 == lora_vision("resize", file, "--rank", 0).code
    refused = lora_vision("resize", file, "--rank", 2, "--output", file)
    assert refused.code == 1 and "would overwrite what it is made of" in refused.err
    assert "kB is too small" in lora_vision("resize", file, "--size", "1kB", "--output", out).err
    assert "mean rank 8.0 -> 2.0, mean error" in str(resize(big(), Size(rank=2)))
    assert "mean error" in lora_vision("resize", file, "--energy", 0.9, "--output", out).out
