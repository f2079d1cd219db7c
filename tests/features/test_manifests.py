import gzip
import json
import os
import tempfile
from pathlib import Path

import pandas as pd
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_tune.config.source import ManifestSource
from lowrank_tune.errors import InputError
from lowrank_tune.features.groups import listed_groups
from lowrank_tune.features.images import hash_files, write_record_table
from lowrank_tune.features.sources import read_records

GROUNDING = [
    {
        "image": "a/1.jpg",
        "question": "What is the brand?",
        "boxes": [{"label": "logo", "xyxy": [1, 2, 30, 40]}, {"label": "text", "xyxy": [5, 6, 70, 80]}],
    },
    {"image": "a/2.jpg", "question": "Which number?", "boxes": []},
    {"image": "a/1.jpg", "question": "What colour?", "boxes": [{"label": "cup", "xyxy": [0.5, 1.5, 3, 4]}]},
]


def records_of(manifest, **keys):
    source = ManifestSource.model_validate({"manifest": manifest, **keys})
    return read_records(source, Path("unused"), 0)


def write_manifest(path, records):
    frame = pd.DataFrame(records)
    match path.suffix:
        case ".json":
            path.write_text(json.dumps(records))
        case ".jsonl":
            path.write_text("".join(json.dumps(record) + "\n\n" for record in records))
        case ".csv":
            frame.assign(boxes=frame.boxes.map(json.dumps)).to_csv(path, index=False)
        case ".parquet":
            frame.to_parquet(path)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_grounding_records_keep_their_columns_in_every_format(tmp_path, suffix):
    path = tmp_path / f"data{suffix}"
    write_manifest(path, GROUNDING)
    records = records_of(str(path))
    assert records.images == tuple(str(tmp_path / record["image"]) for record in GROUNDING)
    rows = records.columns.to_pylist()
    assert [row["question"] for row in rows] == [record["question"] for record in GROUNDING]
    boxes = [json.loads(row["boxes"]) if suffix == ".csv" else row["boxes"] for row in rows]
    assert boxes == [record["boxes"] for record in GROUNDING]


def test_nested_columns_survive_into_the_record_table(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"info": {"version": 1}, "data": [{**record, "key": "mine"} for record in GROUNDING]}))
    records = records_of(str(path))
    table = write_record_table(tmp_path, records, ["k1", None, "k1"], [None, "gone", None])
    frame = pd.read_parquet(table)
    assert list(frame.record) == [0, 1, 2]
    assert frame.key.tolist()[0] == "k1"
    assert frame.error.tolist()[1] == "gone"
    assert list(frame.source_key) == ["mine"] * 3
    assert frame.boxes[0][1]["label"] == "text"
    assert write_record_table(tmp_path, records, ["k1", None, "k1"], [None, "gone", None]) == table


def test_mixed_values_become_json_text_and_numbers_as_file_names_stay_text(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"image": "1.jpg", "answer": 3}\n{"image": "2.jpg", "answer": ["three"]}\n{"image": "3.jpg"}\n')
    assert records_of(str(path)).columns["answer"].to_pylist() == ["3", '["three"]', None]
    (tmp_path / "data.csv").write_text("image,score\n0001,1.5\n0002,2\n")
    assert [Path(image).name for image in records_of(str(tmp_path / "data.csv")).images] == [
        "0001",
        "0002",
    ]


def test_root_replaces_the_manifests_folder_and_absolute_paths_stay(tmp_path):
    root = tmp_path / "elsewhere"
    root.mkdir()
    (tmp_path / "data.json").write_text(json.dumps([{"photo": "1.jpg"}, {"photo": "/data/2.jpg"}, {"photo": None}]))
    records = records_of(str(tmp_path / "data.json"), image_column="photo", root=str(root))
    assert records.images == (str(root / "1.jpg"), "/data/2.jpg", None)


