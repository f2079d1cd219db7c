from collections.abc import Callable
from dataclasses import replace
from io import BytesIO

import pytest
import torch
from torch import Tensor
from trial_configs import DIRECT, REFINED, SKETCH

from lowrank_tune.errors import InputError
from lowrank_tune.lowrank.data import FeatureMatrix
from lowrank_tune.lowrank.decomposers import load_decomposer
from lowrank_tune.lowrank.metrics import mean_ratio, measure, residual_ratio
from lowrank_tune.lowrank.svd import measure_optimum
from lowrank_tune.lowrank.trainer import Trainer
from lowrank_tune.records import Split, TrialConfig

SPLIT = Split(train=tuple(range(24)), validation=tuple(range(24, 32)), test=())
BOTH = pytest.mark.parametrize("config", [DIRECT, SKETCH], ids=["direct", "sketch"])

MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def make_trainer(make_features, power_law) -> MakeTrainer:
    def make(config: TrialConfig, x_NTD: Tensor | None = None, **options: int) -> Trainer:
        x_NTD = power_law(32, 12, 20) if x_NTD is None else x_NTD
        return Trainer(config, FeatureMatrix(make_features(x_NTD)), SPLIT, measure_optimum([x_NTD[24:]]), **options)

    return make


def run(trainer: Trainer) -> list[dict[str, float]]:
    rows = []
    while trainer.stopped_by is None:
        rows.append(trainer.step())
    return rows


def numbers(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@BOTH
def test_training_lowers_the_error_until_its_budget_and_tells_the_best_models_own_figures(
    make_trainer, power_law, config
):
    trainer = make_trainer(config)
    rows = run(trainer)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert (trainer.stopped_by, trainer.reason, trainer.history) == ("budget", "", rows)
    best, last = min(rows, key=lambda row: row["val_residual_ratio"]), rows[-1]
    assert trainer.best_epoch == last["best_epoch"] == best["epoch"] > 1
    assert last["best_val_mse"] == best["val_mse"]
    x = power_law(32, 12, 20)[24:]
    with torch.no_grad():
        figures = measure(x, *trainer.best_model(x))
    optimum = measure_optimum([x])
    rho = residual_ratio(figures.residual_N, optimum.at(4).residual_N, optimum.energy_N)
    assert mean_ratio(rho) == pytest.approx(best["val_residual_ratio"], rel=1e-6)
    assert figures.mse_N.mean().item() == pytest.approx(best["val_mse"], rel=1e-6)
    assert figures.token_cosine_N.mean().item() == pytest.approx(best["val_token_cosine"], rel=1e-6)


def test_the_sketch_starts_from_the_training_images_axes(make_trainer, power_law):
    tiny = replace(SKETCH, lr=1e-9, epochs=1)
    trained = run(make_trainer(tiny))[0]["val_residual_ratio"]
    unrelated = make_trainer(tiny)
    unrelated.model.initialise = lambda x_batches, generator: None  # stays as drawn
    assert 1 <= trained < 0.8 * run(unrelated)[0]["val_residual_ratio"]


@BOTH
def test_the_same_seed_gives_the_same_numbers(make_trainer, config):
    first = numbers(run(make_trainer(config)))
    assert numbers(run(make_trainer(config))) == first
    assert numbers(run(make_trainer(replace(config, seed=8)))) != first


@BOTH
def test_a_restored_trainer_goes_on_bit_for_bit(make_trainer, config):
    whole = make_trainer(config)
    rows = run(whole)
    part = make_trainer(config)
    part.step()
    part.step()
    file = BytesIO()
    state = part.state()
    torch.save(state, file)
    part.step()  # what `state` returned must not follow it
    file.seek(0)
    for kept in (state, torch.load(file, weights_only=True)):
        resumed = make_trainer(config)
        resumed.restore(kept)
        assert numbers(run(resumed)) == numbers(rows[2:])
        for mine, theirs in ((resumed.model, whole.model), (resumed.best_model, whole.best_model)):
            assert all(map(torch.equal, mine.parameters(), theirs.parameters()))


REFINED_2 = replace(REFINED, family_params={"steps": 2})
NESTED = [replace(SKETCH, nested_ranks=(1, 2, 4)), replace(REFINED_2, nested_ranks=(2, 4))]


@pytest.mark.parametrize("config", [DIRECT, SKETCH, REFINED_2, *NESTED])
def test_a_batch_in_parts_gives_the_numbers_of_the_whole(make_trainer, config):
    config = replace(config, batch_size=10, lr=1e-2, epochs=4)
    whole, parts = make_trainer(config), make_trainer(config, micro_batch=3)
    for expected, row in zip(run(whole), run(parts), strict=True):
        assert numbers([row])[0] == pytest.approx(numbers([expected])[0], rel=2e-4)
    moved = [(a - b).abs().max() for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True)]
    assert max(moved) < 1e-3


