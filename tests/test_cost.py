"""What `plan` counts, tries and reckons and `doctor` finds; no Ray is started."""

import hashlib
import pickle
from datetime import UTC, datetime
from pathlib import Path

import joblib
import pytest
import torch

from lowrank_tune.config.plan import make_plan
from lowrank_tune.config.schema import EncoderSpec, FeaturesSpec, StudySpec
from lowrank_tune.cost import calibrate, diagnose, expected_share, preview_study, survey_features
from lowrank_tune.features.cache import recover, seal
from lowrank_tune.features.commits import commit_shard
from lowrank_tune.features.extract import plan_extraction
from lowrank_tune.features.images import hash_files
from lowrank_tune.features.shards import Pool, ShardPlan, ShardWorker
from lowrank_tune.features.sources import read_records, write_samples
from lowrank_tune.records import Split

SPLIT = Split(tuple(range(64)), tuple(range(64, 72)), tuple(range(72, 80)))


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def study_of(source, **resources):
    return StudySpec.model_validate(
        {
            "name": "test",
            "features": {"source": source, "max_quarantined": 0.2},
            "search": {"space": {"rank": 2, "batch_size": 16, "families": {"direct": {}}}},
            "split": {"validation": 2, "test": 2},
            "resources": resources,
        }
    )


@pytest.fixture
def study(tmp_path):
    """Nine tensors, the second of them broken."""
    folder = tmp_path / "tensors"
    folder.mkdir()
    for number in range(9):
        torch.save(torch.full((3, 5), float(number)), folder / f"features_{number}.pt")
    (folder / "features_1.pt").write_bytes(b"broken")
    return study_of({"tensors": str(folder)})


def commit(extraction, images):
    keys = tuple(hashlib.sha256(Path(image).read_bytes()).hexdigest() for image in images)
    plan = ShardPlan(f"{keys[0][:16]}.safetensors", keys, images)
    (result,) = ShardWorker(extraction, Pool(1, 1))({"plan": [pickle.dumps(plan)]})["result"]
    assert pickle.loads(result).error is None


def test_what_an_extraction_that_was_cut_short_left_counts_as_cached(study, tmp_path):
    root, spec = tmp_path / "features", study.features
    records = read_records(spec.source, root, 0)
    extraction = plan_extraction(spec, root, records)
    directory = Path(extraction.directory)
    counts = [survey_features(spec, root, 0)]
    recover(directory, extraction.identity)
    commit(extraction, records.images[:3])
    counts.append(survey_features(spec, root, 0))
    seal(directory, extraction.identity, extraction.encoder, extraction.weights)
    commit(extraction, records.images[3:5])
    counts.append(survey_features(spec, root, 0))
    commit(extraction, records.images[5:])
    next(
        (directory / "shards").glob(f"{hashlib.sha256(Path(records.images[5]).read_bytes()).hexdigest()[:16]}*")
    ).unlink()
    (directory / "commits" / "damaged.json").write_text("{")
    counts.append(survey_features(spec, root, 0))
    assert [(count["images"], count["images_cached"], count["images_quarantined"]) for count in counts] == [
        (9, 0, 0), (9, 2, 1), (9, 4, 1), (9, 4, 1),
    ]  # fmt: skip


def test_a_preview_tells_counts_sizes_and_times_and_leaves_nothing_running(study, tmp_path):
    facts = preview_study(study, tmp_path)
    assert (facts["images"], facts["images_to_extract"], facts["features_shape"]) == (9, 9, [3, 5])
    assert facts["cache_bytes"] == 9 * 3 * 5 * 2
    assert 0 < facts["trial_seconds"] < facts["seconds"] <= facts["seconds_at_most"]
    assert facts["hours"] == round(facts["seconds"] / 3600, 3)


def test_what_of_a_source_was_left_out_is_told(tmp_path):
    write_samples(9, 0, tmp_path / "photos")
    for name in ("a.txt", "b.txt", "c.mp4"):
        (tmp_path / "photos" / name).write_text("")
    study = study_of({"images": str(tmp_path / "photos")})
    study = study.model_copy(
        update={"features": study.features.model_copy(update={"encoder": EncoderSpec(checkpoint="tiny-random")})}
    )
    assert preview_study(study, tmp_path / "results")["notes"] == ("left out: 2 .txt, 1 .mp4",)
    checks = {check.name: check for check in diagnose(study, tmp_path / "results")}
    assert checks["features"].finding.endswith("; left out: 2 .txt, 1 .mp4")


