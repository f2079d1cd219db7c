"""The spatial pictures: the right numbers at the right places, boxes in every form, and the page of them by itself."""

import base64
import io
import json
import os
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from lowrank_tune.config.source import ImageSource
from lowrank_tune.errors import InputError
from lowrank_tune.features.folders import find_images
from lowrank_tune.features.images import hash_files, write_record_table
from lowrank_tune.lowrank.data import FeatureMatrix
from lowrank_tune.records import FeatureSet
from lowrank_tune.report.boxes import BoxColumn, read_boxes
from lowrank_tune.report.spatial import (
    check_images,
    check_shown,
    compare_regions,
    grid_shape,
    inside_boxes,
    photograph,
    spatial_views,
)
from lowrank_tune.report.spatial_page import Scene, spatial_figure, spatial_section, write_spatial_page
from tests.comparison.small_study import images, make_row
from tests.report.conftest import make_study


def scene(study):
    return Scene(study.features, study.split, study.outcomes, study.comparison)


def views(study, image, networks, channels, boxes=None):
    data = FeatureMatrix(study.features)
    return list(spatial_views(data, study.split, image, networks=networks, channels=channels, boxes=boxes))


@pytest.fixture
def network(study):
    return scene(study).network(3)


@pytest.fixture
def view(study, network):
    """Of two ranks, as the page has them, and channels in the order asked for."""
    other, view = views(study, 1, {7: None, 3: network}, (17, 3))
    assert (other.rank, view.rank, view.channels) == (7, 3, (17, 3))
    assert [method.method for method in other.reconstructions] == ["svd"]
    return view


@pytest.mark.parametrize(
    ("tokens", "grid"), [(256, (16, 16)), (12, (3, 4)), (576, (24, 24)), (13, (1, 13)), (1, (1, 1)), (128, (8, 16))]
)
def test_the_grid_follows_from_the_number_of_tokens(tokens, grid):
    assert grid_shape(tokens) == grid


def test_a_views_maps_are_numpys(study, view, network):
    x_TD = study.x_NTD[17].double().numpy()
    u, s, vh = np.linalg.svd(x_TD, full_matrices=False)
    svd_TD = (u[:, :3] * s[:3]) @ vh[:3]
    with torch.inference_mode():
        a_NTR, b_NRD = network(study.x_NTD[17:18])
    sketch_TD = (a_NTR @ b_NRD)[0].double().numpy()
    assert view.original_KHW == pytest.approx(np.stack([x_TD[:, k].reshape(4, 4) for k in (17, 3)]))
    assert view.norm_HW == pytest.approx(np.linalg.norm(x_TD, axis=1).reshape(4, 4))
    for shown, made_TD, method in zip(view.reconstructions, (svd_TD, sketch_TD), ("svd", "sketch"), strict=True):
        assert shown.method == method
        assert shown.maps_KHW == pytest.approx(np.stack([made_TD[:, k].reshape(4, 4) for k in (17, 3)]), abs=1e-5)
        assert shown.error_HW == pytest.approx(np.sqrt(((x_TD - made_TD) ** 2).mean(1)).reshape(4, 4), abs=1e-5)
        cosines = (x_TD * made_TD).sum(1) / (np.linalg.norm(x_TD, axis=1) * np.linalg.norm(made_TD, axis=1))
        assert shown.token_cosine == pytest.approx(cosines.mean(), abs=1e-6)


def test_a_guessed_grid_is_told_and_carries_no_boxes(tmp_path):
    study = make_study(tmp_path, images(tokens=12))
    boxes = BoxColumn({study.features.rows[17].key: ((0, 0, 20, 10),)}, None, "")
    (view,) = views(study, 1, {3: None}, [0], boxes)
    assert (view.placed, view.boxes, view.norm_HW.shape) == (False, (), (3, 4))
    section = spatial_section(scene(study), study.directory / "plots", images=[1, 1], channels=3, rank=7)
    (picture,) = section.pictures
    assert picture.path.name == "spatial-001-r007.png"
    assert "svd" in picture.alt and "sketch" not in picture.alt, "no trial had this rank"
    assert any("12 tokens are no square number" in note for note in section.notes)


