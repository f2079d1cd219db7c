import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lowrank_tune.errors import InputError
from lowrank_tune.features import sources
from lowrank_tune.features.sources import write_samples


def digests(crops):
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path, _ in crops]


def test_ninety_six_crops_are_distinct_photographs_of_useful_size(tmp_path):
    crops = write_samples(96, 0, tmp_path)
    assert len(set(digests(crops))) == 96
    for path, origin in crops:
        with Image.open(path) as image:
            assert image.size == (origin["size"], origin["size"])
            assert min(image.size) >= 150
            assert np.asarray(image.convert("L")).std() > 5


def test_crops_come_from_many_photographs_and_match_their_origin(tmp_path):
    crops = write_samples(40, 0, tmp_path)
    assert len({origin["photograph"] for _, origin in crops}) == 20
    path, origin = next(crop for crop in crops if crop[1]["photograph"] == "coffee")
    with Image.open(next(p for p in sources._photograph_paths() if p.stem == "coffee")) as coffee:
        left, top, size = origin["left"], origin["top"], origin["size"]
        expected = np.asarray(coffee.crop((left, top, left + size, top + size)))
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image), expected)


def test_a_seed_fixes_the_bytes_and_another_changes_them(tmp_path):
    first = digests(write_samples(8, 3, tmp_path / "a"))
    assert digests(write_samples(8, 3, tmp_path / "b")) == first
    assert not set(digests(write_samples(8, 4, tmp_path / "b"))) & set(first)


def test_fewer_crops_are_the_first_of_more(tmp_path):
    few = write_samples(5, 0, tmp_path / "few")
    more = write_samples(9, 0, tmp_path / "more")
    assert digests(few) == digests(more)[:5]


def test_a_lost_crop_is_written_again_with_the_same_bytes(tmp_path):
    crops = write_samples(6, 0, tmp_path)
    before = digests(crops)
    crops[2][0].unlink()
    assert digests(write_samples(6, 0, tmp_path)) == before


def test_missing_photographs_name_the_package_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_PHOTOGRAPHS", {"no_such_package": ("data/x.png",)})
    monkeypatch.setattr(sources, "_DISTRIBUTIONS", {"no_such_package": "scikit-nothing"})
    with pytest.raises(InputError, match="pip install scikit-nothing"):
        write_samples(3, 0, Path(tmp_path))
