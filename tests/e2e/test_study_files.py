"""The study files that ship, where two cores suffice: each run as it is, but for sizes that take seconds."""

import re
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from lowrank_tune import extend_study, open_features, run_study
from lowrank_tune.study import StudyResult

STUDIES = Path(__file__).parents[2] / "studies"
SMALL = ("features.source={samples: 24}", "features.encoder.image_size=112")
SHORT = ("split={validation: 4, test: 4}", "search.space.batch_size=4", "training={epochs: 2, patience: 2}",
         "report={images: [0], channels: 2, confirm_seeds: 0}", "resources.max_concurrent=1")  # fmt: skip
GRACE = "scheduler.grace_epochs=1"

Run = Callable[..., StudyResult]


@pytest.fixture(scope="module")
def run(ray_cluster: None, no_report: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a study file; all in one results directory, so that one extraction serves them."""
    results = tmp_path_factory.mktemp("results")

    def call(name: str, *overrides: str) -> StudyResult:
        return run_study(STUDIES / f"{name}.yaml", results=results, overrides=(*SHORT, *overrides))

    return call


def trained(result: StudyResult) -> set[tuple[str, int]]:
    return {(row.method, row.rank) for row in result.comparison.rows if row.trial_id}


@pytest.mark.parametrize("file", sorted(STUDIES.glob("*.yaml")), ids=lambda file: file.stem)
def test_each_opens_with_its_command_its_runtime_and_what_to_expect(file: Path) -> None:
    header = "".join(line for line in file.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert re.search(rf"lowrank-tune (run|submit) studies/{file.name}", header)
    assert re.search(r"About (a minute|\d+ minutes)|Runtime: not measured", header)
    assert any(figure in header for figure in ("ρ", "cosine", "KiB"))


@pytest.fixture(scope="module")
def swept(run: Run) -> StudyResult:
    return run("rank_sweep", *SMALL, "search.space.rank=[2, 4, 8]")


def test_the_rank_sweep_trains_each_rank_once(swept: StudyResult) -> None:
    assert trained(swept) == {("refined", rank) for rank in (2, 4, 8)}
    assert len(swept.outcomes) == 3


def test_the_lambda_grid_tries_every_combination(run: Run) -> None:
    result = run("lambda_grid", *SMALL, "search.space.rank=4")
    tried = {tuple(outcome.config.family_params.values()) for outcome in result.outcomes}
    assert len(tried) == len(result.outcomes) == 12
    assert trained(result) == {("direct", 4)}


def test_the_shootout_tries_every_family_and_once_more_gives_the_same_figures_to_the_byte(run: Run) -> None:
    results = [run("family_shootout", *SMALL, "search.space.rank=[2, 4]", "search.trials=9", GRACE) for _ in range(2)]
    for result in results:
        assert len(result.outcomes) == 9
        assert trained(result) == {(family, rank) for family in ("direct", "sketch", "refined") for rank in (2, 4)}
    first, second = (result.directory for result in results)
    assert first != second
    assert (first / "per_image.parquet").read_bytes() == (second / "per_image.parquet").read_bytes()
    without_times = [re.sub(r'"images_per_second": [^,]+,', "", (each / "comparison.json").read_text())
                     for each in (first, second)]  # fmt: skip
    assert without_times[0] == without_times[1]


def test_one_nested_model_serves_every_rank(run: Run) -> None:
    result = run("nested", *SMALL, "search.space.rank={nested: [2, 4, 8]}")
    assert len(result.outcomes) == 4
    assert {rank for _, rank in trained(result)} == {2, 4, 8}


def test_a_search_in_bytes_tells_them_of_every_trial_and_of_two_objectives_the_front(run: Run) -> None:
    few = ("search.space.rank=[4, 8]", "search.trials=8", GRACE, "target_error=0.3")
    both = run("bytes", *SMALL, *few, "objective=[val_bytes, val_error]")
    assert trained(both) == {(family, rank) for family in ("refined", "shared") for rank in (4, 8)}
    wider = ["search.space.families.shared.token_transform=[none, dct, learned]"]
    longer = extend_study(both.study_id, trials=4, overrides=wider, results=both.directory.parent.parent)
    assert longer.outcomes[:8] == both.outcomes
    assert {outcome.config.objective for outcome in longer.outcomes} == {"val_bytes_at_error"}
    front = next(front for front in longer.comparison.fronts if front.name == "search")
    assert (front.x, front.y, len(front.points)) == ("val_bytes", "val_error", 12)
    journal = JournalStorage(JournalFileBackend(str(longer.directory / "tune" / "optuna.journal")))
    best = {trial.user_attrs["trial_id"] for trial in optuna.load_study(study_name=None, storage=journal).best_trials}
    finished = {outcome.config.trial_id for outcome in longer.outcomes if outcome.status == "finished"}
    assert best
    assert {point.trial_id for point in front.points if point.on_front} & finished <= best <= finished


def test_tensors_that_others_extracted_are_imported(run: Run, swept: StudyResult, tmp_path: Path) -> None:
    extracted = open_features(swept.features.directory)
    folder = tmp_path / "features"
    folder.mkdir()
    for number in range(len(extracted)):
        torch.save(extracted.load([number])[0], folder / f"features_{number}.pt")
    result = run("import_cache", f"features.source.tensors={folder}", "search.space.rank=[2, 4]", GRACE)
    assert trained(result) == {(family, rank) for family in ("sketch", "refined") for rank in (2, 4)}
    assert (result.features.tokens, result.features.dim) == (extracted.features.tokens, extracted.features.dim)
