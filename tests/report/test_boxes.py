"""Boxes in every form that data sets have them in, by their numbers."""

import json
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lowrank_tune.records import FeatureSet
from lowrank_tune.report.boxes import read_boxes

WIDTH, HEIGHT = 200, 100
BOX = (0.1, 0.1, 0.3, 0.5)  # 20, 10 to 60, 50


@dataclass
class Records:
    """A table of records with an image of 200 x 100 pixels behind each."""

    features: FeatureSet

    def read(self, **columns):
        """What is read of columns with a value for each of the first images."""
        number = max(map(len, columns.values()))
        image = self.features.records_path.replace("parquet", "png")
        own = {"key": [str(place) for place in range(number)], "path": [image] * number}
        pq.write_table(
            pa.table(own | {name: pa.array(values) for name, values in columns.items()}), self.features.records_path
        )
        return read_boxes(self.features)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "records.png")
    return Records(FeatureSet("", "", "", "", "", 4, 4, (), str(folder / "records.parquet")))


SIZE = [[20, 10, 40, 40], [100, 50, 9, 9]]  # not ordered as corners would be
CORNERS = [[20, 10, 60, 50], [0, 0, 5, 5]]
SIDES = [
    *((names, CORNERS) for names in ("x0 y0 x1 y1", "x1 y1 x2 y2", "xmin ymin xmax ymax", "left top right bottom")),
    *((names, CORNERS) for names in ("x_min y_min x_max y_max", "XMin YMin XMax YMax")),
    *((names, SIZE) for names in ("x y w h", "x y width height", "left top width height")),
    ("top_left_x top_left_y width height", SIZE),
    ("cx cy w h", [[40, 30, 40, 40]]),
]


@pytest.mark.parametrize(("names", "rows"), SIDES)
@pytest.mark.parametrize("kind", [float, str])
def test_sides_by_name_are_read_from_objects_and_from_columns(records, names, rows, kind):
    listed = [dict(zip(names.split(), map(kind, row), strict=True)) for row in rows]
    columns = {name: [each[name] for each in listed] for name in names.split()}
    for column in (
        records.read(box=listed),
        records.read(objects=[[each] for each in listed]),
        records.read(regions=[json.dumps([each | {"phrase": "a cup"}]) for each in listed]),
        records.read(**columns),
        records.read(**{f"bbox_{name}": values for name, values in columns.items()}),
    ):
        assert column.of("0", WIDTH, HEIGHT) == (pytest.approx(BOX),)
        assert "read as objects with named sides in pixels" in column.note


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("bbox", [[20.0, 10.0, 40.0, 40.0], [100.0, 50.0, 9.0, 9.0]]),
        ("bbox", CORNERS),
        ("bbox_xywh", [[20, 10, 40, 40]]),
        ("boxes_xywh", [[[20, 10, 40, 40]], []]),
        ("BBoxes_xyxy", [[[20, 10, 60, 50]]]),
        ("bbox_2d", [[20, 10, 60, 50], [100, 50, 9, 9]]),
        ("gt_boxes", [[["20", "10", "60", "50"]]]),
        ("boundingBox", [[20, 10, 60, 50]]),
        ("boxes_cxcywh", [[[40, 30, 40, 40]]]),
        ("objects", [{"bbox": [[20, 10, 60, 50]], "category": [3]}, {"bbox": [], "category": []}]),
        ("objects", [[{"bbox": [20, 10, 60, 50], "label": "cup"}]]),
        ("objects", ['{"ref": ["cup"], "bbox": [[20, 10, 60, 50]]}']),
        ("objects", ['{"ref": ["cup"], "bbox": [[100, 100, 300, 500]], "bbox_type": "norm1000"}']),
        ("object", [[{"name": "cup", "bndbox": {"xmin": "20", "ymin": "10", "xmax": "60", "ymax": "50"}}]]),
        ("faces", [{"bbox": [[20.0, 10.0, 40.0, 40.0], [100.0, 50.0, 9.0, 9.0]], "blur": [0, 1]}]),
        ("annotations", [{"bbox_2d": [20, 10, 60, 50], "label": "cup"}]),
        ("boxes", [[{"label": "logo", "xyxy": [20, 10, 60, 50]}]]),
        ("objects", [[{"xmin": [20.0], "ymin": [10.0], "xmax": [60.0], "ymax": [50.0]}]]),
        ("bbox", [[[20, 10], [60, 50]]]),
        ("bbox", [[[20, 10], [60, 12], [60, 50], [22, 50]]]),
        ("bbox", [[20, 10, 60, 12, 60, 50, 22, 50]]),
        ("boxes", [[[[20, 10], [60, 12], [60, 50], [22, 50]]]]),
        ("polygon", [[[20, 10], [60, 12], [60, 50], [22, 50]]]),
        ("bounding_box", [{"vertices": [{"x": 20, "y": 10}, {"x": 60, "y": 10}, {"x": 60, "y": 50}]}]),
        ("bbox", [[20, 10, 60, 50, 0.9], [0, 0, 7, 7, 0.2]]),
        ("bbox", [[20, 10, 40, 40, 0.9], [100, 50, 9, 9, 1.0]]),
        ("bbox", [[3, 0.2, 0.3, 0.2, 0.4], [0, 0.5, 0.5, 0.1, 0.1]]),
        ("bbox", [[0.1, 0.1, 0.2, 0.4], [0.5, 0.5, 0.1, 0.1]]),
        ("bbox", [[100, 100, 300, 500], [0, 0, 990, 1000], [400, 300, 990, 950]]),
        ("boxes", [[[20, 10, 60, 50]] + [[1, 1, 9, 9]] * 98 + [[90, 5, 80, 0]]]),
        ("boxes", [[[20, 10, 60, 50]] + [[1, 1, 9, 9]] * 4 + [[90, 5, 80, 0]]]),
        ("boxes", [[[0.1, 0.1, 0.3, 0.5]] + [[0, 0, 0.1, 0.1]] * 4 + [[0.2, 0.2, 1.01, 1]]]),
        ("bbox", ["20,10,60,50"]),
        ("bbox", ["20 10 60 50"]),
        ("bbox", ["[20. 10. 60. 50.]"]),
        ("bbox", ["[20, 10, 60, 50]"]),
        ("bbox", ["(20, 10), (60, 50)"]),
        ("bbox", ["{'x': 20, 'y': 10, 'w': 40, 'h': 40}"]),
        ("bbox", ['["20", "10", "60", "50"]']),
        ("bbox", ["<box>(100,100),(300,500)</box>"]),
        ("bbox", ["<ref>a cup</ref><box>[[100, 100, 300, 500]]</box>"]),
        ("bbox", ["<|object_ref_start|>cup<|object_ref_end|><|box_start|>(100,100),(300,500)<|box_end|>"]),
    ],
)
def test_a_box_is_read_by_its_form(records, name, values):
    column = records.read(**{name: values})
    assert column.of("0", WIDTH, HEIGHT)[0] == pytest.approx(BOX), column.note
    assert f"column {name}, read as" in column.note and "no box" not in column.note