def test_several_files_are_one_list_and_a_column_of_two_types_becomes_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "set/b/2.csv": "image,score,only\n2.jpg,two,x\n",
        "set/a/1.csv": "image,score\n1.jpg,1\n",
        "set/.hidden.csv": "image\n0.jpg\n",
        "set/notes.txt": "no table",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "set[1].tsv").write_text("image\tscore\n3.jpg\t3\n")
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(b'{"image": "4.jpg"}\n'))
    for manifest in (
        "set",
        "set/**/*",
        "set/{a/1,b/2}.csv",
        f"file://{tmp_path}/set",
        "set/**/*.csv",
        ["set/a", "set/b/2.csv", "set"],
    ):
        records = records_of(manifest)
        assert records.images == (str(tmp_path / "set/a/1.jpg"), str(tmp_path / "set/b/2.jpg")), manifest
        assert records.columns.to_pydict()["score"] == ["1", "two"]
        assert records.columns.to_pydict()["only"] == [None, "x"]
    assert [Path(image).name for image in records_of(["set[1].tsv", "lines.jsonl.gz"]).images] == ["3.jpg", "4.jpg"]
    for name in ("00000.tar", "00000.parquet", "00000_stats.json"):  # as img2dataset leaves them
        (tmp_path / "shards").mkdir(exist_ok=True)
        (tmp_path / "shards" / name).write_bytes(b"")
    with pytest.raises(InputError, match=r"/00000\.tar: is no tar"):
        records_of("shards")
    (tmp_path / "set/metadata.jsonl").write_text('{"image": "5.jpg"}')
    assert [Path(image).name for image in records_of("set").images] == ["5.jpg"], "as `datasets` reads an imagefolder"


