"""The picture itself as a way to keep features, with the tiny tower: in this process, and once on real Ray."""

import io
import json
import pickle
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from cachekit import made, snapshot
from PIL import Image

from lowrank_tune.config.plan import make_plan
from lowrank_tune.config.schema import FeaturesSpec, StudySpec
from lowrank_tune.config.source import ImageSource
from lowrank_tune.features.cache import open_cache, recover, seal
from lowrank_tune.features.decoding import decode_image, decode_shard
from lowrank_tune.features.extract import extract_features, plan_encoding
from lowrank_tune.features.folders import find_images
from lowrank_tune.features.images import hash_files, write_record_table
from lowrank_tune.features.pictures import (
    KEPT,
    MOST_IMAGES,
    WAYS,
    Way,
    fitting,
    measure_pictures,
    on_whole_grid,
    read_image,
    read_images,
)
from lowrank_tune.features.shards import Pool, plan_shards
from lowrank_tune.lowrank.data import FeatureMatrix, spread

SIZE = 112
NAMES = {f"{name}-q{quality}" for name in ("jpeg", "webp") for quality in (50, 75, 85, 90, 95)}
NAMES |= {"half-side", "quarter-side"}


def encoding(root, size=SIZE):
    encoder = {"checkpoint": "tiny-random", "image_size": size, "compute_dtype": "float32"}
    return plan_encoding(FeaturesSpec.model_validate({"source": {"samples": 4}, "encoder": encoder}), root)


@pytest.fixture
def folder(tmp_path, photographs):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(5):
        with Image.open(photographs[number]) as image:
            image.convert("RGB").save(folder / f"photo-{number}.png")
    return folder


@pytest.fixture
def job(checkpoint_root):
    return encoding(checkpoint_root)


@pytest.fixture
def features(job, folder, tmp_path):
    """A sealed cache of the folder, made by the extraction's worker in this process, in the order of the files."""
    job = replace(job, directory=str(tmp_path / Path(job.directory).name))
    records = find_images(ImageSource(images=str(folder)))
    files = hash_files(records)
    recover(Path(job.directory), job.identity)
    (plan,) = plan_shards(list(files.images), files.images)
    row = decode_shard({"plan": pickle.dumps(plan)}, SIZE, 10**9)
    assert made(job, plan, pixels=row["pixels"], decoded=row["decoded"]).error is None
    contents = seal(Path(job.directory), job.identity, "tiny-random", "random")
    table = write_record_table(Path(job.directory), records, files.keys, [None] * len(files.keys))
    rows = tuple(contents.rows[key] for key in files.images)
    return replace(open_cache(job.directory), rows=rows, records_path=str(table))


def square(path):
    return decode_image(path.read_bytes(), SIZE)


