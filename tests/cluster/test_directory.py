"""Studies that begin at the same moment in one results directory."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from threading import Barrier

import pytest

from lowrank_tune.cluster.studies import list_studies
from lowrank_tune.cluster.study_dir import Status, create_study, read_plan
from lowrank_tune.config.loading import parse_study
from lowrank_tune.config.paths import anchored
from lowrank_tune.config.plan import Plan, make_plan
from lowrank_tune.config.source import ManifestSource, TensorSource
from lowrank_tune.errors import InputError
from lowrank_tune.files import read_fields
from lowrank_tune.records import TrialConfig, TrialOutcome
from lowrank_tune.study import plan_study
from tests.cluster.conftest import STUDY

AT_ONCE = 10
SPEC = parse_study(STUDY, "tiny.yaml")


def begin_at_once(plan: Callable[[], Plan]) -> tuple[list[Plan], list[str]]:
    """Begin ten studies on threads that wait for each other: those that began, and why the others did not."""
    barrier, begun, refused = Barrier(AT_ONCE), [], []

    def begin(number: int) -> None:
        barrier.wait()
        planned = plan()
        try:
            create_study(planned, f"# {number}\n")
            begun.append(planned)
        except InputError as error:
            refused.append(str(error))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(begin, range(AT_ONCE)))
    return begun, refused


def test_ten_studies_that_begin_at_once_are_told_apart(tmp_path: Path) -> None:
    begun, refused = begin_at_once(lambda: plan_study(SPEC, tmp_path))
    # Two ids are the same once in 4096 pairs; the second one is refused then.
    assert len({plan.study_id for plan in begun}) == len(begun) == AT_ONCE - len(refused)
    assert len(begun) >= AT_ONCE - 1
    assert len({(plan.study_dir / "study.yaml").read_text() for plan in begun}) == len(begun)
    assert [read_plan(plan.study_dir).study_id for plan in begun] == [plan.study_id for plan in begun]


def test_of_studies_that_draw_the_same_id_one_begins_and_the_others_are_told(tmp_path: Path) -> None:
    moment = datetime(2026, 3, 1, tzinfo=UTC)
    begun, refused = begin_at_once(lambda: make_plan(SPEC, tmp_path, moment))
    assert len(begun) == 1
    assert len(refused) == AT_ONCE - 1
    for told in refused:
        assert told.startswith(f"study {begun[0].study_id}: {begun[0].study_dir} is there already")
        assert "begin again" in told
    assert read_plan(begun[0].study_dir) == begun[0]


@pytest.mark.parametrize("name", ["café", "\U0001f600", "a\x85\u2028b", 'say "x"\\n'])
def test_a_relative_path_of_any_characters_becomes_absolute(name: str) -> None:
    features = SPEC.features.model_copy(update={"source": TensorSource(tensors=name)})
    split = SPEC.split.model_copy(update={"group_by": None})
    source = anchored(SPEC.model_copy(update={"features": features, "split": split})).features.source
    assert source == TensorSource(tensors=str(Path.cwd() / name))
    named = TensorSource.model_validate({"tensors": {"path": ["x", "/y"], "key": "a.b"}})
    features = SPEC.features.model_copy(update={"source": named})
    source = anchored(SPEC.model_copy(update={"features": features, "split": split})).features.source
    assert (source.paths, source.key) == ((str(Path.cwd() / "x"), "/y"), "a.b")
    tables = ManifestSource(manifest=("a.csv", "/b/*.csv", "c/*.csv"), root="d")
    source = anchored(
        SPEC.model_copy(update={"features": SPEC.features.model_copy(update={"source": tables})})
    ).features.source
    here = str(Path.cwd())
    assert source == ManifestSource(manifest=(f"{here}/a.csv", "/b/*.csv", f"{here}/c/*.csv"), root=f"{here}/d")


def test_a_working_directory_that_no_study_file_can_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / os.fsdecode(b"caf\xe9")
    here.mkdir()
    monkeypatch.chdir(here)
    features = SPEC.features.model_copy(update={"source": TensorSource(tensors="in")})
    with pytest.raises(InputError, match=r"working directory .*/caf\\xe9: its name is not UTF-8.*start from another"):
        anchored(SPEC.model_copy(update={"features": features}))


def test_a_killed_study_is_told_although_a_trial_of_it_is_damaged(tmp_path: Path) -> None:
    plan = plan_study(SPEC, tmp_path)
    create_study(plan, STUDY)
    trial = plan.study_dir / "trials" / "r002-sketch-0000"
    trial.mkdir(parents=True)
    (trial / "outcome.json").write_text('{"config": ')
    (plan.study_dir / "status.json").write_text('{"state": "running", "started": "2026-03-01T00:00:00+00:00"}')
    (told,) = list_studies(results=tmp_path)
    assert (told["state"], told["progress"]["done"]) == ("failed", 0)
    assert f"lowrank-tune resume {plan.study_id}" in told["reason"]


def test_a_checkpoint_below_a_home_that_nobody_has_stays_a_name() -> None:
    encoder = SPEC.features.encoder.model_copy(update={"checkpoint": "~nobody-of-this-name/x"})
    features = SPEC.features.model_copy(update={"encoder": encoder})
    assert anchored(SPEC.model_copy(update={"features": features})).features.encoder == encoder


@pytest.mark.parametrize(
    ("first", "second", "best"),
    [
        ({"val_residual_ratio": 1.5, "val_mse": 0.1}, {"val_residual_ratio": 1.2}, {"residual_ratio": 1.2}),
        (
            {"val_bytes_at_error": 900.0, "val_residual_ratio": 1.1},
            {"val_bytes_at_error": 800.0},
            {"bytes_at_error": 800.0},
        ),
        ({"val_mse": 0.1}, {"val_mse": float("nan")}, {"mse": 0.1}),
    ],
)
def test_a_status_tells_the_best_of_a_rank_in_what_its_trials_have(
    tmp_path: Path, first: dict[str, float], second: dict[str, float], best: dict[str, float]
) -> None:
    config = TrialConfig("r008-shared-0000", 0, 0, "shared", 8, 1e-3, 0.0, 4, 5, 5)
    with Status(tmp_path, 2) as status:
        status.trial_started(config)
        status.trial_epoch(config.trial_id, 1, {f"best_{name}": value for name, value in first.items()})
        status.trial_ended(TrialOutcome(config, "finished", "budget", 5, 4, second, str(tmp_path), 1.0))
    (found,) = read_fields(tmp_path / "status.json")["progress"]["best"].values()
    assert found == best | {"trial_id": config.trial_id}