def test_maps_that_are_compared_share_a_scale(view):
    figure = spatial_figure(view)
    figure.savefig(io.BytesIO(), format="png")
    (axes,) = figure.axes
    texts = [text.get_text() for text in axes.texts]
    for name in ("photograph", "token lengths", "svd: token cosine", "channel 17", "channel 3", "RMS error of a token"):
        assert name in texts
    assert f"sketch: error\ntoken cosine {view.reconstructions[1].token_cosine:.4f}" in texts
    rows = {}
    for image in axes.images:
        rows.setdefault(round(image.get_extent()[3], 3), []).append(image)
    errors, cosines, *channels = (
        [image for image in row if image.get_array().shape == (4, 4)] for row in rows.values()
    )
    highest = max(method.error_HW.max() for method in view.reconstructions)
    assert [image.get_clim() for image in errors] == [(0.0, highest)] * 2
    assert len(cosines) == 3 and cosines[1].get_clim() == cosines[2].get_clim()
    for place, row in enumerate(channels):
        shown = np.stack([np.asarray(image.get_array()) for image in row])
        assert {image.get_clim() for image in row} == {(shown.min(), shown.max())}
        assert shown[0] == pytest.approx(view.original_KHW[place])
        assert [image.get_extent()[0] for image in row] == sorted(image.get_extent()[0] for image in row)


def test_the_photograph_is_shown_where_it_is_at_hand(study, view, tmp_path):
    assert view.photograph.size == (448, 448)
    assert set(np.unique(view.photograph)) == {12 * 17}
    (without,) = views(study, 3, {3: None}, [0])
    assert without.photograph is None
    assert "photograph" not in {text.get_text() for text in spatial_figure(without).axes[0].texts}
    unrecorded = replace(study.features, records_path=str(tmp_path / "none.parquet"))
    assert photograph(unrecorded, study.features.rows[2].key) is None


def test_the_photograph_is_shown_as_its_features_saw_it_whatever_its_name_and_only_while_it_is_unchanged(tmp_path):
    picture, exif = Image.new("RGBA", (40, 20)), Image.Exif()
    picture.paste((255, 0, 0, 255), (0, 0, 20, 20))
    exif[0x0112] = 6
    turned = {"size": (20, 40), "red": (10, 5), "white": (10, 35)}
    upright = {"size": (40, 20), "red": (5, 10), "white": (35, 10)}
    for name, options, places in (
        ("turned.png", {"format": "PNG", "exif": exif}, turned),
        (os.fsdecode(b"caf\xe9.heic"), {"format": "HEIF", "quality": -1}, upright),
    ):
        path = tmp_path / options["format"] / name
        path.parent.mkdir()
        picture.save(path, **options)
        records = find_images(ImageSource(images=str(path.parent)))
        files = hash_files(records)
        table = str(write_record_table(tmp_path, records, files.keys, [None]))
        features = FeatureSet("", "", "", "", "", 4, 4, (), table)
        shown = photograph(features, files.keys[0])
        assert shown.size == places["size"]
        assert shown.getpixel(places["white"]) == (255, 255, 255)
        assert abs(np.array(shown.getpixel(places["red"])) - (255, 0, 0)).max() < 9
        path.write_bytes(path.read_bytes() + b"another")
        assert photograph(features, files.keys[0]) is None


@pytest.mark.parametrize(
    ("images", "channels", "rank", "said"),
    [
        ([4], 1, 3, "images: there is no image 4; the test split has 4 images, numbers 0 to 3"),
        ([0, -1], 1, 3, "no image -1"),
        ([0], [24], 1, "channel 24: these features have channels 0 to 23"),
        ([0], 1, 0, "rank 0: these features have ranks 1 to 16"),
        ([0], 1, 17, "rank 17: these features have ranks 1 to 16"),
    ],
)
def test_an_image_a_channel_or_a_rank_that_is_not_there_is_an_input_error(study, images, channels, rank, said):
    check_shown(study.features, study.split, [0, 3], [0, 23], 16)
    with pytest.raises(InputError, match=said):
        check_shown(study.features, study.split, images, channels, rank)
    with pytest.raises(InputError, match="report.images: there is no image 1; the test split has 1 image, number 0"):
        check_images([1], 1)


