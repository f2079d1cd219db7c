import pytest
import torch

from lowrank_tune.lowrank import baselines
from lowrank_tune.lowrank.linalg import principal_axes
from lowrank_tune.lowrank.metrics import measure, residual_ratio
from lowrank_tune.lowrank.svd import measure_optimum


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def every_ratio(x, rank, train):
    """ρ of each method's factors, by its name."""
    made = {
        "random_sketch": baselines.random_sketch(x, rank, generator()),
        "pca_basis": baselines.pca_basis(x, rank, principal_axes([train], rank, generator())),
        "power_1": baselines.power_1(x, rank, generator()),
        "randomized_svd": baselines.randomized_svd(x, rank, generator()),
        "gram_eigh": baselines.gram_eigh(x, rank, generator()),
        "svd": baselines.svd(x, rank),
        "svd_rows": baselines.svd_rows(x, rank),
    }
    optimum, rho = measure_optimum([x]), {}
    for name, factors in made.items():
        assert factors.a_NTR.shape == (*x.shape[:2], rank)
        assert factors.b_NRD.shape == (len(x), rank, x.shape[2])
        rho[name] = residual_ratio(measure(x, *factors).residual_N, optimum.at(rank).residual_N, optimum.energy_N)
        assert rho[name].isfinite().all(), name
        assert (rho[name] >= 1 - 1e-6).all(), name
    return rho


@pytest.mark.parametrize(("tokens", "dim"), [(24, 40), (40, 24)])
@pytest.mark.parametrize("rank", [1, 8, 24])
def test_controls_rank_as_theory_says(power_law, tokens, dim, rank):
    x = power_law(12, tokens, dim)
    rho = every_ratio(x[8:], rank, x[:8])
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
    for control in (baselines.random_sketch, baselines.power_1, baselines.randomized_svd, baselines.gram_eigh):
        first, second, other = (control(x, 6, generator(seed)) for seed in (1, 1, 2))
        assert torch.equal(first.a_NTR, second.a_NTR)
        assert not torch.equal(first.a_NTR, other.a_NTR)


@pytest.mark.parametrize("case", ["zeros", "rank 2", "giant token", "zero rows", "tiny", "huge"])
def test_controls_survive_hard_images(power_law, case):
    x = power_law(2, 24, 40)
    if case == "zeros":
        x[:] = 0
    elif case == "rank 2":
        x[:] = x[..., :2] @ x[:, :2]
    elif case == "giant token":
        x[:, 3] *= 1e3
    elif case == "zero rows":
        x[:, 5:] = 0
    else:
        x *= {"tiny": 1e-20, "huge": 1e18}[case]
    rho = every_ratio(x, 8, power_law(4, 24, 40))
    if case in ("zeros", "rank 2", "zero rows"):
        assert all((value < 1.01).all() for value in rho.values())
    assert all((rho[name] < 1.03).all() for name in ("svd", "gram_eigh", "randomized_svd"))
    if case in ("tiny", "huge"):  # the size changes nothing
        for name, value in every_ratio(power_law(2, 24, 40), 8, power_law(4, 24, 40)).items():
            assert rho[name].tolist() == pytest.approx(value.tolist(), rel=1e-3), name


def test_the_exact_and_the_randomized_control_are_near_where_few_directions_hold_nearly_all(power_law):
    x = power_law(6, 128, 160)
    x = x + 30 * x.std() * torch.randn(6, 1, 160, generator=generator(5))
    for rank in (16, 64):
        rho = every_ratio(x, rank, x)
        assert (rho["gram_eigh"] < 1.002).all()
        assert (rho["randomized_svd"] < 1.04).all()