IMAGES = ("COCO_val2014_000000000042.jpg", "000000000007.jpg", "gr\u00fcn.jpg")
IMAGES += ("1.jpg", "a b/2.png", "3.jpg", "3.json", "0004.webp", "5.PNG", "5.jpg", "back\\slash.jpg")
TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "No image.jpg"}]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with images; a manifest is written there by `named`."""
    for name in IMAGES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def named(records, **keys):
    """What of the folder each record names."""
    Path("data.json").write_text(json.dumps(records))
    found = records_of("data.json", **keys)
    return [image and os.path.relpath(image) for image in found.images], found


@pytest.mark.parametrize(
    ("value", "images"),
    [
        ("a b/2.png", ["a b/2.png"]),
        ("file://{here}/a%20b/2.png", ["a b/2.png"]),
        ("file:{here}/a%20b/2.png", ["a b/2.png"]),
        ("file://localhost{here}/1.jpg", ["1.jpg"]),
        ("{here}/1.jpg", ["1.jpg"]),
        ("a b\\2.png", ["a b/2.png"]),
        ("back\\slash.jpg", ["back\\slash.jpg"]),
        ("~/1.jpg", ["1.jpg"]),
        ("3", ["3.jpg"]),
        (3, ["3.jpg"]),
        ("0004", ["0004.webp"]),
        (42, ["COCO_val2014_000000000042.jpg"]),
        ("7", ["000000000007.jpg"]),
        ("000000000042", ["COCO_val2014_000000000042.jpg"]),
        ("gru\u0308n.jpg", ["gr\u00fcn.jpg"]),
        ("gone", ["gone"]),
        ("1.JPG", ["1.JPG"]),
        (["1.jpg", "3"], ["1.jpg", "3.jpg"]),
        ('["1.jpg", "3.jpg"]', ["1.jpg", "3.jpg"]),
        ("['1.jpg', '3.jpg']", ["1.jpg", "3.jpg"]),
        ("{[]: '\\d'}", ["{[]: '/d'}"]),
        ({"path": "1.jpg", "from": "web"}, ["1.jpg"]),
        ({"path": "1.jpg", "bytes": None}, ["1.jpg"]),
        ([{"path": "1.jpg"}, {"path": "3.jpg"}], ["1.jpg", "3.jpg"]),
        ("", [None]),
        (float("nan"), [None]),
        ("1.jpg\n", ["1.jpg"]),
        ("./1.jpg", ["1.jpg"]),
        (None, [None]),
    ],
)
def test_an_image_is_named_in_many_ways(folder, value, images):
    value = value.format(here=folder) if isinstance(value, str) and "here" in value else value
    found, records = named([{"image": "1.jpg"}, {"image": value, "n": 1}])
    assert found == ["1.jpg", *images]
    assert records.columns["n"].to_pylist() == [None, *[1] * len(images)]


PART = {"type": "image", "image": "1.jpg"}
ASKED = {"role": "user", "content": [PART, {"type": "text", "text": "3.jpg"}, {"type": "video", "video": "v.mp4"}]}
LINKED = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file://{here}/1.jpg"}}]}


@pytest.mark.parametrize(
    "record",
    [
        {"id": "1", "image": "1.jpg", "conversations": TALK},
        {"messages": [{"role": "user", "content": "<image>What?"}], "images": ["1.jpg"]},
        {"messages": [ASKED, {"role": "assistant", "content": "A sign."}]},
        {"messages": [LINKED]},
        {"messages": [{"role": "user", "content": ["3.jpg", {"image": "1.jpg"}, {"text": "3.jpg"}]}]},
        {"query": "x", "images": [{"path": "1.jpg", "bytes": None}]},
        {"prompt": [LINKED], "chosen": "a sign"},
        {"file": "1.jpg", "prompt": "a sign"},
        {"conversations": [{"from": "user", "value": "Picture 1: <img>1.jpg</img>\nWhat?"}]},
        {"id": 5, "Image Path": "1.jpg"},
        {"image_id": "1", "flickr_url": "https://example.org/1.jpg", "question": "?"},
        {"image": "https://example.org/1.jpg", "file_name": "1.jpg"},
        {"mask_file_name": "1.jpg"},
        {"file_names": ["1.jpg"], "n": 1},
    ],
)
def test_the_column_of_images_is_found_by_itself(folder, record):
    record = json.loads(json.dumps(record).replace("{here}", str(folder)))
    found, records = named([record])
    assert found == ["1.jpg"]
    assert records.columns.column_names == list(record)


def test_records_of_text_alone_are_left_out_and_counted_and_of_several_images_repeated(folder):
    chat = {"conversations": TALK}
    records = [{"image": "1.jpg", **chat}, chat, {"image": ["3.jpg", "5.jpg"], **chat}, {"image": None, **chat}]
    found, records = named(records)
    assert found == ["1.jpg", "3.jpg", "5.jpg"]
    assert records.notes == ("2 of 4 records name no image, only text, and are left out",)
    (folder / "sources").mkdir()
    table = pd.read_parquet(write_record_table(folder, records, ["a", "b", "c"], [None] * 3))
    assert list(table.record) == [0, 2, 2]
    source = ManifestSource(manifest="data.json")
    assert len(listed_groups(source, "image")) == len(listed_groups(source, None)) == 3
    assert len(set(listed_groups(source, "image"))) == 2


def test_one_chat_names_its_image_where_another_has_none(folder):
    said = [{"from": "human", "value": "<img>5.jpg</img>"}]
    records = [{"image": "1.jpg", "conversations": TALK}, {"images": ["3.jpg"]}, {"conversations": said}]
    assert named(records)[0] == ["1.jpg", "3.jpg", "5.jpg"]


def test_each_of_several_files_names_its_images_its_own_way(folder):
    Path("a.csv").write_text("file_name,n\n1.jpg,1\n")
    Path("b.json").write_text(json.dumps([{"image": ["1.jpg", "3.jpg"], "n": "two", "conversations": TALK}]))
    Path("c.json").write_text(json.dumps([{"conversations": TALK}]))
    Path("d.csv").write_text("image\n")
    records = records_of(["a.csv", "b.json", "c.json", "d.csv"])
    assert [os.path.relpath(image) for image in records.images] == ["1.jpg", "1.jpg", "3.jpg"]
    assert (records.numbers, records.columns["n"].to_pylist()) == ((0, 1, 1), ["1", "two", "two"])
    assert records.notes == ("1 of 3 records name no image, only text, and are left out",)
    Path("d.csv").write_text("image\nhttps://example.org/1.jpg\n")
    with pytest.raises(InputError, match="/d.csv: column 'image': 1 of its images are addresses"):
        records_of("*.{csv,json}")


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"image": "5"}], r"/5: 2 files have this name, 5\.PNG, 5\.jpg; name each with its suffix"),
        (
            [{"image": "s3://b/1.jpg"}, {"image": "1.jpg"}],
            "'image': 1 of its images are addresses, the first s3://b/1.jpg; download",
        ),
        ([{"conversations": TALK}], "data.json: has no record that names an image"),
        ([{"image": True}], "column 'image' names no image"),
        ([{"image": [[0, 255], [9, 9]]}], "column 'image' holds list.*no files' names"),
    ],
)
def test_an_image_that_cannot_be_found_is_named(folder, records, message):
    with pytest.raises(InputError, match=message):
        named(records)


def test_where_no_image_is_there_the_key_for_their_folder_is_named(folder):
    _, records = named([{"image": "x/1.jpg"}, {"image": "x/2.jpg"}])
    with pytest.raises(InputError, match=r"2 of 2 files(.|\n)*None is there: features.source.root"):
        hash_files(records).check({}, 1, "features.source", "features.max_quarantined")


ROWS = [
    {"image": f"images/{number}.jpg", "id": number, "boxes": [[4, 4, 30, number]], "n": "\u20ac"} for number in range(4)
]
LINES = "".join(f"{json.dumps(row)}\n" for row in ROWS)
FRAME = pd.DataFrame(ROWS)
KEYED = {row["image"]: {"id": row["id"], "boxes": row["boxes"], "n": row["n"]} for row in ROWS}
FORMS = {
    "list.json": json.dumps(ROWS, indent=1),
    "list.jsonl": json.dumps(ROWS, indent=1),
    "lines.json": LINES,
    "crlf.ndjson": LINES.replace("\n", "\r\n") + "\n\n",
    "jq.json": "".join(json.dumps(row, indent=2) for row in ROWS),
    "bom.jsonl": "\ufeff" + LINES,
    "default.jsonl": FRAME.to_json(),
    "columns.json": json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}),
    **{f"{orient}.json": FRAME.to_json(orient=orient) for orient in ("columns", "records", "split", "table")},
    "by_index.json": FRAME.set_index("image").to_json(orient="split"),
    "index.json": json.dumps({row["id"]: {name: row[name] for name in ("image", "boxes", "n")} for row in ROWS}),
    "by_path.json": json.dumps(KEYED),
    "nested.json": json.dumps({"info": {"v": 1}, "dataset": {"train": ROWS}, "licenses": [{"id": 1}]}),
    "extra.json": json.dumps({"data": ROWS, "answers": [{"id": 1}]}),
    "utf16.json": json.dumps(ROWS, ensure_ascii=False).encode("utf-16"),
    "utf16le.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode("utf-16-le"),
    "cp1252.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode("cp1252"),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_same_records_are_read_of_every_form_of_json(tmp_path, name):
    text = FORMS[name]
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    records = records_of(str(tmp_path / name))
    assert records.images == tuple(str(tmp_path / row["image"]) for row in ROWS)
    wanted = [{key: int(value) if key == "id" else value for key, value in row.items()} for row in ROWS]
    rows = [{**row, "id": int(row["id"])} for row in records.columns.to_pylist()]
    assert [{key: row[key] for key in ROWS[0]} for row in rows] == wanted


@pytest.mark.parametrize(
    ("content", "records"),
    [
        (["images/1.jpg", "images/2.jpg"], [{"image": "images/1.jpg"}, {"image": "images/2.jpg"}]),
        (ROWS[0], ROWS[:1]),
        ({"id": "1", "image": "1.jpg", "conversations": TALK}, [{"id": "1", "image": "1.jpg", "conversations": TALK}]),
        (
            {"images": ["1.jpg"], "messages": [{"role": "user", "content": "a"}]},
            [{"images": ["1.jpg"], "messages": [{"role": "user", "content": "a"}]}],
        ),
        ({"imgs": {"a": {"file_name": "1.jpg"}}, "imgToAnns": {"b": {"c": [1]}}}, [{"id": "a", "file_name": "1.jpg"}]),
        (
            {"image": ["1.jpg", "2.jpg"], "n": [1, 2], "names": ["a"], "info": {}},
            [{"image": "1.jpg", "n": 1}, {"image": "2.jpg", "n": 2}],
        ),
        ({"image": ["1.jpg"], "q": "?"}, [{"image": ["1.jpg"], "q": "?"}]),
        ({"a.jpg": ["one", "two"]}, [{"image": "a.jpg", "value": ["one", "two"]}]),
        ({"cap": {"a.jpg": "x", "b.jpg": "y"}}, [{"image": "a.jpg", "cap": "x"}, {"image": "b.jpg", "cap": "y"}]),
        ({"train": {"a.jpg": {"cap": "x"}}}, [{"image": "a.jpg", "cap": "x"}]),
        ({"train_0001": {"img": "1.jpg"}}, [{"id": "train_0001", "img": "1.jpg"}]),
        ({"info": {"path": "x"}, "dataset": {"train": ROWS}}, ROWS),
        ({"7": {"text": "x"}, "8": {"text": "y"}}, [{"image": "7", "text": "x"}, {"image": "8", "text": "y"}]),
        ({"dataset_type": "train", "data": [{"image_id": "1"}]}, [{"image_id": "1"}]),
        (
            {"train": {"7": {"img": "1.jpg"}, "8": {"img": "2.jpg"}}},
            [{"id": "7", "img": "1.jpg"}, {"id": "8", "img": "2.jpg"}],
        ),
    ],
)
def test_records_are_found_in_less_usual_forms(tmp_path, content, records):
    line = {"images": ["1.jpg", "2.jpg"], "messages": [{"role": "user", "content": "a"}] * 2}
    (tmp_path / "one.jsonl").write_text(json.dumps(line))
    assert records_of(str(tmp_path / "one.jsonl")).columns.to_pylist() == [line] * 2, "a line is a record"
    (tmp_path / "data.json").write_text(json.dumps(content))
    assert records_of(str(tmp_path / "data.json")).columns.to_pylist() == records


def test_cocos_annotations_are_joined_to_their_images(tmp_path):
    coco = {
        "info": {},
        "licenses": [{"id": 1}],
        "images": [{"id": number, "file_name": f"{number}.jpg", "height": 120} for number in (1, 2)],
        "annotations": [
            {"id": 7, "image_id": 2, "bbox": [4.0, 4.0, 30.5, 30.0], "category_id": 1, "segmentation": [[1, 2, 3, 4]]},
            {"id": 8, "image_id": 2, "bbox": [1, 2, 3, 4], "category_id": 3, "segmentation": {"counts": "x"}},
            {"id": 9, "image_id": 5, "bbox": [1, 2, 3, 4], "category_id": 3},
        ],
        "categories": [{"id": 1, "name": "sign"}, {"id": 3, "name": "cup"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(coco))
    records = records_of(str(tmp_path / "instances.json"))
    assert records.images == (str(tmp_path / "1.jpg"), str(tmp_path / "2.jpg"))
    first, second = records.columns.to_pylist()
    assert (first["boxes_xywh"], first["categories"]) == ([], [])
    assert (second["boxes_xywh"], second["categories"]) == ([[4.0, 4.0, 30.5, 30.0], [1, 2, 3, 4]], ["sign", "cup"])
    assert json.loads(second["annotations"])[0]["segmentation"] == [[1, 2, 3, 4]]
    assert records.notes == (
        f"{tmp_path / 'instances.json'}: annotations of images that are not in the list are left out: 1",
    )
    captions = [{"image_id": 1, "caption": "one"}, {"image_id": 1, "caption": "two"}]
    (tmp_path / "captions.json").write_text(json.dumps({"images": coco["images"], "annotations": captions}))
    assert records_of(str(tmp_path / "captions.json")).columns["captions"].to_pylist() == [["one", "two"], []]


def test_one_of_several_lists_of_records_is_chosen_by_its_name(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps({"train": ROWS[:3], "test": ROWS[3:]}))
    path = str(tmp_path / "data.json")
    assert len(records_of(path, records="train").images) == 3
    (tmp_path / "by_column.json").write_text(
        json.dumps({"train": {"image": ["1.jpg"] * 3, "n": [1, 2, 3]}, "test": {}})
    )
    assert records_of(str(tmp_path / "by_column.json")).columns["n"].to_pylist() == [1, 2, 3]
    with pytest.raises(InputError, match=r"several lists of records, 'train' \(3\), 'test' \(1\); .*records: train"):
        records_of(path)
    with pytest.raises(InputError, match=r"no records 'val': its lists of records are 'train' \(3\), 'test' \(1\)"):
        records_of(path, records="val")
    (tmp_path / "data.json").write_text(json.dumps(ROWS))
    with pytest.raises(InputError, match="no records 'val': its records have no name"):
        records_of(path, records="val")


LONG = "x" * 3_000_000
CSVS = {
    "comma.csv": 'image,n,note\n0001.jpg,7,a\n0002.jpg,,"b\nc, ""d"""\n',
    "semicolon.csv": 'image;n;note\n0001.jpg;7;a\n0002.jpg;;"b\nc, ""d"""\n',
    "tab.csv": 'image\tn\tnote\n0001.jpg\t7\ta\n0002.jpg\t\t"b\nc, ""d"""\n',
    "tab.tsv": 'image\tn\tnote\n0001.jpg\t7\ta\n0002.jpg\t\t"b\nc, ""d"""\n',
    "bar.csv": 'image|n|note\r\n0001.jpg|7|a\r\n0002.jpg||"b\nc, ""d"""\r\n',
    "excel.csv": '\ufeffsep=;\r\nimage;n;note\r\n0001.jpg;7;a\r\n0002.jpg;;"b\nc, ""d"""\r\n',
    "listed.csv": 'image;n;note;a, b, c, d\n0001.jpg;7;a;x\n0002.jpg;;"b\nc, ""d""";y\n',
    "blank.csv": '\n\nimage, n, note\n\n0001.jpg,7,a\n0002.jpg,,"b\nc, ""d"""\n',
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("name", CSVS)
def test_a_csv_is_read_whatever_separates_its_values(tmp_path, name, encoding):
    (tmp_path / name).write_bytes(CSVS[name].encode(encoding))
    records = records_of(str(tmp_path / name))
    assert [Path(image).name for image in records.images] == ["0001.jpg", "0002.jpg"]
    assert records.columns["n"].to_pylist() == [7, None]
    assert records.columns["note"].to_pylist() == ["a", 'b\nc, "d"']