def test_a_box_beyond_the_image_is_cut_and_pixels_of_large_ones_are_no_thousandths(records):
    column = records.read(bbox=[[150, 50, 100, 80], [1, 1, 1, 1]])
    assert column.of("0", WIDTH, HEIGHT) == ((0.75, 0.5, 1.0, 1.0),)
    assert "in pixels" in records.read(bbox=[[0, 0, 990, 1200], [0, 0, 980, 970]]).note
    assert "in thousandths" in records.read(bbox=[[0, 0, 990, 1000], [0, 0, 980, 970]]).note


def test_what_is_no_box_is_left_out_and_counted_and_what_is_missing_is_not(records):
    column = records.read(bbox=["20,10,60,50", "?", "[1, 2, 3]", "", "null", None, "[]", "[1, 2, 3, 4, 7, 9]"])
    assert column.note.endswith("in pixels; 3 values in it are no box")
    assert column.of("0", WIDTH, HEIGHT) == (pytest.approx(BOX),) and not column.of("1", WIDTH, HEIGHT)
    column = records.read(bbox=[[20, 10, 60, 50], [1, 2, float("nan"), 4], [1, 2, float("inf"), 4]])
    assert column.note.endswith("2 values in it are no box")


def test_a_column_that_looks_like_boxes_and_is_not_understood_is_said_once(records):
    column = records.read(bbox=["a", "b"], boxes=[{"x": 1}, {"x": 2}], answer=["c", "d"])
    assert column.note == "the records' column bbox looks like boxes, but is not understood (a), and is not drawn"
    assert not column.boxes and column.of("0", WIDTH, HEIGHT) == ()
    angles = records.read(bbox=[[20, 10, 60, 50, 45.0], [0, 0, 7, 7, 90.0]])
    assert "five numbers of which the last is no score and the first no class" in angles.note
    either = records.read(box_2d=[[100, 100, 500, 300]])
    assert "column box_2d looks like boxes, and is not drawn: x or y may come first" in either.note
    assert "column boxes" in records.read(bbox=["a"], boxes=["1,2,3,4"]).note, "another is understood"
    for columns in ({"objects": ["cup"]}, {"regions": ["north"]}, {"answer": ["1"]}, {"bbox": [None]}, {"bbox": [[]]}):
        assert records.read(**columns) is None
    assert read_boxes(replace(records.features, records_path="nowhere.parquet")) is None


plain = (
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=12) | st.sampled_from(["<box>", "1,2"])
)
values = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=6)
        | st.dictionaries(st.sampled_from(["bbox", "x", "y", "w", "h", "points", "xyxy", "a"]), inner, max_size=5)
    ),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(values.map(json.dumps) | st.text(max_size=30), min_size=1, max_size=4),
    st.sampled_from(["bbox", "objects"]),
)
def test_whatever_a_column_holds_is_boxes_inside_the_image_or_none(records, values, name):
    column = records.read(**{name: values})
    for place in range(len(values)):
        for x0, y0, x1, y1 in column.of(str(place), WIDTH, HEIGHT) if column else ():
            assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.floats(width=32) | st.integers(-(2**40), 2**40), max_size=9), min_size=1, max_size=5))
def test_whatever_numbers_a_column_holds_is_boxes_or_none(records, values):
    column = records.read(bbox=[[float(number) for number in each] for each in values])
    assert column is None or column.note