def test_training_stops_after_its_patience_and_writes_its_model_when_it_improved(make_trainer, tmp_path):
    trainer = make_trainer(replace(SKETCH, lr=30.0, epochs=50, patience=3, objective="val_mse"))
    written = []
    while trainer.stopped_by is None:
        trainer.step()
        trainer.save(tmp_path)
        written.append((tmp_path / "best_model.safetensors").stat().st_mtime_ns)
    assert trainer.stopped_by == "patience"
    assert len(written) == trainer.best_epoch + 3
    assert len(set(written)) == len({row["best_epoch"] for row in trainer.history}) < len(written)
    with pytest.raises(RuntimeError, match="has stopped"):
        trainer.step()


@pytest.mark.parametrize(
    ("objective", "best"), [("val_residual_ratio", min), ("val_mse", min), ("val_token_cosine", max)]
)
def test_the_objective_keeps_the_weights_and_ends_the_training(make_trainer, objective, best):
    trainer = make_trainer(replace(SKETCH, lr=3.0, epochs=40, patience=4, objective=objective))
    rows = run(trainer)
    chosen = best(rows, key=lambda row: row[objective])
    assert (trainer.best_epoch, rows[-1][f"best_{objective}"]) == (chosen["epoch"], chosen[objective])
    assert trainer.stopped_by == ("patience" if len(rows) == chosen["epoch"] + 4 else "budget")


def test_validation_images_of_zeros_count_in_no_figure(make_trainer, power_law):
    x = power_law(32, 12, 20)
    x[28:] = 0
    row = make_trainer(SKETCH, x).step()
    model, seen = make_trainer(SKETCH, x), x[24:28]
    model.step()
    with torch.no_grad():
        figures = measure(seen, *model.best_model(seen))
    assert row["val_mse"] == pytest.approx(figures.mse_N.mean().item())
    assert row["val_token_cosine"] == pytest.approx(figures.token_cosine_N.mean().item())
    x[24:] = 0
    with pytest.raises(InputError, match="nothing but zeros"):
        make_trainer(SKETCH, x)


def test_the_learning_rate_falls_on_a_plateau(make_trainer):
    rows = run(make_trainer(replace(SKETCH, lr=30.0, epochs=12, patience=12, objective="val_mse")))
    assert rows[-1]["lr"] < rows[0]["lr"] == 30.0


@BOTH
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_end_it_as_an_error(make_features, power_law, config, value):
    x = power_law(32, 12, 20)
    optimum = measure_optimum([x[24:]])
    x[3, 2, 1] = value
    trainer = Trainer(config, FeatureMatrix(make_features(x)), SPLIT, optimum)
    row = trainer.step()
    assert trainer.stopped_by == "error"
    assert trainer.reason.startswith("epoch 1: train_loss")
    assert row["epoch"] == 1
    assert row["best_epoch"] == trainer.best_epoch == 0
    assert trainer.history == []


def test_a_diverging_training_keeps_its_best_model(make_trainer, tmp_path):
    trainer = make_trainer(DIRECT)
    trainer.step()
    best = trainer.step()
    with torch.no_grad():
        trainer.model.token_in.weight.fill_(torch.inf)
    row = trainer.step()
    assert (trainer.stopped_by, trainer.best_epoch, trainer.epoch) == ("error", 2, 2)
    assert "epoch 3: train_loss, val_mse" in trainer.reason
    assert row["best_val_mse"] == best["val_mse"]
    trainer.save(tmp_path)
    assert all(weight.isfinite().all() for weight in load_decomposer(tmp_path / "best_model.safetensors").parameters())


