"""Boxes in users' records: every form that the rule names, and the tokens inside."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lowrank_tune.lowrank.data import FeatureMatrix
from lowrank_tune.records import FeatureRow, FeatureSet, Split
from lowrank_tune.report.boxes import inside_boxes, read_boxes
from lowrank_tune.report.spatial import compare_regions, spatial_views

WIDE = (200, 100)


@pytest.fixture
def boxed(features, tmp_path):
    """Write the records' boxes, a value for each of the first images, under a column's name."""

    def write(name, *values):
        records = pd.read_parquet(features.records_path)
        path = tmp_path / f"{name}.parquet"
        records.assign(**{name: [*values, *[None] * (len(records) - len(values))]}).to_parquet(path)
        return read_boxes(replace(features, records_path=str(path))), features.rows

    return write


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("bbox", [[20.0, 10.0, 10.0, 5.0], [20.0, 10.0, 40.0, 50.0]], (0.1, 0.1, 0.15, 0.15)),
        ("bbox", [[20, 10, 60, 50], [0, 0, 5, 5]], (0.1, 0.1, 0.3, 0.5)),
        ("bbox_xywh", [[20, 10, 60, 50]], (0.1, 0.1, 0.4, 0.6)),
        ("BBoxes_xyxy", [[[20, 10, 60, 50]]], (0.1, 0.1, 0.3, 0.5)),
        ("boxes", ['[{"x": 20, "y": 10, "w": 60, "h": 50}]'], (0.1, 0.1, 0.4, 0.6)),
        ("bounding_box", [{"xmin": 20, "ymin": 10, "xmax": 60, "ymax": 50}], (0.1, 0.1, 0.3, 0.5)),
        ("bbox", [[0.25, 0.5, 0.1, 0.25], [0.5, 0.5, 0.1, 0.1]], (0.25, 0.5, 0.35, 0.75)),
        ("bbox", [[150, 50, 100, 80], [1, 1, 1, 1]], (0.75, 0.5, 1.0, 1.0)),
    ],
)
def test_boxes_are_read_by_the_rule(boxed, name, values, expected):
    column, rows = boxed(name, *values)
    (box,) = column.of(rows[0].key, *WIDE)
    assert box == pytest.approx(expected)
    assert name in column.note


def test_no_column_of_boxes_or_no_box_in_it_is_none(boxed, features):
    assert read_boxes(features) is None
    assert boxed("bbox", "not a box", "[1, 2, 3]", '{"x": 1}')[0] is None
    assert read_boxes(replace(features, records_path="nowhere.parquet")) is None


def test_a_box_marks_the_tokens_whose_centre_it_holds_and_one_at_least():
    inside = inside_boxes([(0.25, 0.0, 0.75, 0.5)], 4, 4)
    assert np.argwhere(inside).tolist() == [[0, 1], [0, 2], [1, 1], [1, 2]]
    assert np.argwhere(inside_boxes([(0.9, 0.9, 0.91, 0.91)], 4, 4)).tolist() == [[3, 3]]


@pytest.fixture
def grounded(tmp_path):
    """Three images of 4 x 4 tokens, each with a photograph and a box over its upper left quarter."""
    (tmp_path / "shards").mkdir()
    x_NTD = torch.randn(3, 16, 20, generator=torch.Generator().manual_seed(1))
    x_NTD[:, [0, 1, 4, 5]] *= 5
    save_file({"features": x_NTD}, tmp_path / "shards" / "0.safetensors")
    for n in range(3):
        Image.new("RGB", (80, 40)).save(tmp_path / f"{n}.png")
    rows = tuple(FeatureRow(f"{n:064x}", "0.safetensors", n) for n in range(3))
    table = {"key": [row.key for row in rows], "path": [str(tmp_path / f"{n}.png") for n in range(3)]}
    pd.DataFrame({**table, "bbox_xywh": [[0, 0, 40, 20]] * 3}).to_parquet(tmp_path / "records.parquet")
    records = str(tmp_path / "records.parquet")
    features = FeatureSet(str(tmp_path), "0" * 16, "synthetic", "random", "float32", 16, 20, rows, records)
    return features, Split((0,), (), (1, 2))


def test_the_error_inside_the_boxes_is_held_against_the_error_outside(grounded):
    features, split = grounded
    data, boxes = FeatureMatrix(features), read_boxes(features)
    (view,) = spatial_views(data, split, 0, networks={3: None}, channels=[0], boxes=boxes)
    assert view.boxes == ((0.0, 0.0, 0.5, 0.5),)
    error = view.reconstructions[0].error_HW
    inside = np.sqrt(np.square(error[:2, :2]).mean())
    assert view.reconstructions[0].regions.error_inside == pytest.approx(inside)
    others = np.concatenate([error[:2, 2:].ravel(), error[2:].ravel()])
    assert view.reconstructions[0].regions.error_outside == pytest.approx(np.sqrt(np.square(others).mean()))
    images, regions = compare_regions(data, split, boxes, 3, None)
    assert (images, list(regions)) == (2, ["svd"])
    other = next(iter(spatial_views(data, split, 1, networks={3: None}, channels=[0], boxes=boxes)))
    mean = (inside + other.reconstructions[0].regions.error_inside) / 2
    assert regions["svd"].error_inside == pytest.approx(mean)
    assert compare_regions(data, split, boxes, 3, None, most=1)[0] == 1