def test_where_each_line_of_a_tsv_is_a_record_a_lone_quote_joins_none(tmp_path):
    (tmp_path / "a.tsv").write_text('image\tnote\n1.jpg\t"one\n2.jpg\ttwo\n3.jpg\tthree" x\n')
    assert records_of(str(tmp_path / "a.tsv")).columns["note"].to_pylist() == ['"one', "two", 'three" x']


def test_what_a_csv_holds_keeps_its_meaning(tmp_path):
    texts = {
        "image": ["0001", "2"],
        "": ["0", "1"],
        "id": ["007", "8"],
        "large": ["99999999999999999999", "1"],
        "score": ["1.5", "nan"],
        "day": ["2024-01-01", "2024-01-02"],
        "text": ["NA", "true"],
        "long": [LONG, "\u00fc"],
    }
    lines = [",".join((*texts, "id"))] + [",".join((*row, "x")) for row in zip(*texts.values(), strict=True)]
    (tmp_path / "data.csv").write_bytes("\n".join(lines).encode("latin-1"))
    records = records_of(str(tmp_path / "data.csv"))
    assert [Path(image).name for image in records.images] == ["0001", "2"]
    found = records.columns.to_pydict()
    assert found.pop("score") == [1.5, pytest.approx(float("nan"), nan_ok=True)]
    assert found.pop("id_2") == ["x", "x"]
    assert found.pop("unnamed") == [0, 1]
    assert found == {name: values for name, values in texts.items() if name not in ("", "score")}
    assert records.notes == (f"{tmp_path / 'data.csv'}: not in UTF-8, from line 3: read as Windows-1252",)


