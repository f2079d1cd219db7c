import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from lowrank_tune.lowrank.metrics import mean_ratio, measure, residual_ratio
from lowrank_tune.lowrank.svd import measure_optimum


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ratio(x, a, b):
    optimum = measure_optimum([x])
    return residual_ratio(measure(x, a, b).residual_N, optimum.at(a.shape[-1]).residual_N, optimum.energy_N)


def test_figures_are_what_their_names_say():
    x, a, b = gaussian(3, 8, 12), gaussian(3, 8, 4, seed=1), gaussian(3, 4, 12, seed=2)
    figures = measure(x, a, b)
    y = a.double() @ b.double()
    torch.testing.assert_close(figures.token_cosine_N, cosine_similarity(x.double(), y, dim=-1).mean(-1))
    torch.testing.assert_close(figures.flat_cosine_N, cosine_similarity(x.double().flatten(1), y.flatten(1), dim=-1))
    torch.testing.assert_close(figures.mse_N, (x - y).square().mean((1, 2)))
    torch.testing.assert_close(figures.residual_N, (x - y).square().sum((1, 2)))


def test_tokens_of_zeros_have_no_cosine_and_an_image_of_them_has_zero():
    x = gaussian(2, 4, 6)
    x[0, 0], x[1] = 0, 0
    figures = measure(x, torch.eye(4).expand(2, 4, 4), x)
    assert figures.token_cosine_N.tolist() == pytest.approx([1, 0])
    assert measure_optimum([x]).at(4).token_cosine_N.tolist() == pytest.approx([1, 0])


def test_an_easy_image_cannot_rule_the_mean_ratio():
    ratio = torch.tensor([1.02] * 23 + [7000.0], dtype=torch.float64)
    assert mean_ratio(ratio) == pytest.approx(1.02 ** (23 / 24) * 7000 ** (1 / 24))
    assert mean_ratio(ratio) < 1.5 < 290 < ratio.mean()


@given(
    seed=st.integers(0, 2**32),
    tokens=st.integers(1, 10),
    dim=st.integers(1, 10),
    rank=st.integers(1, 10),
    true_rank=st.integers(0, 10),
    noise=st.sampled_from([0, 1e-6, 1e-3, 1]),
)
@settings(deadline=None, max_examples=80)
def test_nothing_beats_the_optimum(seed, tokens, dim, rank, true_rank, noise):
    rank = min(rank, tokens, dim)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(1, tokens, true_rank, generator=g) @ torch.randn(1, true_rank, dim, generator=g)
    u, s, vt = torch.linalg.svd(x)
    k = min(rank, s.shape[-1])
    a = u[..., :k] * s[..., :k] + noise * torch.randn(1, tokens, k, generator=g)
    rho = ratio(x, a, vt[:, :k])
    assert (rho >= 1 - 1e-6).all()
    if noise == 0:
        assert (rho <= 1 + 1e-4).all()


def test_an_image_of_zeros_is_perfect_when_reproduced():
    x, zeros = torch.zeros(1, 4, 6), torch.zeros(1, 4, 2)
    assert ratio(x, zeros, torch.ones(1, 2, 6)).item() == 1
    assert ratio(x, zeros + 1, torch.ones(1, 2, 6)).item() == float("inf")
    # What the rank could hold exactly is not forgiven.
    x = gaussian(1, 8, 2) @ gaussian(1, 2, 8, seed=1)
    assert ratio(x, torch.zeros(1, 8, 2), torch.zeros(1, 2, 8)).item() == pytest.approx(1e8)


def test_broken_factors_give_no_number():
    x = gaussian(1, 4, 6)
    figures = measure(x, torch.full((1, 4, 2), torch.nan), torch.ones(1, 2, 6))
    assert all(not figure.isfinite().any() for figure in figures)
    assert ratio(x, torch.full((1, 4, 2), torch.nan), torch.ones(1, 2, 6)).isnan().all()
