import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lowrank_tune.errors import CacheError, InputError
from lowrank_tune.lowrank.svd import Optimum, kept_optimum, measure_optimum

SHAPES = st.tuples(st.integers(1, 10), st.integers(1, 14))
FLOAT16 = SHAPES.flatmap(
    lambda shape: hnp.arrays(np.float16, shape, elements=st.floats(-60000, 60000, width=16))
)  # fmt: skip
KINDS = st.sampled_from(["gaussian", "deficient", "zero rows", "giant token", "graded", "equal rows"])


@st.composite
def matrices(draw):
    (tokens, dim), kind = draw(SHAPES), draw(KINDS)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = rng.standard_normal((tokens, dim)) / np.arange(1, dim + 1)
    if kind == "deficient":
        x = rng.standard_normal((tokens, 2)) @ rng.standard_normal((2, dim))
    elif kind == "zero rows":
        x[: tokens // 2] = 0
    elif kind == "giant token":
        x[0] *= 10.0 ** draw(st.integers(1, 7))
    elif kind == "graded":
        x *= np.logspace(-8, 4, tokens)[:, None]
    elif kind == "equal rows":
        x[:] = x[0]
    return x.astype(np.float32)


def numpy_figures(x):
    """Residual, token cosine and flat cosine at every rank from numpy's SVD, and where the rank's cut is well posed."""
    x = x.astype(np.float64)
    tokens = len(x)
    _, s, vt = np.linalg.svd(x, full_matrices=False)
    s = np.concatenate([s, np.zeros(tokens)])[: tokens + 1]
    residual, token, flat = np.zeros((3, tokens))
    for rank in range(1, tokens + 1):
        y = (x @ vt[:rank].T) @ vt[:rank]
        residual[rank - 1] = np.square(s[rank:]).sum()
        tokens_cosine = cosine((x * y).sum(1), np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1))
        token[rank - 1] = tokens_cosine.sum() / max(1, np.count_nonzero(x.any(axis=1)))
        flat[rank - 1] = cosine((x * y).sum(), np.linalg.norm(x) * np.linalg.norm(y))
    well_posed = np.square(s[:-1]) - np.square(s[1:]) > 1e-4 * s[0] ** 2
    return residual, token, flat, well_posed | (s[1:] <= 1e-12 * s[0])


def cosine(dot, norms):
    return np.divide(dot, norms, out=np.zeros_like(dot), where=norms > 0)


@given(st.one_of(FLOAT16, matrices()))
@settings(deadline=None, max_examples=100)
def test_agrees_with_numpys_svd_and_a_higher_rank_is_never_worse(x):
    residual, token, flat, well_posed = numpy_figures(x)
    optimum = measure_optimum([torch.from_numpy(x)[None]])
    energy = np.square(x.astype(np.float64)).sum()
    assert optimum.energy_N.item() == pytest.approx(energy, rel=1e-12)
    np.testing.assert_allclose(optimum.residual_NR[0].numpy(), residual, rtol=1e-6, atol=1e-12 * energy)
    np.testing.assert_allclose(optimum.flat_cosine_NR[0].numpy(), flat, atol=1e-6)
    # Where two singular values meet at the cut, X_r is not unique, and tokens share its error differently.
    difference = np.abs(optimum.token_cosine_NR[0].numpy() - token)
    assert difference[well_posed].max(initial=0) < 1e-6
    assert (optimum.residual_NR.diff(dim=1) <= 0).all()
    assert (optimum.flat_cosine_NR.diff(dim=1) >= -1e-12).all()
    assert (optimum.token_cosine_NR.diff(dim=1) >= -1e-9).all()
    assert (optimum.residual_NR[:, min(x.shape) - 1 :] <= 1e-12 * optimum.energy_N[:, None]).all()


def test_images_are_measured_one_by_one_in_order(power_law):
    x = power_law(5, 8, 12)
    together, apart = measure_optimum([x[:3], x[3:]]), measure_optimum(x.half().split(1))
    assert together.residual_NR.shape == (5, 8)
    assert torch.allclose(together.residual_NR, apart.residual_NR, rtol=0.02)
    assert torch.equal(measure_optimum([x[4:]]).residual_NR[0], together.residual_NR[4])


def test_at_gives_one_ranks_figures(power_law):
    x = power_law(3, 8, 12)
    optimum = measure_optimum([x])
    figures = optimum.at(3)
    u, s, vt = torch.linalg.svd(x.double(), full_matrices=False)
    truncated = (u[..., :3] * s[:, None, :3]) @ vt[:, :3]
    assert torch.allclose(figures.mse_N, (x - truncated).square().mean((1, 2)))
    assert torch.equal(figures.residual_N, optimum.residual_NR[:, 2])
    for rank in (0, 9):
        with pytest.raises(InputError, match=f"rank {rank}"):
            optimum.at(rank)


def test_a_file_gives_back_the_same_figures(tmp_path, power_law):
    optimum = measure_optimum([power_law(3, 8, 12)])
    optimum.save(tmp_path / "optimum.safetensors")
    loaded = Optimum.load(tmp_path / "optimum.safetensors")
    assert torch.equal(loaded.token_cosine_NR, optimum.token_cosine_NR)
    assert torch.equal(loaded.at(2).mse_N, optimum.at(2).mse_N)


def test_an_optimum_is_kept_for_the_images_that_it_is_of_and_no_others(tmp_path, power_law):
    path, x_NTD = tmp_path / "optimum.safetensors", power_law(2, 8, 12)
    path.touch()  # as a machine that was lost may leave it
    kept_optimum(path, "two", [x_NTD])
    assert torch.equal(kept_optimum(path, "two", []).energy_N, measure_optimum([x_NTD]).energy_N)
    others = kept_optimum(path, "two others", [2 * x_NTD])
    assert torch.equal(others.energy_N, kept_optimum(path, "two others", []).energy_N)
    torch.testing.assert_close(others.energy_N, 4 * measure_optimum([x_NTD]).energy_N)


def test_numbers_that_are_not_finite_and_no_image_are_refused(power_law):
    x = power_law(3, 8, 12)
    for value in (float("nan"), float("inf")):
        x[2, 1, 1] = value
        with pytest.raises(CacheError, match="image 2"):
            measure_optimum([x])
    with pytest.raises(InputError, match="at least one image"):
        measure_optimum([])