ODD = {
    "nan": [float("nan"), 1],
    "large": [2**70, 1],
    "mixed": [1, "one"],
    "kinds": [[1], {"a": 1}],
    "half": ["\ud800 broken", "\u00fc"],
    "nested": [{"a": ["\ud800"]}, None],
    "empty": [{}, {}],
    "inner": [{"a": {}}, {"a": {}}],
    "none": [None, None],
    "keys": [{str(number): 1 for number in range(500)}, {}],
    "deep": [json.loads("[" * 300 + "]" * 300), []],
    "\ud800": [1, 2],
    "": [3, 4],
}


def test_what_no_table_holds_is_kept_as_text_and_written(tmp_path):
    (tmp_path / "sources").mkdir()
    rows = [{"image": f"{number}.jpg", **{name: values[number] for name, values in ODD.items()}} for number in (0, 1)]
    (tmp_path / "data.json").write_text(json.dumps(rows)[:-2] + ', "mixed": "twice"}]')
    records = records_of(str(tmp_path / "data.json"))
    found = pd.read_parquet(write_record_table(tmp_path, records, ["a", "b"], [None, None])).to_dict("list")
    assert found["large"] == [str(2**70), "1"]
    assert (found["mixed"], found["mixed_2"][1]) == (["1", "one"], "twice")
    assert found["half"] == ["\\ud800 broken", "\u00fc"]
    assert json.loads(found["nested"][0]) == {"a": ["\ud800"]}
    assert [json.loads(found[name][0]) for name in ("kinds", "empty", "inner")] == [[1], {}, {"a": {}}]
    assert (found["\\ud800"], found["unnamed"]) == ([1, 2], [3, 4])


