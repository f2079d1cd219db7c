import pytest
import torch

from lowrank_tune.lowrank import baselines
from lowrank_tune.lowrank.linalg import principal_axes
from lowrank_tune.lowrank.metrics import measure, residual_ratio
from lowrank_tune.lowrank.svd import measure_optimum

SHAPES = [(24, 40), (40, 24)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def every_control(x, rank, train):
    axes = principal_axes([train], rank, generator())
    return {
        "random_sketch": baselines.random_sketch(x, rank, generator()),
        "pca_basis": baselines.pca_basis(x, rank, axes),
        "power_1": baselines.power_1(x, rank, generator()),
        "randomized_svd": baselines.randomized_svd(x, rank, generator()),
        "svd": baselines.svd(x, rank),
        "svd_rows": baselines.svd_rows(x, rank),
    }


@pytest.mark.parametrize(("tokens", "dim"), SHAPES)
@pytest.mark.parametrize("rank", [1, 8, 24])
def test_controls_rank_as_theory_says(power_law, tokens, dim, rank):
    x = power_law(12, tokens, dim)
    optimum = measure_optimum([x[8:]])
    rho = {}
    for name, factors in every_control(x[8:], rank, x[:8]).items():
        assert factors.a_NTR.shape == (4, tokens, rank)
        assert factors.b_NRD.shape == (4, rank, dim)
        residual = measure(x[8:], *factors).residual_N
        rho[name] = residual_ratio(residual, optimum.at(rank).residual_N, optimum.energy_N)
        assert (rho[name] >= 1 - 1e-6).all(), name
    assert rho["svd"].max() <= 1 + 1e-6
    if rank < 24:
        means = [rho[name].mean() for name in ("svd", "randomized_svd", "power_1", "random_sketch")]
        assert means == sorted(means)
        assert means[1] < 1.05
        assert rho["pca_basis"].mean() < rho["random_sketch"].mean()
    else:  # every method holds the whole of X
        assert all(value.max() < 1.5 for value in rho.values())


def test_svd_rows_explains_more_of_each_token(power_law):
    x = power_law(4, 24, 40)
    by_rows, plain = (measure(x, *route(x, 6)) for route in (baselines.svd_rows, baselines.svd))
    assert (by_rows.token_cosine_N > plain.token_cosine_N).all()
    assert (by_rows.flat_cosine_N < plain.flat_cosine_N).all()


def test_a_seed_gives_the_same_factors(power_law):
    x = power_law(2, 24, 40)
    for control in (baselines.random_sketch, baselines.power_1, baselines.randomized_svd):
        first, second, other = (control(x, 6, generator(seed)) for seed in (1, 1, 2))
        assert torch.equal(first.a_NTR, second.a_NTR)
        assert not torch.equal(first.a_NTR, other.a_NTR)


@pytest.mark.parametrize("case", ["zeros", "rank 2", "giant token", "zero rows"])
def test_controls_survive_hard_images(power_law, case):
    x = power_law(2, 24, 40)
    if case == "zeros":
        x[:] = 0
    elif case == "rank 2":
        x[:] = x[..., :2] @ x[:, :2]
    elif case == "giant token":
        x[:, 3] *= 1e3
    else:
        x[:, 5:] = 0
    optimum = measure_optimum([x])
    for name, factors in every_control(x, 8, power_law(4, 24, 40)).items():
        rho = residual_ratio(measure(x, *factors).residual_N, optimum.at(8).residual_N, optimum.energy_N)
        assert rho.isfinite().all(), name
        assert (rho >= 1 - 1e-6).all(), name
        if case != "giant token":
            assert (rho < 1.01).all(), name
