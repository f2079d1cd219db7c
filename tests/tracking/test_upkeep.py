"""Studies removed, what stays and what a removal that is killed leaves; and notes on studies."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import ViewType
from tracked_study import Reader, build_plan, config_of, outcome_of, write_status, write_study, write_trial

from lowrank_tune.cluster.study_dir import claimed, create_study, study_folders
from lowrank_tune.config.plan import Plan
from lowrank_tune.files import bytes_below
from lowrank_tune.lowrank.pretrained import load_decomposer
from lowrank_tune.tracking.reconcile import reconcile
from lowrank_tune.tracking.store import local_uri
from lowrank_tune.tracking.sync import Repairs
from tests.conftest import Typed

HERE = Path(__file__).parent
TRIALS = [config_of(0), config_of(1, "direct", 4), config_of(2), config_of(3)]


def begin(results: Path, seed: int, **sections: object) -> Plan:
    """A finished study, on file and in MLflow."""
    plan = build_plan(results, seed=seed, **sections)
    create_study(plan, "name: tracked\n")
    for config in TRIALS:
        write_trial(plan, config, 3, outcome_of(plan, config))
    resolved = (plan.study_dir / "study.resolved.yaml").read_text()
    comparison = write_study(plan, TRIALS)
    (plan.study_dir / "study.resolved.yaml").write_text(resolved)
    write_status(plan, "finished")
    reconcile(plan, comparison)
    return plan


@pytest.fixture
def studies(tmp_path: Path, migrated: Path) -> tuple[Plan, Plan]:
    """One to remove, whose models are registered, and one to leave alone."""
    shutil.copy(migrated, tmp_path / "mlflow.db")
    (tmp_path / "features" / "0123").mkdir(parents=True)
    (tmp_path / "features" / "0123" / "manifest.json").write_text("{}")
    return begin(tmp_path, 1), begin(tmp_path, 2)


def runs_of(plan: Plan) -> int:
    """How many runs MLflow shows of a study."""
    client = MlflowClient(local_uri(plan.results))
    experiment = Reader(local_uri(plan.results)).experiment.experiment_id
    return len(client.search_runs([experiment], f"tags.`lowrank.study_id` = '{plan.study_id}'"))


def test_a_removed_study_is_gone_from_disk_and_mlflow_and_nothing_else_is(
    studies: tuple[Plan, Plan], typed: Typed
) -> None:
    doomed, other = studies
    results, before = (
        doomed.results,
        bytes_below(doomed.results / "studies") + bytes_below(doomed.results / "mlartifacts"),
    )
    kept = {path: path.stat().st_size for path in other.study_dir.rglob("*") if path.is_file()}
    code, out, _ = typed("rm", doomed.study_id[:-1], "--json", "--results", results)
    (told,) = json.loads(out)
    after = bytes_below(results / "studies") + bytes_below(results / "mlartifacts")
    assert (code, told["study_id"], told["runs"]) == (0, doomed.study_id, len(TRIALS) + 1)
    assert told["bytes"] == before - after > 0.4 * before
    assert study_folders(results) == [other.study_dir]
    assert {path.name for path in (results / "studies").iterdir()} == {other.study_id, ".removing.lock"}
    assert (runs_of(doomed), runs_of(other)) == (0, len(TRIALS) + 1)
    assert {path: path.stat().st_size for path in kept} == kept
    assert (results / "features" / "0123" / "manifest.json").is_file()
    assert typed("rm", doomed.study_id, "--results", results)[0] == 2
    assert reconcile(other) == Repairs()


def test_registered_models_stay_and_can_be_loaded(tmp_path: Path, migrated: Path, typed: Typed) -> None:
    shutil.copy(migrated, tmp_path / "mlflow.db")
    plan = begin(tmp_path, 1, tracking={"register_as": "decomposer"})
    code, out, _ = typed("rm", plan.study_id, "--results", tmp_path)
    assert code == 0
    assert "registered models stay: decomposer 2, decomposer 1" in out
    client = MlflowClient(local_uri(tmp_path))
    for version in client.search_model_versions("name = 'decomposer'"):
        load_decomposer(Path(version.source.removeprefix("file://")) / "data" / "exported")


def test_a_study_at_work_is_refused_and_so_is_all_that_the_command_names(
    studies: tuple[Plan, Plan], typed: Typed
) -> None:
    doomed, other = studies
    with claimed(other.study_dir):
        code, _, said = typed("rm", doomed.study_id, other.study_id, "--results", doomed.results)
    assert code == 2
    assert f"lowrank-tune stop {other.study_id}" in said
    assert len(study_folders(doomed.results)) == 2
    assert runs_of(doomed) == len(TRIALS) + 1


def test_a_removal_that_is_killed_is_completed_by_the_next(studies: tuple[Plan, Plan], typed: Typed) -> None:
    doomed, other = studies
    command = [sys.executable, str(HERE / "removed.py"), str(doomed.results), doomed.study_id]
    subprocess.run(command, check=True, cwd=HERE.parents[1])
    # Its folder is no study any more, and MLflow shows what is left of it.
    assert study_folders(doomed.results) == [other.study_dir]
    assert runs_of(doomed) == len(TRIALS) + 1 - 3
    code, out, _ = typed("rm", doomed.study_id, "--results", doomed.results)
    assert (code, doomed.study_id in out) == (0, True)
    assert (runs_of(doomed), runs_of(other)) == (0, len(TRIALS) + 1)
    assert {path.name for path in (doomed.results / "studies").iterdir()} == {other.study_id, ".removing.lock"}
    deleted = MlflowClient(local_uri(doomed.results)).search_runs(
        [Reader(local_uri(doomed.results)).experiment.experiment_id], run_view_type=ViewType.DELETED_ONLY
    )
    assert not [run for run in deleted if Path(run.info.artifact_uri.removeprefix("file://")).exists()]


def test_reconcile_completes_a_removal_and_what_was_left_of_another(studies: tuple[Plan, Plan], typed: Typed) -> None:
    doomed, other = studies
    left = other.study_dir.with_name(".removed-tracked-0")
    left.mkdir()
    (left / "per_image.parquet").write_bytes(b"left")
    doomed.study_dir.rename(doomed.study_dir.with_name(f".removing-{doomed.study_id}"))
    code, out, _ = typed("reconcile", doomed.study_id, "--json", "--results", doomed.results)
    assert (code, json.loads(out)["studies_removed"]) == (0, [doomed.study_id])
    assert not left.exists()
    assert (runs_of(doomed), runs_of(other)) == (0, len(TRIALS) + 1)


def description(plan: Plan) -> str:
    (parent,) = [run for run in Reader(local_uri(plan.results)).runs("study") if run.info.run_name == plan.study_id]
    return str(parent.data.tags["mlflow.note.content"])


def test_notes_stand_above_what_mlflow_says_of_a_study_whoever_wrote_it(
    studies: tuple[Plan, Plan], typed: Typed
) -> None:
    plan, other = studies
    where = ("--results", plan.results)
    client, parent = MlflowClient(local_uri(plan.results)), Reader(local_uri(plan.results))
    for run in parent.runs("study"):
        client.set_tag(run.info.run_id, "mlflow.note.content", "typed in the UI\n\nrandom weights")
    for text in ("lens cap was on", "run again on Monday\n\nwith the other camera"):
        code, out, said = typed("note", plan.study_id, text, *where)
        assert (code, said) == (0, "")
    lines = description(plan).splitlines()
    assert [re.sub(r"^\d{4}-\d\d-\d\d: ", "DAY ", line) for line in lines if line] == [
        *(
            "DAY run again on Monday",
            "with the other camera",
            "DAY lens cap was on",
            "typed in the UI",
            "random weights",
        )
    ]
    assert description(other) == "typed in the UI\n\nrandom weights"
    status = json.loads(typed("status", plan.study_id, "--json", *where)[1])
    assert [note[12:] for note in status["notes"]] == ["lens cap was on", "run again on Monday\nwith the other camera"]
    assert "lens cap was on" in typed("status", plan.study_id, *where)[1]
    assert "run again on Monday with the other camera" in typed("list", *where)[1]
    assert reconcile(plan) == Repairs()


def test_a_note_comes_back_with_a_lost_database_and_waits_for_a_store_that_is_away(
    studies: tuple[Plan, Plan], typed: Typed
) -> None:
    plan, _ = studies
    database = plan.results / "mlflow.db"
    whole, _ = database.read_bytes(), database.write_bytes(b"SQLite format 3" + bytes(99))
    code, _, said = typed("note", plan.study_id, "lens cap was on", "--results", plan.results)
    assert (code, "not in MLflow" in said) == (0, True)
    database.write_bytes(whole)
    assert reconcile(plan).notes_told
    assert "lens cap was on" in description(plan)


def test_a_note_that_is_none_is_refused(studies: tuple[Plan, Plan], typed: Typed) -> None:
    plan, _ = studies
    assert [typed("note", plan.study_id, text, "--results", plan.results)[0] for text in ("", " \n", "x" * 2001)] == [
        *(2, 2, 2)
    ]
    assert not (plan.study_dir / "notes.json").exists()
