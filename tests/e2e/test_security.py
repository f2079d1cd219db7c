"""What a study file, an id or an address could do, and does not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank_tune.cli import run
from lowrank_tune.cluster.study_dir import find_study
from lowrank_tune.config.loading import parse_study
from lowrank_tune.errors import InputError, StudyFileError, TrackingError
from lowrank_tune.features.remote import find_cache
from lowrank_tune.study import plan_study
from lowrank_tune.tracking.tracker import Tracker
from tests.conftest import Typed

STUDY = """\
name: {name}
features: {{source: {{samples: 8}}, encoder: {{checkpoint: tiny-random, image_size: 56, compute_dtype: float32}}}}
split: {{validation: 2, test: 2}}
search: {{method: grid, space: {{rank: 2, families: {{sketch: }}}}}}
"""
ESCAPES = ["../../x", "/etc/x", "a/b", "a\\b", "..", ".", "", "x" * 5000, "a\0b", "a\nb", "~", "*", "CON:", "-rf"]


@pytest.mark.parametrize("name", ESCAPES)
def test_a_name_that_could_leave_the_results_directory_is_refused(name: str) -> None:
    with pytest.raises(StudyFileError, match="name"):
        parse_study(STUDY.format(name=json.dumps(name)), "study.yaml")


@pytest.mark.parametrize("name", ESCAPES)
def test_no_id_leads_out_of_the_results_directory(tmp_path: Path, name: str) -> None:
    outside = tmp_path / "x"
    for folder in (outside, tmp_path / "results" / "studies" / "inside-00000000"):
        folder.mkdir(parents=True)
        (folder / "plan.json").write_text("{}")
    (tmp_path / "results" / "features" / "0123" / "shards").mkdir(parents=True)
    with pytest.raises(InputError):
        find_study(tmp_path / "results", name)
    with pytest.raises(InputError):
        find_cache(tmp_path / "results", name)
    assert run(["reconcile", "--results", str(tmp_path / "results"), "--", name]) == 2


def test_a_ray_that_does_not_answer_is_told_at_once_without_its_password(tmp_path: Path) -> None:
    # In a process of its own: one that has a Ray already stays in it.
    study = tmp_path / "x.yaml"
    study.write_text(STUDY.format(name="x"))
    command = [sys.executable, "-m", "lowrank_tune", "run", str(study), "--results", str(tmp_path / "results")]
    command += ["--address", "ray://someone:s3cret@127.0.0.1:9"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "127.0.0.1" in done.stderr
    assert not [word for word in ("s3cret", "Traceback") if word in done.stderr + done.stdout]
    assert not (tmp_path / "results").exists()


def test_no_address_shows_its_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: Typed) -> None:
    address = "http://someone:s3cret@127.0.0.1:9/?token=s3cret"
    spec = parse_study(STUDY.format(name="x"), "study.yaml")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(TrackingError, match=r"127\.0\.0\.1") as tracking:
        Tracker(plan_study(spec, tmp_path))
    with pytest.raises(InputError, match=r"127\.0\.0\.1") as results:
        plan_study(spec, address)
    (tmp_path / "x.yaml").write_text(STUDY.format(name="x"))
    said = [str(tracking.value), str(results.value)]
    for key in ("uri", "urri"):
        code, *printed = typed("run", tmp_path / "x.yaml", "--results", tmp_path, "--set", f"tracking.{key}={address}")
        assert code == 2
        said += printed
    assert "MLFLOW_TRACKING_PASSWORD" in " ".join(said)
    assert "s3cret" not in " ".join(said)
