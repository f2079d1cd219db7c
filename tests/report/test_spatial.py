"""Spatial pictures: the right numbers at the right places, on scales that may be compared."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from lowrank_tune.errors import InputError
from lowrank_tune.lowrank.data import FeatureMatrix
from lowrank_tune.lowrank.decomposers import load_decomposer
from lowrank_tune.report.boxes import BoxColumn
from lowrank_tune.report.places import spatial_figure
from lowrank_tune.report.spatial import check_images, grid_shape, photograph, spatial_views


def spatial_view(data, split, image, *, rank, channels, network, boxes=None):
    (view,) = spatial_views(data, split, image, networks={rank: network}, channels=channels, boxes=boxes)
    return view


@pytest.fixture
def network(study):
    return load_decomposer(study.directory / "trials" / "r003-sketch-0000" / "best_model.safetensors").eval()


@pytest.fixture
def view(study, network):
    return spatial_view(FeatureMatrix(study.features), study.split, 1, rank=3, channels=range(2), network=network)


@pytest.mark.parametrize(
    ("tokens", "grid"), [(256, (16, 16)), (12, (3, 4)), (576, (24, 24)), (13, (1, 13)), (1, (1, 1)), (128, (8, 16))]
)
def test_the_grid_follows_from_the_number_of_tokens(tokens, grid):
    assert grid_shape(tokens) == grid


def test_a_views_maps_are_numpys(study, view, network):
    x_TD = FeatureMatrix(study.features).load([6])[0].double().numpy()
    u, s, vh = np.linalg.svd(x_TD, full_matrices=False)
    svd_TD = (u[:, :3] * s[:3]) @ vh[:3]
    with torch.inference_mode():
        a_NTR, b_NRD = network(torch.from_numpy(x_TD).float()[None])
    sketch_TD = (a_NTR @ b_NRD)[0].double().numpy()
    assert view.original_KHW == pytest.approx(np.stack([x_TD[:, k].reshape(3, 4) for k in (0, 1)]))
    assert view.norm_HW == pytest.approx(np.linalg.norm(x_TD, axis=1).reshape(3, 4))
    for shown, made_TD, method in zip(view.reconstructions, (svd_TD, sketch_TD), ("svd", "sketch"), strict=True):
        assert shown.method == method
        assert shown.maps_KHW == pytest.approx(np.stack([made_TD[:, k].reshape(3, 4) for k in (0, 1)]), abs=1e-5)
        assert shown.error_HW == pytest.approx(np.sqrt(((x_TD - made_TD) ** 2).mean(1)).reshape(3, 4), abs=1e-5)
        cosines = (x_TD * made_TD).sum(1) / (np.linalg.norm(x_TD, axis=1) * np.linalg.norm(made_TD, axis=1))
        assert shown.token_cosine == pytest.approx(cosines.mean(), abs=1e-6)


def test_any_channels_are_shown_in_the_order_asked_for(study):
    data = FeatureMatrix(study.features)
    view = spatial_view(data, study.split, 0, rank=1, channels=(17, 3), network=None)
    x_TD = data.load([5])[0].double().numpy()
    assert view.channels == (17, 3)
    assert view.original_KHW == pytest.approx(np.stack([x_TD[:, k].reshape(3, 4) for k in (17, 3)]))
    assert [method.method for method in view.reconstructions] == ["svd"]
    with pytest.raises(InputError, match="channel 20: these features have channels 0 to 19"):
        spatial_view(data, study.split, 0, rank=1, channels=[20], network=None)


def test_several_ranks_of_an_image_are_what_each_is_alone(study, network):
    data = FeatureMatrix(study.features)
    both = list(spatial_views(data, study.split, 1, networks={7: None, 3: network}, channels=[0]))
    alone = spatial_view(data, study.split, 1, rank=3, channels=[0], network=network)
    assert [view.rank for view in both] == [7, 3]
    for shown, expected in zip(both[1].reconstructions, alone.reconstructions, strict=True):
        assert shown.cosine_HW == pytest.approx(expected.cosine_HW)
        assert shown.maps_KHW == pytest.approx(expected.maps_KHW)


def test_a_guessed_grid_is_told_and_carries_no_boxes(study, view):
    assert not view.placed
    boxes = BoxColumn({study.features.rows[6].key: ((0, 0, 20, 10),)}, True, "")
    data = FeatureMatrix(study.features)
    assert spatial_view(data, study.split, 1, rank=3, channels=[0], network=None, boxes=boxes).boxes == ()


def test_maps_that_are_compared_share_a_scale(view):
    figure = spatial_figure(view)
    figure.savefig(io.BytesIO(), format="png")
    (axes,) = figure.axes
    texts = [text.get_text() for text in axes.texts]
    for name in ("photograph", "token lengths", "svd: token cosine", "channel 0", "channel 1", "RMS error of a token"):
        assert name in texts
    assert f"sketch: error\ntoken cosine {view.reconstructions[1].token_cosine:.4f}" in texts
    rows = {}
    for image in axes.images:
        rows.setdefault(round(image.get_extent()[3], 3), []).append(image)
    errors, cosines, *channels = (
        [image for image in row if image.get_array().shape == (3, 4)] for row in rows.values()
    )
    highest = max(method.error_HW.max() for method in view.reconstructions)
    assert [image.get_clim() for image in errors] == [(0.0, highest)] * 2
    assert len(cosines) == 3 and cosines[1].get_clim() == cosines[2].get_clim()
    for place, row in enumerate(channels):
        shown = np.stack([np.asarray(image.get_array()) for image in row])
        assert {image.get_clim() for image in row} == {(shown.min(), shown.max())}
        assert shown[0] == pytest.approx(view.original_KHW[place])
        assert [image.get_extent()[0] for image in row] == sorted(image.get_extent()[0] for image in row)


def test_the_photograph_is_shown_where_it_is_at_hand(study, view):
    assert view.photograph.size == (448, 448)
    assert set(np.unique(view.photograph)) == {150}
    without = spatial_view(FeatureMatrix(study.features), study.split, 3, rank=3, channels=range(1), network=None)
    assert without.photograph is None
    assert "photograph" not in {text.get_text() for text in spatial_figure(without).axes[0].texts}


def test_a_photograph_stands_upright(features, tmp_path):
    picture = Image.new("RGB", (40, 20))
    picture.paste((255, 0, 0), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "cache" / "0.png", exif=exif)
    shown = photograph(features, features.rows[0].key)
    assert shown.size == (20, 40)
    assert (shown.getpixel((10, 5)), shown.getpixel((10, 35))) == ((255, 0, 0), (0, 0, 0))


def test_no_photograph_for_a_text_file_or_without_records(features, tmp_path):
    (tmp_path / "cache" / "0.png").write_text("not a picture")
    assert photograph(features, features.rows[0].key) is None
    assert photograph(replace(features, records_path=str(tmp_path / "none.parquet")), features.rows[1].key) is None


def test_an_image_that_is_not_there_is_an_input_error(study):
    with pytest.raises(InputError, match=r"no image 4; the test split has 4 images, numbers 0 to 3"):
        spatial_view(FeatureMatrix(study.features), study.split, 4, rank=3, channels=range(1), network=None)
    with pytest.raises(InputError, match="no image -1"):
        check_images([0, -1], 4)
    with pytest.raises(InputError, match="1 image, number 0"):
        check_images([1], 1)
