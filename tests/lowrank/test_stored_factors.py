"""Factors in few bits, and as many components as an image needs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_tune.errors import InputError
from lowrank_tune.lowrank import baselines
from lowrank_tune.lowrank.decomposers import Factors
from lowrank_tune.lowrank.quantization import (
    STORE_DTYPES,
    factor_bytes,
    ordered,
    pack,
    prune,
    residual_by_rank,
    restored,
    restored_factors,
)

TOKENS, DIM = 24, 40


def images(seed: int = 0, count: int = 3, tokens: int = TOKENS, dim: int = DIM) -> Tensor:
    """Images with falling spectra, as features have."""
    generator = torch.Generator().manual_seed(seed)
    fall = torch.logspace(0, -1.5, min(tokens, dim))
    left = torch.linalg.qr(torch.randn(count, tokens, tokens, generator=generator)).Q[..., : len(fall)]
    right = torch.linalg.qr(torch.randn(count, dim, dim, generator=generator)).Q[..., : len(fall)]
    return (left * fall) @ right.mT


def error(x_NTD: Tensor, factors: Factors) -> Tensor:
    return (factors.a_NTR @ factors.b_NRD - x_NTD).norm(dim=(-2, -1)) / x_NTD.norm(dim=(-2, -1))


def mixed(factors: Factors, seed: int = 0) -> Factors:
    """The same products from columns that nearly cancel, as a network's may."""
    rank = factors.a_NTR.shape[-1]
    mix_RR = torch.randn(rank, rank, generator=torch.Generator().manual_seed(seed))
    return Factors(factors.a_NTR @ mix_RR, torch.linalg.solve(mix_RR, factors.b_NRD))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (1, 9), (9, 1)])
def test_ordered_factors_are_the_same_product_by_falling_weight(shape: tuple[int, int]) -> None:
    x_NTD = images(tokens=shape[0], dim=shape[1])
    made = mixed(baselines.svd(x_NTD, min(*shape, 7)))
    a_NTR, b_NRD = ordered(made)
    torch.testing.assert_close(a_NTR @ b_NRD, made.a_NTR @ made.b_NRD, rtol=0, atol=1e-5)
    lengths_NR = a_NTR.norm(dim=-2)
    torch.testing.assert_close(lengths_NR, b_NRD.norm(dim=-1), rtol=1e-3, atol=1e-5)
    assert (lengths_NR.diff() <= 1e-6).all()


def test_leading_components_of_ordered_factors_are_the_best_of_their_number() -> None:
    x_NTD = images()
    a_NTR, b_NRD = ordered(mixed(baselines.svd(x_NTD, TOKENS)))
    for rank in (1, 5, 11):
        best = error(x_NTD, baselines.svd(x_NTD, rank))
        torch.testing.assert_close(error(x_NTD, Factors(a_NTR[..., :rank], b_NRD[:, :rank])), best, rtol=1e-3, atol=0)


def test_images_and_factors_of_zeros_stay_zeros() -> None:
    factors = ordered(Factors(torch.zeros(1, TOKENS, 4), torch.zeros(1, 4, DIM)))
    for dtype in STORE_DTYPES:
        a_NTR, b_NRD = restored_factors(factors, dtype)
        assert not (a_NTR @ b_NRD).any()


def test_ordering_spares_few_bits_the_columns_that_cancel() -> None:
    x_NTD = images()
    regressed = mixed(baselines.svd(x_NTD, 12))
    assert (
        error(x_NTD, restored_factors(ordered(regressed), "int8")) < error(x_NTD, restored_factors(regressed, "int8"))
    ).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 16), st.floats(1e-3, 1e3))
