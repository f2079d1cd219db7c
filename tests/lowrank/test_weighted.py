"""The metric of the answers, and what is optimal in it, beside the SVD of X W^½ in float64."""

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lowrank_tune.errors import InputError
from lowrank_tune.lowrank import baselines
from lowrank_tune.lowrank.codebooks import make_codebook
from lowrank_tune.lowrank.coding import Codebook
from lowrank_tune.lowrank.decomposers import Decomposer, make_decomposer
from lowrank_tune.lowrank.metrics import measure
from lowrank_tune.lowrank.svd import measure_optimum
from lowrank_tune.lowrank.weighted import measure_weighted, metric_factor, read_metric, weighted_residual
from lowrank_tune.records import TrialConfig

SHAPES = [(12, 20), (20, 12), (1, 7), (9, 9)]


def metric(dim: int, condition: float = 1e3, seed: int = 0) -> Tensor:
    """A positive definite matrix with eigenvalues from 1 down to 1 / condition."""
    axes = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q
    return (axes * torch.logspace(0, -torch.tensor(condition).log10().item(), dim, dtype=torch.float64)) @ axes.mT


def images(tokens: int, dim: int, seed: int = 1) -> Tensor:
    return torch.randn(3, tokens, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def root(metric_DD: Tensor) -> Tensor:
    """W^½ over the root of the mean of W's diagonal, as the factor's is."""
    values, vectors = torch.linalg.eigh(metric_DD / metric_DD.diagonal().mean())
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.mT


def least(x: Tensor, metric_DD: Tensor) -> Tensor:
    """The residuals of the SVD of X W^½ at each rank [N, T]."""
    values = torch.linalg.svdvals(x @ root(metric_DD)).square()
    left = torch.zeros(x.shape[:2], dtype=torch.float64)
    left[:, : values.shape[1] - 1] = values.flip(-1).cumsum(-1).flip(-1)[:, 1:]
    return left


@pytest.mark.parametrize(("tokens", "dim"), SHAPES)
@pytest.mark.parametrize("condition", [10.0, 1e8])
def test_the_weighted_svd_is_the_optimum_of_the_weighted_error_at_every_rank(tokens, dim, condition):
    x, w = images(tokens, dim), metric(dim, condition)
    factor = metric_factor(w)
    optimum = measure_weighted([x[:2], x[2:]], factor)
    expected = least(x, w)
    energy = (x @ root(w)).square().sum((-2, -1))
    torch.testing.assert_close(optimum.energy_N, energy)
    torch.testing.assert_close(optimum.residual_NR / energy[:, None], expected / energy[:, None], atol=1e-12, rtol=1e-6)
    for rank in range(1, min(tokens, dim) + 1):
        factors = baselines.svd_weighted(x, rank, factor)
        assert (factors.a_NTR.shape, factors.b_NRD.shape) == ((3, tokens, rank), (3, rank, dim))
        own = weighted_residual(x @ factor, *factors, factor)
        torch.testing.assert_close(own / energy, expected[:, rank - 1] / energy, atol=1e-12, rtol=1e-5)
        # What is measured of all ranks at once is what these factors are.
        figures = measure(x, *factors)
        for name in ("residual_N", "token_cosine_N", "flat_cosine_N"):
            found, told = getattr(figures, name), getattr(optimum.own.at(rank), name)
            torch.testing.assert_close(found, told, atol=1e-6, rtol=1e-5)


def test_no_other_factors_of_the_rank_are_nearer_in_the_metric():
    x, w = images(12, 20), metric(20)
    factor = metric_factor(w)
    best = measure_weighted([x], factor).residual_NR[:, 3]
    others = [baselines.svd(x, 4), baselines.svd_rows(x, 4)]
    others.append(baselines.power_1(x, 4, torch.Generator().manual_seed(0)))
    others.append(baselines.Factors(*(part + 1e-3 for part in baselines.svd_weighted(x, 4, factor))))
    for factors in others:
        assert (weighted_residual(x @ factor, *factors, factor) > best * (1 + 1e-9)).all()


def test_with_nothing_to_tell_directions_apart_it_is_the_svd():
    x = images(12, 20)
    for scale in (1.0, 1e-12):
        factor = metric_factor(scale * torch.eye(20))
        assert torch.equal(factor, torch.eye(20, dtype=torch.float64))
        weighted, plain = measure_weighted([x], factor), measure_optimum([x])
        torch.testing.assert_close(weighted.energy_N, plain.energy_N)
        for rank in (1, 5, 12):
            ours, theirs = baselines.svd_weighted(x, rank, factor), baselines.svd(x, rank)
            assert torch.equal(ours.a_NTR, theirs.a_NTR) and torch.equal(ours.b_NRD, theirs.b_NRD)
            own = weighted.own.at(rank)
            for name in ("residual_N", "token_cosine_N", "flat_cosine_N", "mse_N"):
                torch.testing.assert_close(getattr(own, name), getattr(plain.at(rank), name), atol=1e-10, rtol=1e-9)
        torch.testing.assert_close(weighted.residual_NR, plain.residual_NR, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize(("tokens", "dim"), [(12, 20), (20, 12)])
def test_images_of_few_directions_and_of_zeros_have_finite_figures(tokens, dim):
    x, w = images(tokens, dim), metric(dim)
    x[0] = x[0, :, :2] @ x[0, :2]
    x[1, 3:] = 0
    x[2] = 0
    optimum = measure_weighted([x], metric_factor(w))
    torch.testing.assert_close(optimum.residual_NR, least(x, w), atol=1e-10, rtol=1e-6)
    assert (optimum.residual_NR[0, 1:] < 1e-20 * optimum.energy_N[0]).all()
    for rank in (1, 2, 5, 12):
        figures, expected = optimum.own.at(rank), measure(x, *baselines.svd_weighted(x, rank, metric_factor(w)))
        for name in ("residual_N", "token_cosine_N", "flat_cosine_N"):
            torch.testing.assert_close(getattr(figures, name), getattr(expected, name), atol=1e-7, rtol=1e-6)


def test_what_float32_rounds_of_an_ill_conditioned_metric_costs_no_more_than_it_rounds():
    w, x = metric(32, 1e8), images(24, 32)
    factor = metric_factor(w.float())
    torch.testing.assert_close(factor @ factor.mT, w / w.diagonal().mean(), atol=5e-6, rtol=1e-5)
    found, expected = measure_weighted([x], factor).residual_NR, least(x, w)
    energy = (x @ root(w)).square().sum((-2, -1))[:, None]
    torch.testing.assert_close(found / energy, expected / energy, atol=1e-6, rtol=1e-2)


def test_a_file_that_is_no_metric_is_refused_with_the_remedy(tmp_path):
    def refused(match: str, **tensors: Tensor) -> None:
        save_file(tensors, tmp_path / "m.safetensors")
        with pytest.raises(InputError, match=match):
            read_metric(tmp_path / "m.safetensors", 4)

    with pytest.raises(InputError, match=r"absent.*remove what lies there and `lowrank-tune resume`"):
        read_metric(tmp_path / "absent.safetensors", 4)
    refused("metric_DD", other=torch.eye(4))
    refused("features have 4 columns", metric_DD=torch.eye(3))
    refused("not positive definite", metric_DD=-torch.eye(4))
    refused("not positive definite", metric_DD=torch.zeros(4, 4))
    refused("not positive definite", metric_DD=torch.full((4, 4), torch.nan))
    refused("not positive definite", metric_DD=torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.1])))
    save_file({"metric_DD": torch.diag(torch.tensor([4.0, 1.0, 1.0, 2.0]))}, tmp_path / "m.safetensors")
    torch.testing.assert_close(
        read_metric(tmp_path / "m.safetensors", 4),
        torch.diag(torch.tensor([2.0, 0.5, 0.5, 1.0], dtype=torch.float64).sqrt()),
    )


