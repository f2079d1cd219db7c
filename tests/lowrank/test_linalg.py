import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_tune.lowrank.linalg import (
    LOOSE,
    departure,
    gram,
    is_loose,
    mended,
    orthonormalise,
    orthonormalise_once,
    principal_axes,
)

HARD = ["gaussian", "equal columns", "ones", "zeros", "few dimensions", "giant row", "tiny", "huge", "graded columns"]


@st.composite
def hard_matrices(draw):
    """Matrices [2, T, R] that a Cholesky of YᵀY trips over."""
    tokens = draw(st.sampled_from([2, 3, 16, 100, 300]))
    rank = draw(st.integers(1, min(tokens, 128)))
    y = torch.randn(2, tokens, rank, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**32))))
    match draw(st.sampled_from(HARD)):
        case "equal columns":
            y[:] = y[..., :1].clone()
        case "ones":
            y[:] = 1
        case "zeros":
            y[0] = 0
            y[1, :, 0] = 0
        case "few dimensions":
            y = y[..., :1] @ y[:, :1] + y[..., -1:] @ y[:, -1:]
        case "giant row":
            y[:, 0] *= 1e4
        case "tiny":
            y *= 1e-15
        case "huge":
            y *= 1e15
        case "graded columns":
            y *= torch.logspace(-5, 5, rank)
    return y


@given(hard_matrices())
@settings(deadline=None, max_examples=80)
def test_the_basis_is_safe_in_float32_whatever_it_is_given_and_spans_the_columns(y):
    y = y.requires_grad_()
    q = orthonormalise(y)
    assert q.isfinite().all()
    assert torch.linalg.matrix_norm(q.detach(), 2).max() < 1 + 1e-4
    lost = torch.linalg.vector_norm(y - q @ (q.mT @ y), dim=-2)
    assert (lost <= 1e-3 * torch.linalg.vector_norm(y, dim=-2)).all()
    q.square().sum().backward()
    assert y.grad.isfinite().all()


def test_leading_columns_span_the_leading_columns_orthonormally():
    y = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(0))
    q = orthonormalise(y)
    torch.testing.assert_close(q.mT @ q, torch.eye(8).expand(3, 8, 8), atol=1e-5, rtol=0)
    torch.testing.assert_close(q[..., :3], orthonormalise(y[..., :3]), atol=1e-5, rtol=0)


def test_what_is_not_finite_stays_visible():
    y = torch.ones(2, 4, 2)
    y[1, 3, 1] = torch.nan
    q = orthonormalise(y)
    assert q[0].isfinite().all()
    assert q[1].isnan().any()


@pytest.mark.parametrize("dim", [40, 1200], ids=["formed", "sketched"])
def test_principal_axes_hold_the_most_energy(power_law, dim):
    x = power_law(6, 30, dim)
    axes = principal_axes(x.split(2), 10, torch.Generator().manual_seed(1))
    unit = x.double() / torch.linalg.matrix_norm(x.double())[:, None, None]
    best = torch.linalg.svdvals(unit.flatten(0, 1))[:10].square().sum()
    torch.testing.assert_close(axes.mT @ axes, torch.eye(10, dtype=axes.dtype))
    assert (unit @ axes).square().sum() > 0.999 * best
    order = (unit @ axes).square().sum((0, 1))
    assert (order.diff() <= 1e-6).all()


@pytest.mark.parametrize("dim", [40, 1200], ids=["formed", "sketched"])
def test_more_principal_axes_than_dimensions_are_still_a_basis(dim):
    x = torch.zeros(2, 3, dim)
    x[:, :, :2] = 1
    axes = principal_axes([x], 5, torch.Generator().manual_seed(1))
    torch.testing.assert_close(axes.mT @ axes, torch.eye(5, dtype=axes.dtype))
    torch.testing.assert_close((x.double() @ axes[:, :1]).square().sum(), x.double().square().sum(), rtol=1e-6, atol=0)


def test_a_symmetric_product_is_the_product():
    x = torch.randn(3, 20, 30, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.float64, torch.float16):
        product = gram(x.to(dtype))
        assert product.dtype == dtype
        torch.testing.assert_close(product, x.to(dtype) @ x.to(dtype).mT)
    assert gram(x.requires_grad_()).requires_grad


def test_one_pass_is_enough_for_columns_near_eigenvectors():
    generator = torch.Generator().manual_seed(0)
    base = torch.linalg.qr(torch.randn(2, 50, 10, generator=generator, dtype=torch.float64)).Q
    y = base * 10.0 ** -torch.arange(10) + 1e-12 * torch.randn(2, 50, 10, generator=generator, dtype=torch.float64)
    q = orthonormalise_once(y)
    torch.testing.assert_close(q.mT @ q, torch.eye(10, dtype=torch.float64).expand(2, -1, -1), atol=1e-6, rtol=0)
    assert orthonormalise_once(torch.zeros(1, 5, 2)).isfinite().all()
    assert orthonormalise_once(torch.zeros(1, 5, 0)).shape == (1, 5, 0)


def spoilt(vectors: Tensor, number: int) -> Tensor:
    """Eigenvectors as a solver that has failed may leave them: one of five faults, barely large enough to matter."""
    vectors, first, second = vectors.clone(), number % 5, 1 + number % 3
    match first:
        case 0:  # two that lean on each other
            vectors[:, second] += 2e-4 * vectors[:, second + 1]
        case 1:  # one of another length
            vectors[:, second] *= 1 + 2e-4
        case 2:  # one twice
            vectors[:, second] = vectors[:, second + 1]
        case 3:
            vectors[second] = 0
        case 4:
            vectors[second, second] = torch.nan
    return vectors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eigenvectors_that_are_not_orthonormal_are_found_and_made_anew_and_no_others(dtype):
    """200 faults among 400 matrices of every kind of spectrum; the sound ones stay to the bit."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 32, 48, dtype=dtype, generator=generator) * torch.logspace(0, -4, 48)
    x[::7] = x[::7, :, :2] @ x[::7, :2]
    x[::11] = 1
    symmetric = (x @ x.mT) * torch.logspace(-6, 6, 400)[:, None, None]
    values, vectors = torch.linalg.eigh(symmetric)
    bad = torch.arange(400) % 2 == 1
    broken = torch.stack([spoilt(each, number) if bad[number] else each for number, each in enumerate(vectors)])
    bound = LOOSE * torch.finfo(dtype).eps ** 0.5
    assert torch.equal(is_loose(broken), bad)
    assert departure(vectors).max() < bound / 10

    mended_values, mended_vectors = mended(symmetric, values, broken)
    assert torch.equal(mended_vectors[~bad], vectors[~bad]) and torch.equal(mended_values[~bad], values[~bad])
    assert departure(mended_vectors).max() < bound / 10
    again = mended_vectors * mended_values[:, None] @ mended_vectors.mT
    size = symmetric.abs().amax((1, 2), keepdim=True)
    assert ((again - symmetric).abs() <= 1e-4 * size).all()


def test_of_a_single_matrix_too_and_said_in_the_log(caplog):
    symmetric = torch.diag(torch.arange(1.0, 5))
    values, vectors = torch.linalg.eigh(symmetric)
    assert torch.equal(mended(symmetric, values, 1.01 * vectors)[1], vectors)
    assert "1 of 1 eigendecompositions by cpu were not orthonormal" in caplog.text
