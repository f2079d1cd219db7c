"""The spatial pictures, and the page of them by itself."""

import base64
import json
from dataclasses import replace

import numpy as np
import pytest

from lowrank_tune.errors import InputError
from lowrank_tune.lowrank.data import FeatureMatrix
from lowrank_tune.report.places import Scene, spatial_section, write_places


def scene(study):
    return Scene(study.features, study.split, study.outcomes, study.comparison)


def test_spatial_pictures_at_a_rank_that_no_trial_had_show_the_svd(study):
    section = spatial_section(scene(study), study.directory / "plots", images=[1, 1], channels=3, rank=7)
    (picture,) = section.pictures
    assert picture.path.name == "spatial-001-r007.png"
    assert "svd" in picture.alt and "sketch" not in picture.alt
    assert any("12 tokens are no square number" in note for note in section.notes)


@pytest.mark.parametrize("rank", [0, 13])
def test_spatial_pictures_at_an_impossible_rank_are_an_input_error(study, rank):
    with pytest.raises(InputError, match=f"rank {rank}: these features have ranks 1 to 12"):
        spatial_section(scene(study), study.directory, images=[0], channels=1, rank=rank)


def test_the_page_of_places_holds_every_image_rank_and_channel(study):
    *pictures, page = write_places(scene(study), study.directory, images=[0, 3], channels=[4, 1], rank=7)
    assert [path.name for path in pictures] == ["spatial-000-r007.png", "spatial-003-r007.png"]
    text = page.read_text(encoding="utf-8")
    data = json.loads(text.split('id="places-data">')[1].split("</script>")[0])
    assert (data["grid"], data["ranks"], data["channels"]) == ([3, 4], [3, 7], [4, 1])
    assert [image["image"] for image in data["images"]] == [0, 3]
    assert [[method["name"] for method in data["images"][0]["ranks"][rank]] for rank in ("3", "7")] == [
        ["svd", "sketch"], ["svd"]
    ]  # fmt: skip
    original = np.frombuffer(base64.b64decode(data["images"][0]["original"]), "<f4").reshape(2, 3, 4)
    x_TD = FeatureMatrix(study.features).load([5])[0].numpy()
    assert original == pytest.approx(np.stack([x_TD[:, channel].reshape(3, 4) for channel in (4, 1)]))


def test_the_rank_that_is_shown_is_the_validation_images_best(study, row):
    study.comparison = replace(study.comparison, rows=(row("sketch", 3, 1.2), row("sketch", 5, 1.1, chosen=2)))
    assert scene(study).rank(None) == 3
    assert scene(study).ranks(3) == [3, 5]