def test_an_image_that_had_too_many_pixels_is_tried_again_when_the_limit_is_raised(tmp_path):
    write_samples(9, 0, tmp_path / "photos")
    source = {"images": str(tmp_path / "photos")}
    fields = {"source": source, "encoder": {"checkpoint": "tiny-random"}, "max_quarantined": 0.2}
    low, high = (FeaturesSpec.model_validate(fields | {"max_pixels": limit}) for limit in (99, 100))
    records = read_records(low.source, tmp_path, 0)
    extraction = plan_extraction(low, tmp_path, records)
    directory, (key, *_) = Path(extraction.directory), hash_files(records).keys
    recover(directory, extraction.identity)
    commit_shard(directory, "first.safetensors", [], {}, [(key, "100 pixels are above features.max_pixels = 99; …")])
    seal(directory, extraction.identity, "", "")
    counts = [survey_features(spec, tmp_path, 0) for spec in (low, high)]
    assert [(count["images_quarantined"], count["images_to_extract"]) for count in counts] == [(1, 8), (0, 9)]
    row = torch.zeros(counts[0]["features_shape"], dtype=torch.float16)
    commit_shard(directory, "again.safetensors", [key], {"features": [row]}, [])
    assert survey_features(low, tmp_path, 0)["images_cached"] == 1
    assert seal(directory, extraction.identity, "", "").quarantined == {}


@pytest.mark.parametrize(("most", "passed"), [(0.2, True), (0.1, False)])
def test_a_broken_image_is_told_beside_the_sound_ones_and_fails_where_an_extraction_would(
    study, tmp_path, most, passed
):
    features = study.features.model_copy(update={"max_quarantined": most})
    *_, encoder = diagnose(study.model_copy(update={"features": features}), tmp_path)
    assert (encoder.name, encoder.passed) == ("encoder", passed)
    assert f"{tmp_path}/tensors/features_1.pt: no file of torch, NumPy or safetensors" in encoder.finding
    assert "max_quarantined" in encoder.finding and f"{most}" in encoder.finding
    assert ("features_0.pt [3, 5] in [0, 0]" in encoder.finding) == passed
    assert ("features_2.pt [3, 5] in [2, 2]" in encoder.finding) == passed


def test_doctor_looks_behind_broken_images_for_sound_ones(study, tmp_path):
    for number in (0, 2, 3):
        (tmp_path / "tensors" / f"features_{number}.pt").write_bytes(b"broken %d" % number)
    features = study.features.model_copy(update={"max_quarantined": 0.5})
    *_, encoder = diagnose(study.model_copy(update={"features": features}), tmp_path)
    assert encoder.passed
    assert "features_6.pt [3, 5]" in encoder.finding and "features_7.pt" not in encoder.finding


def test_doctor_goes_on_after_a_check_that_broke(study, tmp_path, monkeypatch):
    def broken():
        raise RuntimeError("the driver is older than the library")

    monkeypatch.setattr("torch.cuda.device_count", broken)
    checks = diagnose(study, tmp_path)
    assert [check.name for check in checks if not check.passed] == ["device"]
    assert checks[1].finding == "RuntimeError: the driver is older than the library"


def test_doctor_tells_what_is_left_and_stops_where_the_results_cannot_be_written(study, tmp_path):
    (tmp_path / "tensors" / "features_1.pt").unlink()
    checks = {check.name: check for check in diagnose(study, tmp_path)}
    assert all(check.passed for check in checks.values())
    assert list(checks) == ["python", "device", "results", "tracking", "features", "encoder"]
    assert "8 records, 0 unreadable, 8 distinct images, 0 cached" in checks["features"].finding
    assert "8 images are left to extract: about 0:00:01 with one such worker" in checks["encoder"].finding
    (tmp_path / "in the way").write_text("")
    assert [check.passed for check in diagnose(study, tmp_path / "in the way")] == [True, True, False]


def test_workers_take_places_from_trials_and_each_holds_its_share_of_a_batch(tmp_path):
    share = joblib.cpu_count() / 8

    def reckon(**resources):
        plan = make_plan(study_of({"samples": 80}, **resources), tmp_path, datetime(2026, 1, 1, tzinfo=UTC))
        return calibrate(plan, 32, 64, SPLIT, extraction_seconds=0.0)

    one, four = reckon(cpus_per_trial=share), reckon(cpus_per_trial=share, workers_per_trial=4)
    assert (one["trials_at_once"], four["trials_at_once"]) == (8, 2)
    assert one["memory_bytes_per_trial"] - four["memory_bytes_per_trial"] == 4 * 4 * (16 - 4) * 32 * 64
    assert four["epochs_expected"] == one["epochs_expected"]


def test_asynchronous_halving_is_expected_to_leave_half_of_what_it_could_save():
    asha = study_of({"samples": 80}).scheduler.model_copy(
        update={"kind": "asha", "grace_epochs": 2, "reduction_factor": 2}
    )
    assert expected_share(asha, 8) == ((2 + 2 / 2 + 4 / 4) / 8 + 1) / 2
    assert expected_share(asha.model_copy(update={"kind": "none"}), 8) == 1.0