@BOTH
def test_saved_files_hold_the_trial(make_trainer, tmp_path, config):
    directory = tmp_path / "trial"
    directory.mkdir()
    trainer = make_trainer(config)
    run(trainer)
    trainer.save(directory)
    assert [path.name for path in directory.iterdir()] == ["best_model.safetensors"]
    x = torch.randn(2, 12, 20, generator=torch.Generator().manual_seed(0))
    loaded = load_decomposer(directory / "best_model.safetensors")
    assert torch.equal(loaded(x).b_NRD, trainer.best_model(x).b_NRD)


@pytest.mark.parametrize(
    ("change", "split", "message"),
    [
        ({"rank": 13}, SPLIT, "rank 13"),
        ({"family": "neural"}, SPLIT, "family neural"),
        ({"family_params": {"lambda_b": 1.0}}, SPLIT, "lambda_ortho"),
        ({}, replace(SPLIT, train=()), "an image each"),
        ({}, replace(SPLIT, validation=(1,)), "optimum is of 8"),
    ],
)
def test_what_does_not_fit_together_is_refused(make_features, power_law, change, split, message):
    x = power_law(32, 12, 20)
    with pytest.raises(InputError, match=message):
        Trainer(replace(DIRECT, **change), FeatureMatrix(make_features(x)), split, measure_optimum([x[24:]]))


SHARED = replace(SKETCH, family="shared", family_params={"token_transform": "none", "lambda_rate": 30.0})


@pytest.mark.parametrize(("rank", "nested", "told"), [(12, (), True), (15, (), False), (15, (4, 15), False)])
def test_above_the_rank_of_the_images_there_is_no_ratio_to_the_optimum(make_trainer, rank, nested, told):
    trainer = make_trainer(replace(SHARED, rank=rank, nested_ranks=nested, objective="val_mse"))
    rows = run(trainer)
    assert trainer.stopped_by in ("budget", "patience")
    assert all(("val_residual_ratio" in row) == ("best_val_residual_ratio" in row) == told for row in rows)
    assert ("val_residual_ratio" in trainer.figures) == told


def test_the_best_epoch_holds_what_is_required_and_those_that_do_not_come_after_it(make_trainer):
    rows = run(make_trainer(DIRECT))
    assert rows[-1]["best_epoch"] == 5
    # The cosine rises with every epoch: at most that of the second is held by the first two.
    most = rows[1]["val_token_cosine"] + 1e-7
    assert rows[2]["val_token_cosine"] > most
    held = run(make_trainer(replace(DIRECT, require={"val_token_cosine": most})))
    assert [row["best_epoch"] for row in held] == [1, 2, 2, 2, 2]
    assert held[-1]["best_val_residual_ratio"] == rows[1]["val_residual_ratio"]
    # Where none holds it, the one that is nearest to it.
    assert run(make_trainer(replace(DIRECT, require={"val_token_cosine": 1e-3})))[-1]["best_epoch"] == 1


@pytest.mark.parametrize("config", [DIRECT, SHARED], ids=["direct", "shared"])
def test_what_is_required_is_measured(make_trainer, power_law, config):
    require = {"val_residual_ratio_worst": 99.0, "val_bytes": 1e6}
    trainer = make_trainer(replace(config, require=require))
    (*_, last) = run(trainer)
    x = power_law(32, 12, 20)[24:]
    with torch.no_grad():
        figures = measure(x, *trainer.model(x))
    optimum = measure_optimum([x])
    rho = residual_ratio(figures.residual_N, optimum.at(config.rank).residual_N, optimum.energy_N)
    assert last["val_residual_ratio_worst"] == pytest.approx(rho.max().item(), rel=1e-5)
    (*_, counted) = run(make_trainer(replace(config, target_error=0.5)))
    assert last["val_bytes"] == counted["val_bytes"]
    assert last["val_mse"] == counted["val_mse"]
