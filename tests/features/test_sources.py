import hashlib
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from lowrank_tune.config.schema import FeaturesSpec
from lowrank_tune.config.source import ManifestSource, SampleSource
from lowrank_tune.errors import CacheError, InputError
from lowrank_tune.features import sources
from lowrank_tune.features.extract import extract_features
from lowrank_tune.features.groups import image_groups, listed_groups
from lowrank_tune.features.images import SourceFiles, SourceRecords, write_record_table
from lowrank_tune.features.sources import read_records
from lowrank_tune.records import FeatureRow, FeatureSet


def spec_of(source):
    return FeaturesSpec.model_validate({"source": source})


def records_of(source, root=Path("unused"), seed=0):
    return read_records(spec_of(source).source, root, seed)


def test_no_column_is_lost_to_another_of_its_name(tmp_path):
    (tmp_path / "sources").mkdir()
    columns = pa.table([[1], [2], [3]], names=["key", "source_key", "key"])
    table = write_record_table(tmp_path, SourceRecords((None,), columns), [None], ["no file"])
    found = pyarrow.parquet.read_table(table).to_pylist()[0]
    assert found["key"] is None
    assert [value for name, value in found.items() if name.startswith("source_")] == [1, 2, 3]


def digests(records):
    return [hashlib.sha256(Path(image).read_bytes()).hexdigest() for image in records.images]


def test_images_that_share_a_record_value_belong_together_and_one_without_stands_alone(tmp_path):
    manifest = tmp_path / "data.csv"
    manifest.write_text("image,scene,key\na.png,kitchen,1\nb.png,kitchen,2\nc.png,,3\nd.png,yard,4\na.png,yard,5\n")
    source = ManifestSource(manifest=str(manifest))
    # Four images are named, one of them twice: a split is planned of images, not of records.
    assert listed_groups(source, "scene") == ["kitchen", "kitchen", str(tmp_path / "c.png"), "kitchen"]
    assert len(set(listed_groups(source, None))) == 4
    with pytest.raises(InputError, match=r"the records have no column 'scenes', .*did you mean scene\?"):
        listed_groups(source, "scenes")
    records = read_records(source, tmp_path, 0)
    keys = ["a", "b", None, "d", "a"]
    table = write_record_table(tmp_path, records, keys, [None] * 5)
    rows = tuple(FeatureRow(key, "", 0) for key in ("a", "b", "c", "d"))
    features = FeatureSet("", "", "", "", "float32", 1, 1, rows, str(table))
    # The record without a scene is of an image that was not usable; a.png joins kitchen and yard.
    assert image_groups(features, "scene") == ["kitchen", "kitchen", "c", "kitchen"]
    assert image_groups(features, "key") == ["1", "2", "c", "4"], "the user's own column of that name"
    assert image_groups(features, None) == ["a", "b", "c", "d"]
    with pytest.raises(CacheError, match="groups cannot be read"):
        image_groups(features, "nothing")


def test_samples_belong_to_their_photographs(tmp_path):
    records = records_of({"samples": 45}, tmp_path)
    assert listed_groups(SampleSource(samples=45), "photograph") == records.columns["photograph"].to_pylist()


def test_samples_are_distinct_useful_crops_of_many_photographs(tmp_path):
    records = records_of({"samples": 40}, tmp_path)
    assert len(set(digests(records))) == 40
    cuts = records.columns.to_pylist()
    assert len({cut["photograph"] for cut in cuts}) == 20
    for path, cut in zip(map(Path, records.images), cuts, strict=True):
        with Image.open(path) as image:
            assert image.size == (cut["size"], cut["size"])
            assert cut["size"] >= 150
            assert np.asarray(image.convert("L")).std() > 5
    path, cut = next(crop for crop in zip(records.images, cuts, strict=True) if crop[1]["photograph"] == "coffee")
    with Image.open(next(path for path in sources.photograph_paths() if path.stem == "coffee")) as coffee:
        expected = coffee.crop((cut["left"], cut["top"], cut["left"] + cut["size"], cut["top"] + cut["size"]))
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


def test_a_seed_fixes_the_samples_and_fewer_are_the_first_of_more(tmp_path):
    first = records_of({"samples": 8}, tmp_path / "a", seed=3)
    before = digests(first)
    assert digests(records_of({"samples": 5}, tmp_path / "b", seed=3)) == before[:5]
    assert not set(digests(records_of({"samples": 8}, tmp_path / "b", seed=4))) & set(before)
    Path(first.images[2]).unlink()
    assert digests(records_of({"samples": 8}, tmp_path / "a", seed=3)) == before, "a lost one is written again"


def test_missing_photographs_name_the_package_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PHOTOGRAPHS", {"scikit-nothing": ("no_such_package/data", "x.png")})
    with pytest.raises(InputError, match="pip install scikit-nothing"):
        records_of({"samples": 3}, tmp_path)


def test_what_cannot_be_read_or_written_is_named_for_what_it_is(tmp_path):
    torch.save(torch.ones(3, 5), tmp_path / "features_0.pt")
    (tmp_path / "results").write_text("in the way")
    root = tmp_path / "results" / "features"
    with pytest.raises(InputError, match=rf"{root}: cannot hold the feature cache \(.*Not a directory"):
        extract_features(spec_of({"tensors": str(tmp_path)}), root, seed=0)
    with pytest.raises(InputError, match=r"x{300}: no such directory or file"):
        extract_features(spec_of({"tensors": str(tmp_path / ("x" * 300))}), tmp_path / "features", seed=0)


@pytest.mark.parametrize(
    ("broken", "total", "limit", "told"),
    [
        (2, 8, 0.25, None),
        (2, 9, 0.2, "S: 2 of 9 files cannot be used, O = 0.2 allows 1:\n  /0: E\n  /1: E\nCorrect"),
        (7, 8, 0.5, "S: 7 of 8 .* O = 0.5 allows 4:(\n  /[01234]: E){5}\n  and 2 more\nCorrect"),
        (2, 2, 1, "S: 2 of 2 .* O = 1 allows 2:"),
        (0, 0, 1, "S: 0 of 0"),
    ],
)
def test_more_than_the_limit_or_none_that_is_sound_is_refused(broken, total, limit, told):
    keys = tuple(str(number) for number in range(total))
    files = SourceFiles(keys, (None,) * total, tuple(f"/{key}" for key in keys), {})
    with pytest.raises(InputError, match=told) if told else nullcontext():
        files.check(dict.fromkeys(keys[:broken], "E"), limit, "S", "O")