def test_bytes_are_those_of_files_that_pillow_writes_and_a_better_quality_is_nearer(job, features, folder, tmp_path):
    readings = read_images(job, Pool(1, 1), features)
    assert readings.left_out == []
    by_way = {name: [each for each in readings.found if each.method == name] for name in NAMES}
    assert {each.method for each in readings.found} == NAMES
    paths = sorted(folder.iterdir())
    for name, side, kind, quality in (
        ("jpeg-q75", SIZE, "JPEG", 75),
        ("webp-q90", SIZE, "WEBP", 90),
        ("half-side", SIZE // 2, "JPEG", 95),
        ("quarter-side", SIZE // 4, "JPEG", 95),
    ):
        for path, reading in zip(paths, by_way[name], strict=True):
            file = tmp_path / f"{name}.file"
            picture = Image.fromarray(square(path)).resize((side, side))
            picture.save(file, kind, quality=quality, optimize=True)
            assert reading.size == file.stat().st_size
    for kind in ("jpeg", "webp"):
        ways = [by_way[f"{kind}-q{quality}"] for quality in (50, 75, 85, 90, 95)]
        errors = [np.mean([each.error for each in way]) for way in ways]
        sizes = [np.mean([each.size for each in way]) for way in ways]
        assert errors == sorted(errors, reverse=True) and sizes == sorted(sizes)
    assert np.mean([each.error for each in by_way["half-side"]]) < np.mean([e.error for e in by_way["quarter-side"]])
    assert all(each.seconds > 0 and -1 <= each.cosine <= 1 for each in readings.found)


def test_an_error_is_that_of_the_picture_encoded_again_and_an_unchanged_picture_has_none(job, features, folder):
    encoder, (path, *_) = job.load_encoder(Pool(1, 1)), sorted(folder.iterdir())
    x_TD, lossless = FeatureMatrix(features).load([0])[0], Way("lossless", "png", 0)
    jpeg = next(way for way in WAYS if way.name == "jpeg-q50")
    found = {each.method: each for each in read_image(encoder, 0, square(path), x_TD, [lossless, jpeg], torch.float16)}
    assert found["lossless"].error < 1e-3
    decoded = np.asarray(Image.open(io.BytesIO(jpeg.keep(square(path)))))
    x, y = x_TD.double().numpy(), encoder.encode(decoded[None])[0].double().numpy()
    assert found["jpeg-q50"].error == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-2)
    cosines = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    assert found["jpeg-q50"].cosine == pytest.approx(cosines.mean(), abs=1e-3)


def test_fewer_tokens_are_brought_to_the_whole_grid_between_their_neighbours():
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    small_NtD = torch.stack([rows, columns, torch.full((4, 4), 7.0)], dim=-1).reshape(1, 16, 3)
    whole_NTD = on_whole_grid(small_NtD, 64)
    assert whole_NTD.shape == (1, 64, 3)
    centres = ((torch.arange(8) + 0.5) / 2 - 0.5).clamp(0, 3)
    grid = whole_NTD.reshape(8, 8, 3)
    torch.testing.assert_close(grid[..., 0], centres[:, None].expand(8, 8))
    torch.testing.assert_close(grid[..., 1], centres[None, :].expand(8, 8))
    assert (grid[..., 2] == 7).all()
    one = on_whole_grid(torch.ones(2, 1, 5), 16)
    assert one.shape == (2, 16, 5) and (one == 1).all()


@pytest.mark.parametrize(("size", "smaller"), [(112, {"half-side", "quarter-side"}), (56, {"half-side"}), (84, set())])
def test_a_side_that_whole_tokens_do_not_fill_is_left_out(checkpoint_root, size, smaller):
    assert {way.name for way in fitting(encoding(checkpoint_root, size))} - smaller == NAMES - {
        "half-side",
        "quarter-side",
    }


def test_vanished_changed_and_broken_files_are_left_out_one_by_one(job, features, folder):
    gone, changed, broken, *sound = sorted(folder.iterdir())
    gone.unlink()
    changed.write_bytes(changed.read_bytes() + b"\0")
    broken.write_text("Dear reader,")
    readings = read_images(job, Pool(1, 1), features)
    assert len(readings.left_out) == 3
    for path, said in ((gone, "No such file"), (changed, "has changed since"), (broken, "has changed since")):
        assert any(str(path) in reason and said in reason for reason in readings.left_out)
    assert {each.image for each in readings.found} == {3, 4} and len(sound) == 2


def test_a_slow_encoder_ends_after_the_time_but_not_before_the_first_image(job, features):
    readings = read_images(job, Pool(1, 1), features, most_s=0.0)
    assert {each.image for each in readings.found} == {0} and readings.left_out == []


def test_images_are_chosen_from_as_many_groups_as_there_are_by_the_seed():
    groups = [f"scene-{number % 5}" for number in range(50)]
    chosen = spread(groups, MOST_IMAGES, 3)
    assert len(chosen) == len(set(chosen)) == MOST_IMAGES
    assert len({groups[place] for place in chosen[:5]}) == 5
    assert chosen == spread(groups, MOST_IMAGES, 3) != spread(groups, MOST_IMAGES, 4)
    assert sorted(spread(["a", "b", "a"], MOST_IMAGES, 0)) == [0, 1, 2]


def study(source, tmp_path, **encoder):
    spec = StudySpec.model_validate(
        {
            "name": "small",
            "features": {"source": source, **encoder},
            "split": {"validation": 2, "test": 4},
            "search": {"space": {"rank": 2, "families": {"sketch": None}}},
        }
    )
    plan = make_plan(spec, tmp_path, datetime.now(UTC))
    plan.study_dir.mkdir(parents=True)
    return plan


def test_of_ready_tensors_there_are_no_pictures_and_a_sentence_says_so(tmp_path, features):
    pictures = measure_pictures(study({"tensors": str(tmp_path)}, tmp_path), features, (0, 1))
    assert pictures.rows == () and pictures.images == ()
    (said,) = pictures.remarks
    assert "ready tensors" in said


def test_on_ray_they_are_measured_once_and_nothing_but_figures_is_kept(ray_cluster, tmp_path, monkeypatch):
    encoder = {"checkpoint": "tiny-random", "image_size": 56, "compute_dtype": "float32"}
    plan = study({"samples": 12}, tmp_path, encoder=encoder)
    features = extract_features(plan.spec.features, plan.features_root, seed=0)
    with monkeypatch.context() as patch:
        patch.setattr("lowrank_tune.features.pictures.ray.is_initialized", lambda: False)
        (said,) = measure_pictures(plan, features, (1, 4, 7, 8)).remarks
    assert f"resume {plan.study_id}" in said
    (gone,) = (plan.features_root / "samples" / "seed-0").glob("0004-*")
    gone.unlink()
    before, told = snapshot(plan.features_root), []
    pictures = measure_pictures(plan, features, (1, 4, 7, 8), told.append)
    assert len(told) == 1
    assert snapshot(plan.features_root) == before
    assert pictures.images == (0, 2, 3)
    assert {row.method for row in pictures.rows} == NAMES - {"quarter-side"}
    for row in pictures.rows:
        assert (row.rank, row.target, row.n_images) == (0, "", 3)
        assert row.dtype == ("webp" if row.method.startswith("webp") else "jpeg")
        assert row.bytes_per_image == np.mean(pictures.sizes[row.method])
        assert row.relative_error_max == max(pictures.errors[row.method]) > 0
        assert row.images_per_second > 0
    assert "3 of 4 test images" in pictures.remarks[0]
    assert any("quarter-side is left out" in remark for remark in pictures.remarks)
    assert any(gone.name in remark for remark in pictures.remarks)

    for path in (plan.features_root / "samples").rglob("*.png"):
        path.unlink()
    assert measure_pictures(plan, features, (1, 4, 7, 8)) == pictures, "kept though the images are gone"
    kept = json.loads((plan.study_dir / KEPT).read_text())
    assert kept["pictures"]["images"] == [0, 2, 3]
    (plan.study_dir / KEPT).write_text("{")
    nothing = measure_pictures(plan, features, (1, 4, 7, 8))
    assert nothing.rows == () and "and 3 more" in nothing.remarks[-1]
