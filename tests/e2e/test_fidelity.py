"""What the language model still sees, of a real study: asked once, killed on the way and continued, then widened."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from mlflow import MlflowClient

from lowrank_tune import run_study
from lowrank_tune.features.sources import write_samples
from lowrank_tune.fidelity.measure import read_fidelity
from lowrank_tune.study import StudyResult
from tests.conftest import Typed

STUDY = """\
name: asked
seed: 1
features:
  source: {manifest: DATA}
  encoder: {checkpoint: tiny-random, image_size: 56, compute_dtype: float32}
split: {validation: 2, test: 5}
search: {method: grid, space: {rank: [1, 4], batch_size: 4, families: {sketch: }}}
training: {epochs: 1, patience: 1}
scheduler: {kind: none}
resources: {max_concurrent: 1}
report: {images: [0], channels: 1, confirm_seeds: 0}
fidelity: {questions: question, answers: answers, images: 2, max_new_tokens: 3, at: [factors, int8, pictures]}
"""


def write_records(home: Path) -> Path:
    """Photographs with two questions each, but one without; some of the right answers are the model's own words."""
    records: list[dict[str, Any]] = []
    for number, (path, _) in enumerate(write_samples(12, 0, home)):
        people = ["small no"] * 4 + ["brown left small"] * 4 + [f"answer {number}"] * 2
        records.append({"image": str(path), "question": "What is in the picture?", "answers": people})
        records.append({"image": str(path), "question": "What colour?" if number % 2 else " ", "answers": people})
    manifest = home / "data.jsonl"
    manifest.write_text("\n".join(map(json.dumps, records)))
    return manifest


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> StudyResult:
    home = tmp_path_factory.mktemp("asked")
    file = home / "asked.yaml"
    file.write_text(STUDY.replace("DATA", str(write_records(home))))
    return run_study(file, results=home / "results")


def results_of(study: StudyResult) -> Path:
    return study.directory.parent.parent


def times(study: StudyResult) -> dict[str, int]:
    """When each file of replies was written."""
    return {path.name: path.stat().st_mtime_ns for path in (study.directory / "fidelity").glob("*-*.json")}


def test_every_form_has_a_row_beside_x_itself(asked: StudyResult) -> None:
    fidelity = asked.fidelity
    assert fidelity is not None and fidelity.rows
    assert fidelity == read_fidelity(asked.directory)
    rows = {(row.method, row.rank, row.form): row for row in fidelity.rows}
    itself = rows["x", 0, "float16"]
    assert (itself.kl_mean, itself.first_token_flips, itself.answer_flips, itself.loglik_delta_mean) == (0, 0, 0, 0)
    compared = {(row.method, row.rank, "factors") for row in asked.comparison.rows}
    assert compared <= rows.keys()
    assert {("x", 0, "int8"), ("svd", 1, "int8"), ("sketch", 4, "int8"), ("half-side", 0, "jpeg")} <= rows.keys()
    assert not any(row.form == "int4" or row.form.startswith("coded") for row in fidelity.rows)
    # At the features' own rank nothing is left out.
    whole, little = rows["svd", 4, "factors"], rows["svd", 1, "factors"]
    assert whole.kl_mean < 1e-6
    assert whole.answer_flips == 0
    assert little.kl_mean > 1e-3
    assert {row.n_images for row in fidelity.rows} == {2}
    assert all(row.bytes_per_image > 0 for row in fidelity.rows)
    assert all(row.accuracy is not None and row.anls is not None for row in fidelity.rows)
    assert little.accuracy_minus_x == pytest.approx((little.accuracy or 0) - (itself.accuracy or 0))
    assert len(json.loads((asked.directory / "fidelity.json").read_text())) == len(fidelity.rows)


def test_what_was_left_out_or_cut_is_told(asked: StudyResult) -> None:
    assert asked.fidelity is not None
    told = "\n".join(asked.fidelity.remarks)
    assert "of the images' records have no question and are left out" in told
    assert "answers are longer than max_new_tokens, 3, and are cut" in told
    assert "those that the model makes of the pixels" in told
    assert "random weights" in told
    assert any("svd" in sentence for sentence in asked.fidelity.words)
    assert all((asked.directory / example.picture).is_file() for example in asked.fidelity.examples)
    assert "What the model still sees" in (asked.directory / "report.html").read_text()


def test_mlflow_has_the_flips_by_rank_and_the_files(asked: StudyResult) -> None:
    client = MlflowClient(f"sqlite:///{results_of(asked) / 'mlflow.db'}")
    (parent,) = client.search_runs(
        ["1"], f"tags.`lowrank.study_id` = '{asked.study_id}' and tags.`lowrank.kind` = 'study'"
    )
    history = client.get_metric_history(parent.info.run_id, "fidelity.svd.flips")
    assert asked.fidelity is not None
    flips = {row.rank: row.answer_flips for row in asked.fidelity.rows if (row.method, row.form) == ("svd", "factors")}
    assert {point.step: point.value for point in history} == flips
    names = {artifact.path for artifact in client.list_artifacts(parent.info.run_id)}
    assert {"fidelity.json", "fidelity_notes.json"} <= names


def test_killed_and_widened_nothing_is_asked_twice(
    asked: StudyResult, tmp_path: Path, typed: Typed, no_report: None
) -> None:
    before = times(asked)
    words = ["fidelity", asked.study_id, "--results", str(results_of(asked)), "--images", "5"]
    address = ray.get_runtime_context().gcs_address
    with (tmp_path / "told").open("w+") as told:
        driver = subprocess.Popen(
            [sys.executable, "-m", "lowrank_tune", *words, "--address", address],
            stdout=told, stderr=told, env=os.environ | {"PYTHONPATH": ":".join(sys.path)},
        )  # fmt: skip
    try:
        deadline, workers = time.monotonic() + 300, list[psutil.Process]()
        while not times(asked).keys() - before.keys():
            assert driver.poll() is None and time.monotonic() < deadline, (tmp_path / "told").read_text()
            workers = askers() or workers  # those of an earlier question may still be ending
            time.sleep(0.01)
        # Ray starts a worker that is lost again, and its item with it.
        workers[0].send_signal(signal.SIGKILL)
        some = len(times(asked))
        while len(times(asked)) == some:
            assert driver.poll() is None and time.monotonic() < deadline, (tmp_path / "told").read_text()
            time.sleep(0.01)
    finally:
        driver.kill()
        driver.wait()
    killed = times(asked)
    code, out, err = typed(*words, "--json")
    assert code == 0, err
    after = times(asked)
    assert {name: after[name] for name in before} == before
    replies = [len(json.loads(path.read_text())["replies"]) for path in (asked.directory / "fidelity").glob("*-*.json")]
    assert set(replies) == {len(asked.fidelity.rows if asked.fidelity else ())}
    found = json.loads(out)
    assert {row["n_images"] for row in found["rows"]} == {5}
    assert len(killed) < len(after)
    assert typed(*words)[0] == 0
    assert times(asked) == after


def askers() -> list[psutil.Process]:
    """The processes of the pool that asks."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "Asker" in " ".join(process.cmdline()[:1]):
                found.append(process)
    return found
