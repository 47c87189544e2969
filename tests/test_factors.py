"""Every kind of change computes its paper's equation."""

from __future__ import annotations

import pytest
import torch
from kinds import KINDS
from torch.nn import functional as F

from lora_vision.errors import AdapterError
from lora_vision.factors import IA3, Dora, Full, Hadamard, Kronecker, LowRank

torch.manual_seed(0)


def test_low_rank_linear_is_scaled_product() -> None:
    down, up = torch.randn(4, 6), torch.randn(5, 4)
    assert torch.allclose(LowRank(down, up, 2.0).delta(), up @ down * 0.5)


def test_low_rank_convolution_is_two_convolutions() -> None:
    down, up, x = torch.randn(4, 6, 3, 3), torch.randn(5, 4, 1, 1), torch.randn(2, 6, 8, 8)
    one = F.conv2d(x, LowRank(down, up, 4.0).delta(), padding=1)
    assert torch.allclose(one, F.conv2d(F.conv2d(x, down, padding=1), up), atol=1e-4)


def test_tucker_is_three_convolutions() -> None:
    down, mid, up = torch.randn(4, 6, 1, 1), torch.randn(4, 4, 3, 3), torch.randn(5, 4, 1, 1)
    x = torch.randn(2, 6, 8, 8)
    factors = LowRank(down, up, 4.0, mid)
    assert factors.size == (5, 54) and factors.fits((5, 6, 3, 3)) and not factors.fits((5, 6, 1, 9))
    three = F.conv2d(F.conv2d(F.conv2d(x, down), mid, padding=1), up)
    assert torch.allclose(F.conv2d(x, factors.delta(), padding=1), three, atol=1e-3)


def test_loha_equals_its_pair_of_rank_squared() -> None:
    factors = Hadamard(torch.randn(40, 2), torch.randn(2, 30), torch.randn(40, 2), torch.randn(2, 30), alpha=1.0)
    pair = factors.low_rank()
    assert pair is not None and pair.rank == 4
    assert torch.allclose(pair.delta(), factors.delta(), atol=1e-5)
    expected = (factors.w1_a @ factors.w1_b) * (factors.w2_a @ factors.w2_b) / 2
    assert torch.allclose(factors.delta(), expected)


@pytest.mark.parametrize("second", ["full", "split", "tucker"])
@pytest.mark.parametrize("first", ["full", "split"])
def test_lokr_is_kron_with_the_scale_of_the_split_factor(first: str, second: str) -> None:
    w1_a, w1_b, w2_a, w2_b, t2 = (torch.randn(*s) for s in ((2, 3), (3, 4), (5, 3), (3, 6 * 9), (3, 3, 3, 3)))
    given: dict[str, torch.Tensor] = {"w1": w1_a @ w1_b} if first == "full" else {"w1_a": w1_a, "w1_b": w1_b}
    if second == "tucker":
        given |= {"w2_a": w2_a.t(), "w2_b": w2_b[:, :6], "t2": t2}
        w2 = torch.einsum("rskl,ro,si->oikl", t2, w2_a.t(), w2_b[:, :6])
    else:
        w2 = (w2_a @ w2_b).view(5, 6, 3, 3)
        given |= {"w2": w2} if second == "full" else {"w2_a": w2_a, "w2_b": w2_b}
    factors = Kronecker(alpha=1.5, **given)
    scale = 1.0 if first == second == "full" else 0.5
    expected = torch.kron((w1_a @ w1_b)[:, :, None, None], w2.contiguous()) * scale
    assert factors.fits((10, 24, 3, 3))
    assert torch.allclose(factors.delta(torch.zeros(10, 24, 3, 3)), expected, atol=1e-4)


@pytest.mark.parametrize("axis", [0, 1])
def test_dora_gives_rows_or_columns_the_stored_length(axis: int) -> None:
    base, inner = torch.randn(5, 6, 3, 3), LowRank(torch.randn(2, 6, 3, 3), torch.randn(5, 2), 2.0)
    magnitude = torch.rand((5, 6)[axis]) + 0.5
    changed = base + Dora(inner, magnitude, axis).delta(base)
    assert torch.allclose(changed.transpose(0, axis).flatten(1).norm(dim=1), magnitude, atol=1e-5)


def test_ia3_multiplies_rows_or_columns() -> None:
    base, vector = torch.randn(5, 6), torch.randn(5)
    assert torch.allclose(IA3(vector).delta(base), base * vector[:, None])
    assert torch.allclose(IA3(torch.ones(6), on_input=True).delta(base), base)
    moved = IA3(vector, with_bias=True).bias_delta(torch.ones(5))
    assert moved is not None and torch.allclose(moved, vector)


def test_what_needs_the_base_says_so() -> None:
    factors = Dora(LowRank(torch.ones(1, 3), torch.ones(2, 1), 1.0), torch.ones(2))
    with pytest.raises(AdapterError, match="base weight"):
        factors.delta()
    with pytest.raises(AdapterError, match="does not fit"):
        factors.delta(torch.zeros(4, 4))


def test_impossible_shapes_are_refused() -> None:
    two, three = torch.ones(2, 3), torch.ones(3, 4)
    for build in (
        lambda: LowRank(two, two, 1.0),
        lambda: LowRank(torch.ones(0, 3), torch.ones(2, 0), 1.0),
        lambda: Hadamard(two, two, two, two, 1.0),
        lambda: Kronecker(alpha=1.0, w1=two),
        lambda: Kronecker(alpha=1.0, w1=two, w2_a=two, w2_b=two),
        lambda: Dora(LowRank(three, two, 1.0), torch.ones(2, 2)),
        lambda: Full(),
    ):
        with pytest.raises(AdapterError, match="expected"):
            build()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(8, 6), (8, 6, 3, 3), (8, 6, 1, 1)])
def test_every_kind_answers_in_the_weights_shape(kind: str, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    factors = KINDS[kind](weight, 2, torch.Generator().manual_seed(0))
    delta = factors.delta(weight)
    assert delta.shape == weight.shape and delta.dtype == torch.float32 and bool(delta.any())
    assert not factors.fits((9, 7))
    pair = factors.low_rank()
    assert pair is None or torch.allclose(pair.delta(weight), delta, atol=1e-5)