def test_a_broken_character_is_noted_with_its_line_and_spoils_no_other(tmp_path):
    (tmp_path / "data.csv").write_bytes("image,cap\n1.jpg,gr\u00f6\u00dfe\n2.jpg,".encode() + b"gr\xc3 x\n")
    records = records_of(str(tmp_path / "data.csv"))
    assert records.columns["cap"].to_pylist() == ["gr\u00f6\u00dfe", "gr\ufffd x"]
    assert records.notes == (f"{tmp_path / 'data.csv'}: broken characters are read as \ufffd: 1, the first in line 3",)


def test_a_folder_made_for_datasets_is_read_with_its_splits(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    (tmp_path / "train/metadata.csv").write_text("file_name,text\n1.png,one\n")
    (tmp_path / "test/metadata.csv").write_text("file_name,text\nsub/2.png,two\n")
    (tmp_path / "test/labels.json").write_text("{}")
    records = records_of(str(tmp_path))
    assert records.images == (str(tmp_path / "test/sub/2.png"), str(tmp_path / "train/1.png"))
    assert records.columns["text"].to_pylist() == ["two", "one"]


TEXTS = {
    "misspelt.json": '[{"imag": "1.jpg", "question": "?"}]',
    "half.json": "[{",
    "pointer.json": "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 5\n",
    "noheader.csv": "1.jpg,one\n2.jpg,two\n",
    "two.json": '{"train": [{"image": "1"}], "test": [{"image": "2"}]}',
    "empty.json": "[]",
    "number.json": '[{"image": 7}]',
    "line.jsonl": '{"image": "1.jpg"}\n{"image"\n',
    "commas.jsonl": '{"image": "1.jpg"},\n{"image": "2.jpg"}\n',
    "saved/data-00000-of-00001.arrow": "",
    "saved/state.json": "{}",
    "comma.json": '[{"image": "1.jpg"},\n]',
    "cut.json": '[{"image": "1.jpg"}, {"image": "2.j',
    "cut.jsonl": '{"image": "1.jpg"}\n{"image": "2.j\n\n',
    "blank.json": " \n",
    "lists.json": "[[1], [2]]",
    "deep.json": "[" * 100000,
    "five.json": "5",
    "settings.json": '{"a": {"b": 1}, "c": []}',
    "ragged.csv": 'image,note\n1.jpg,"a\nb"\n\n2.jpg\n3.jpg,c\n',
    "open.csv": 'image,note\n1.jpg,a\n2.jpg,"b\n3.jpg,c\n',
    "void.csv": "\n\n",
    "header.csv": "image\n",
    "wide.csv": "image\n1.jpg,too,many\n",
    "no.parquet": "no parquet",
    "annotations.json": '[{"image": "1.jpg"}]',
    "no.csv.gz": "image\n",
    "list.txt": "1.jpg\n",
    "lvis.json": '{"images": [{"id": 1, "coco_url": "http://x/000000000001.jpg"}], "annotations": []}',
    "kinds/1.csv": "image\n",
    "kinds/2.json": "[]",
    "none/1.xml": "",
    "none/1.jpg": "",
}


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("misspelt.json", r"/misspelt.json: no column has a name such as .*image_column.*only 'imag', 'question'"),
        ("half.json", "/half.json: cannot be read as JSON"),
        ("two.json", "/two.json: .*several lists of records"),
        ("pointer.json", "pointer.json: .*a pointer of Git LFS"),
        ("noheader.csv", "noheader.csv: the first line has to name the columns; .*only '1.jpg', 'one'"),
        ("empty.json", "/empty.json: has no "),
        ("number.json", "/number.json: column 'image' holds int64, which are no files' names; write .*image_column"),
        ("line.jsonl", "/line.jsonl: .*line 2, column 9: the file ends inside of a value"),
        ("commas.jsonl", "/commas.jsonl: .*line 1, column 19: a comma after the record; remove it"),
        ("saved", "saved: no tables in it.*`to_parquet` of `datasets`"),
        ("comma.json", "/comma.json: .*line 2, column 1: a comma before the closing bracket; remove it"),
        ("cut.json", "/cut.json: .*line 1, column 32: the file ends inside of a value"),
        ("cut.jsonl", "/cut.jsonl: .*line 2, column 11: the file ends inside of a value"),
        ("blank.json", "/blank.json: .*the file is empty"),
        ("lists.json", "/lists.json: .*record 1 is a list, not an object"),
        ("deep.json", "/deep.json: nested too deeply"),
        ("five.json", "/five.json: .*has no records, nothing but a number"),
        ("settings.json", "/settings.json: .*has no records, but an object with 'a', 'c'"),
        ("wide.csv", "/wide.csv: cannot be read as CSV: line 2 has 3 values, the header has 1"),
        ("ragged.csv", "/ragged.csv: cannot be read as CSV: line 5 has 1 values, the header has 2"),
        ("open.csv", "/open.csv: cannot be read as CSV: the last record has a quote that is never closed"),
        ("void.csv", "/void.csv: .*the file is empty"),
        ("header.csv", "/header.csv: has no records"),
        ("no.parquet", "/no.parquet: cannot be read as PARQUET"),
        ("annotation.json", r"/annotation.json: no such file.*did you mean annotations\.json"),
        ("no.csv.gz", "/no.csv.gz: cannot be read as CSV"),
        ("list.txt", r"/list.txt: the suffix tells .*\.jsonl.*first line `image` is a \.csv"),
        ("lvis.json", "/lvis.json: no column has a name such as image.*only 'id', 'coco_url'"),
        ("*.tsv", r"\*.tsv: matches no table"),
        ("kinds", r"/kinds: tables of several kinds, 1 \.csv, 1 \.json; name the one, or a glob"),
        ("none/*", r"none/\*: matches no table .*only 1 \.jpg, 1 \.xml"),
        ("{misspelt,gone}.csv", "/misspelt.csv: no such file.*did you mean misspelt.json"),
        ("https://example.org/x.csv", "https://example.org/x.csv: tables are read from paths, not from addresses"),
        ("none", r"none: no tables in it, only 1 \.jpg, 1 \.xml.*write features.source.images"),
        ("~nosuchuser/x.csv", "/~nosuchuser/x.csv: no such file"),
    ],
)
def test_a_manifest_that_gives_no_records_is_named_with_what_is_wrong(tmp_path, monkeypatch, manifest, message):
    monkeypatch.chdir(tmp_path)
    for name, text in TEXTS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        records_of(manifest)
    with pytest.raises(InputError, match=r"has no column 'imag', only 'image'; did you mean image\?"):
        records_of("annotations.json", image_column="imag")
    with pytest.raises(InputError, match=r"gone: no such directory; correct features\.source\.root"):
        records_of("annotations.json", root="gone")