def test_the_spatial_page_holds_every_image_rank_and_channel(study):
    *pictures, page = write_spatial_page(scene(study), study.directory, images=[0, 3], channels=[4, 1], rank=7)
    assert [path.name for path in pictures] == ["spatial-000-r007.png", "spatial-003-r007.png"]
    text = page.read_text(encoding="utf-8")
    data = json.loads(text.split('id="places-data">')[1].split("</script>")[0])
    assert (data["grid"], data["ranks"], data["channels"]) == ([4, 4], [3, 7], [4, 1])
    assert [image["image"] for image in data["images"]] == [0, 3]
    assert [[method["name"] for method in data["images"][0]["ranks"][rank]] for rank in ("3", "7")] == [
        ["svd", "sketch"], ["svd"]
    ]  # fmt: skip
    original = np.frombuffer(base64.b64decode(data["images"][0]["original"]), "<f4").reshape(2, 4, 4)
    x_TD = study.x_NTD[16].numpy()
    assert original == pytest.approx(np.stack([x_TD[:, channel].reshape(4, 4) for channel in (4, 1)]))


def test_the_rank_that_is_shown_is_the_validation_images_best(study):
    study.comparison = replace(
        study.comparison, rows=(make_row("sketch", 3, 1.2), make_row("sketch", 5, 1.1, chosen=2))
    )
    assert scene(study).rank(None) == 3
    assert scene(study).ranks(3) == [3, 5]


def test_a_box_marks_the_tokens_whose_centre_it_holds_and_one_at_least():
    inside = inside_boxes([(0.25, 0.0, 0.75, 0.5)], 4, 4)
    assert np.argwhere(inside).tolist() == [[0, 1], [0, 2], [1, 1], [1, 2]]
    assert np.argwhere(inside_boxes([(0.9, 0.9, 0.91, 0.91)], 4, 4)).tolist() == [[3, 3]]


def test_a_column_of_boxes_that_is_not_understood_is_a_note_of_the_page(study):
    records = pd.read_parquet(study.features.records_path)
    records.assign(bbox="left").to_parquet(study.features.records_path)
    section = spatial_section(scene(study), study.directory / "plots", images=[1], channels=1, rank=3)
    note = "The records' column bbox looks like boxes, but is not understood (left), and is not drawn."
    assert section.notes == (note,) and not section.tables


def test_the_error_inside_the_boxes_is_held_against_the_error_outside(study):
    records = pd.read_parquet(study.features.records_path)
    records.assign(bbox_xywh=[[0, 0, 20, 10]] * 20).to_parquet(study.features.records_path)
    boxes, expected = read_boxes(study.features), []
    for image in range(3):
        (view,) = views(study, image, {3: None}, [0], boxes)
        assert view.boxes == ((0.0, 0.0, 0.5, 0.5),)
        (svd,) = view.reconstructions
        inside = svd.error_HW[:2, :2]
        outside = np.concatenate([svd.error_HW[:2, 2:].ravel(), svd.error_HW[2:].ravel()])
        expected.append([np.sqrt(np.square(errors).mean()) for errors in (inside, outside)])
        assert svd.regions[:2] == pytest.approx(expected[-1])
    given = FeatureMatrix(study.features), study.split, boxes, 3, None
    seen, regions = compare_regions(*given)
    assert (seen, list(regions)) == (3, ["svd"]), "the last test image has no photograph"
    assert regions["svd"][:2] == pytest.approx(np.mean(expected, axis=0))
    assert compare_regions(*given, most=1)[0] == 1