def made(family: str, rank: int, x: Tensor, metric_DD: Tensor | None = None) -> Decomposer:
    params = {"refined": {"steps": 2}, "shared": {"token_transform": "learned", "lambda_rate": 10.0}}[family]
    config = TrialConfig("t", 0, 0, family, rank, 1e-3, 1e-5, 4, 2, 2, {**params, "metric": "answers"})
    factor = torch.eye(x.shape[2]) if metric_DD is None else metric_factor(metric_DD)
    model = make_decomposer(config, *x.shape[1:], factor)
    model.initialise(list(x.float().split(8)), torch.Generator().manual_seed(1))
    return model


def decaying(n: int, tokens: int, dim: int, seed: int = 1) -> Tensor:
    x = torch.randn(n, tokens, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 0.2 + x * 0.9 ** torch.arange(dim)


@pytest.mark.parametrize("rank", [4, 20])  # by the filter, by all of G
def test_refined_in_a_metric_is_near_the_optimum_of_that_metric_and_not_of_the_plain_error(rank):
    x, w = decaying(6, 32, 48), metric(48)
    factor = metric_factor(w)
    optimum, plain = measure_weighted([x], factor), measure_optimum([x])
    with torch.no_grad():
        factors = made("refined", rank, x, w)(x.float())
    ratio = weighted_residual(x @ factor, *factors, factor) / optimum.residual_NR[:, rank - 1]
    assert (ratio > 1 - 1e-6).all() and (ratio < 1.05).all()
    assert (measure(x, *factors).residual_N > 1.2 * plain.at(rank).residual_N).all()
    torch.testing.assert_close(measure(x, *factors).residual_N, optimum.own.at(rank).residual_N, rtol=0.05, atol=0)


@pytest.mark.parametrize("family", ["refined", "shared"])
def test_a_metric_that_tells_no_directions_apart_changes_nothing(family):
    x = decaying(8, 16, 24).float()
    weighted = made(family, 6, x)
    config = TrialConfig("t", 0, 0, family, 6, 1e-3, 1e-5, 4, 2, 2, weighted.family_params | {"metric": "none"})
    plain = make_decomposer(config, 16, 24)
    assert plain.weight_DD is None
    plain.load_state_dict({name: it for name, it in weighted.state_dict().items() if name != "weight_DD"})
    for mine, theirs in zip(weighted(x), plain(x), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(weighted.loss(x), plain.loss(x))


def test_one_basis_for_all_images_is_nearer_in_the_metric_that_it_is_made_in():
    x, w = decaying(40, 16, 24), metric(24)
    factor = metric_factor(w)
    plain, weighted = made("shared", 5, x), made("shared", 5, x, w)
    errors = []
    for model in (plain, weighted):
        with torch.no_grad():
            a, b = model(x.float())
        errors.append((weighted_residual(x @ factor, a, b, factor).mean(), measure(x, a, b).residual_N.mean()))
    assert errors[1][0] < 0.8 * errors[0][0] and errors[1][1] > 1.1 * errors[0][1]
    # As large as without a metric: the step and lambda_rate mean what they do there.
    unit = weighted.weighted(x.float() / x.square().mean((-2, -1), keepdim=True).sqrt().float())
    assert unit.square().mean() == pytest.approx(1, rel=0.02)
    with torch.no_grad():
        a, b = made("shared", 24, x, w)(x.float())
    torch.testing.assert_close(a @ b, x.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rank", [10, 24])
@pytest.mark.parametrize("share", [1.2, 3.0])
def test_a_coded_image_of_a_weighted_model_keeps_the_plain_error_that_was_asked_for(rank, share, tmp_path):
    x, w = decaying(40, 16, 24).float(), metric(24)
    model = made("shared", rank, x, w)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * weight.abs().mean() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    model.settle()
    make_codebook(model).save(tmp_path / "codebook.safetensors")
    book = Codebook.load(tmp_path / "codebook.safetensors")
    for image in decaying(3, 16, 24, seed=7).float():
        with torch.no_grad():
            a, b = model(image[None])
        at_rank = (torch.linalg.vector_norm(image - a @ b) / torch.linalg.vector_norm(image)).item()
        target = min(0.8, max(0.02, at_rank) * share)
        stream = book.encode(image, target_error=target)
        y = book.decode(stream)
        error = (torch.linalg.vector_norm(image - y) / torch.linalg.vector_norm(image)).item()
        assert 0.8 * target < error <= target * (1 + 1e-4)
        size, told = book.count(image, target_error=target)
        assert told == pytest.approx(error, rel=1e-3) and abs(size - len(stream)) <= 8
        allowed = len(stream) + 40
        finer = book.decode(book.encode(image, max_bytes=allowed))
        assert torch.linalg.vector_norm(image - finer) <= torch.linalg.vector_norm(image - y)