NAMES = st.sampled_from(
    ["image", "images", "path", "messages", "data", "columns", "annotations", "train", "id", "", "a.jpg"]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["1.jpg", "file:", "[", "~"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(NAMES | st.text(max_size=3), inner, max_size=4)
        | st.lists(st.dictionaries(NAMES, inner, max_size=3), max_size=3)
    ),
    max_leaves=12,
)
CELLS = st.text(st.sampled_from('ax1.,;\t|"\n\r \u00fc\x00[]{}\\'), max_size=40)
FILES = (
    VALUES.map(lambda value: json.dumps(value).encode())
    | st.lists(VALUES, max_size=3).map(lambda values: "\n".join(map(json.dumps, values)).encode())
    | CELLS.map(lambda text: b"image,a\n1.jpg,2\n" + text.encode())
    | CELLS.map(str.encode)
    | st.binary(max_size=60)
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(FILES, st.sampled_from([".json", ".jsonl", ".csv", ".tsv", ".csv.gz"])), min_size=1, max_size=2)
)
def test_whatever_a_manifest_holds_its_records_can_be_written_or_it_is_refused(files):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sources").mkdir()
        paths = [Path(folder) / f"{number}{suffix}" for number, (_, suffix) in enumerate(files)]
        for path, (data, _) in zip(paths, files, strict=True):
            path.write_bytes(data)
        try:
            records = records_of([str(path) for path in paths])
        except InputError as error:
            assert str(error).startswith(folder)
            return
        keys = [None] * len(records.images)
        table = pyarrow.parquet.read_table(write_record_table(Path(folder), records, keys, keys))
        assert len(table) == len(records.images) > 0
        assert table.num_columns == 4 + records.columns.num_columns