def test_fewer_bits_are_more_error_and_float16_is_nearly_none(seed: int, rank: int, scale: float) -> None:
    x_NTD = scale * images(seed)
    factors = ordered(baselines.svd(x_NTD, rank))
    exact = error(x_NTD, factors)
    errors = [error(x_NTD, restored_factors(factors, dtype)) for dtype in STORE_DTYPES]
    torch.testing.assert_close(errors[0], exact, rtol=0, atol=1e-6)
    torch.testing.assert_close(errors[1], exact, rtol=0, atol=1e-3)
    _, _, int8, int5, int4 = (each.mean() for each in errors)
    assert exact.mean() < int8 < int5 < int4


@pytest.mark.parametrize("dtype", STORE_DTYPES)
def test_the_bytes_are_those_of_packed_components(dtype: str) -> None:
    a_NTR, b_NRD = ordered(baselines.svd(images(count=1), 7))
    parts = [*pack(a_NTR[0], dtype).values(), *pack(b_NRD[0], dtype).values()]
    assert factor_bytes(TOKENS, DIM, 7, dtype) == sum(part.numel() * part.element_size() for part in parts)
    sizes = [factor_bytes(TOKENS, DIM, rank, dtype) for rank in range(TOKENS)]
    assert sizes[0] == 0 and sizes == sorted(set(sizes))


def test_a_long_token_takes_no_digits_from_the_others() -> None:
    x_NTD = images()
    x_NTD[:, 0] *= 30
    a_NTR, b_NRD = ordered(baselines.svd(x_NTD, TOKENS))
    y_NTD = restored(a_NTR, "int8") @ b_NRD
    near = (y_NTD - x_NTD)[:, 1:].norm() / x_NTD[:, 1:].norm()
    by_component = (restored(a_NTR.mT, "int8").mT @ b_NRD - x_NTD)[:, 1:].norm() / x_NTD[:, 1:].norm()
    assert near < 0.01 < 2 * near < by_component


@pytest.mark.parametrize("dtype", ["float16", "int8", "int4"])
def test_the_residual_of_every_rank_is_that_of_its_leading_components(dtype: str) -> None:
    x_NTD = images()
    a_NTR, b_NRD = restored_factors(ordered(baselines.svd(x_NTD, TOKENS)), dtype)
    residual_NR = residual_by_rank(x_NTD, Factors(a_NTR, b_NRD))
    for rank in range(TOKENS + 1):
        y_NTD = a_NTR[..., :rank].double() @ b_NRD[:, :rank].double()
        expected_N = (x_NTD.double() - y_NTD).square().sum((-2, -1))
        torch.testing.assert_close(residual_NR[:, rank], expected_N, rtol=1e-6, atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from(STORE_DTYPES), st.floats(0.001, 1.1))
def test_pruning_keeps_the_fewest_components_that_meet_the_target_on_every_image(
    seed: int, dtype: str, target: float
) -> None:
    x_NTD = images(seed)
    a_NTR, b_NRD = restored_factors(ordered(baselines.svd(x_NTD, TOKENS)), dtype)
    allowed_N = target**2 * x_NTD.double().square().sum((-2, -1))
    kept_N = prune(residual_by_rank(x_NTD, Factors(a_NTR, b_NRD)), allowed_N).tolist()
    for image, kept in enumerate(kept_N):
        errors = [
            error(x_NTD[image].double(), Factors(a_NTR[image, :, :rank].double(), b_NRD[image, :rank].double())).item()
            for rank in range(TOKENS + 1)
        ]
        if kept < 0:
            assert min(errors) > target * (1 - 1e-6)
        else:
            assert errors[kept] <= target * (1 + 1e-6)
            assert all(each > target * (1 - 1e-6) for each in errors[:kept])


def test_float16_holds_ordered_factors_whose_length_in_one_of_them_it_could_not() -> None:
    x_NTD = 6e4 * images(count=1).sign()
    factors = baselines.svd(x_NTD, 3)
    with pytest.raises(InputError, match="do not fit into float16"):
        restored_factors(factors, "float16")
    near = error(x_NTD, restored_factors(ordered(factors), "float16"))
    torch.testing.assert_close(near, error(x_NTD, factors), rtol=1e-3, atol=0)
