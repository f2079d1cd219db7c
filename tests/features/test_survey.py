"""What `plan` and `doctor` count and try, on ready tensors; no Ray is started."""

import hashlib
from io import BytesIO
from pathlib import Path

import pytest
import torch

from lowrank_tune.config.schema import FeaturesSpec, StudySpec
from lowrank_tune.cost import _describe_images, survey_features, try_images
from lowrank_tune.errors import InputError
from lowrank_tune.features.cache import ShardPlan, ShardResult, UnusableError, recover, seal
from lowrank_tune.features.extract import extract_features, import_shard, plan_extraction
from lowrank_tune.features.sources import load_tensor, read_records


@pytest.fixture
def spec(tmp_path: Path) -> FeaturesSpec:
    """Nine tensors, the second of them broken."""
    folder = tmp_path / "tensors"
    folder.mkdir()
    for number in range(9):
        torch.save(torch.full((3, 5), float(number)), folder / f"features_{number}.pt")
    (folder / "features_1.pt").write_bytes(b"broken")
    return FeaturesSpec.model_validate({"source": {"tensors": str(folder)}, "max_quarantined": 0.2})


def commit(extraction, paths):
    keys = tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)
    plan = ShardPlan(f"{keys[0][:16]}.safetensors", keys, tuple(map(str, paths)))
    assert not ShardResult.load(import_shard({"plan": plan.dump()}, extraction)["result"]).failure


def test_what_an_extraction_that_was_cut_short_left_counts_as_cached(spec, tmp_path):
    root = tmp_path / "features"
    records = read_records(spec.source, root, 0)
    extraction = plan_extraction(spec, root, records)
    directory = Path(extraction.directory)
    counts = [survey_features(spec, root, 0)]
    recover(directory, extraction.identity)
    commit(extraction, records.paths[:3])
    counts.append(survey_features(spec, root, 0))
    seal(directory, extraction.identity, extraction.encoder, extraction.weights)
    commit(extraction, records.paths[3:5])
    counts.append(survey_features(spec, root, 0))
    commit(extraction, records.paths[5:])
    next((directory / "shards").glob(f"{hashlib.sha256(records.paths[5].read_bytes()).hexdigest()[:16]}*")).unlink()
    (directory / "commits" / "damaged.json").write_text("{")
    counts.append(survey_features(spec, root, 0))
    assert [(count.images, count.cached, count.quarantined) for count in counts] == [
        (9, 0, 0), (9, 2, 1), (9, 4, 1), (9, 4, 1),
    ]  # fmt: skip


def test_a_broken_image_is_told_beside_the_sound_ones(spec, tmp_path):
    study = StudySpec.model_validate(
        {
            "name": "x",
            "features": spec.model_dump(include={"source"}),
            "search": {"space": {"families": {"sketch": {}}, "rank": 2}},
        }
    )
    with pytest.raises(InputError, match=r"features_0.pt \[3, 5\] in \[0, 0\].*features_1.pt: not a readable .pt file"):
        _describe_images(study, tmp_path / "features", [])
    assert [bool(image.error) for image in try_images(spec, tmp_path / "features", 0, 3, "cpu").images] == [0, 1, 0]


@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_a_sparse_tensor_is_refused_with_the_remedy(tmp_path):
    file = BytesIO()
    torch.save(torch.eye(3).to_sparse(), file)
    with pytest.raises(UnusableError, match=r"holds a sparse or nested tensor, .*save it again as \[tokens, dim\]"):
        load_tensor(file.getvalue())


def test_a_results_directory_that_is_a_file_is_named_as_the_caches_place(spec, tmp_path):
    (tmp_path / "results").write_text("in the way")
    root = tmp_path / "results" / "features"
    with pytest.raises(InputError, match=rf"{root}: cannot hold the feature cache \(.*Not a directory"):
        extract_features(spec, root, seed=0)


def test_a_source_that_cannot_be_read_is_not_blamed_on_the_cache(tmp_path):
    name = str(tmp_path / ("x" * 300))
    spec = FeaturesSpec.model_validate({"source": {"tensors": name}})
    with pytest.raises(InputError, match=r"x{300}: cannot be read \(File name too long\)"):
        extract_features(spec, tmp_path / "features", seed=0)
