import gzip
import json
from pathlib import Path

import pandas as pd
import pytest

from lowrank_tune.config.schema import ManifestSource
from lowrank_tune.errors import InputError
from lowrank_tune.features.images import write_record_table
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
    for manifest in ("set", "set/**/*.csv", ["set/a", "set/b/2.csv", "set"]):
        records = records_of(manifest)
        assert records.images == (str(tmp_path / "set/a/1.jpg"), str(tmp_path / "set/b/2.jpg")), manifest
        assert records.columns.to_pydict()["score"] == ["1", "two"]
        assert records.columns.to_pydict()["only"] == [None, "x"]
    assert [Path(image).name for image in records_of(["set[1].tsv", "lines.jsonl.gz"]).images] == ["3.jpg", "4.jpg"]
    (tmp_path / "set/metadata.jsonl").write_text('{"image": "5.jpg"}')
    assert [Path(image).name for image in records_of("set").images] == ["5.jpg"], "as `datasets` reads an imagefolder"


TEXTS = {
    "misspelt.json": '[{"imag": "1.jpg", "question": "?"}]',
    "half.json": "[{",
    "two.json": '{"train": [{"image": "1"}], "test": [{"image": "2"}]}',
    "empty.json": "[]",
    "number.json": '[{"image": 7}]',
    "line.jsonl": '{"image": "1.jpg"}\n{"image"\n',
    "wide.csv": "image\n1.jpg,too,many\n",
    "no.parquet": "no parquet",
    "annotations.json": '[{"image": "1.jpg"}]',
    "no.csv.gz": "image\n",
    "list.txt": "1.jpg\n",
    "kinds/1.csv": "image\n",
    "kinds/2.json": "[]",
    "none/1.xml": "",
}


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("misspelt.json", r"/misspelt.json: has no column 'image', .*did you mean imag\?"),
        ("half.json", "/half.json: cannot be read as JSON"),
        ("two.json", "/two.json: .*2 lists of records"),
        ("empty.json", "/empty.json: has no "),
        ("number.json", "/number.json: column 'image' holds int64, not paths"),
        ("line.jsonl", "/line.jsonl: .*line 2"),
        ("wide.csv", "/wide.csv: cannot be read as CSV"),
        ("no.parquet", "/no.parquet: cannot be read as PARQUET"),
        ("annotation.json", r"/annotation.json: no such file.*did you mean annotations\.json"),
        ("no.csv.gz", "/no.csv.gz: cannot be read as CSV"),
        ("list.txt", r"/list.txt: the suffix tells .*\.jsonl"),
        ("*.tsv", r"\*.tsv: matches no file"),
        ("kinds", r"/kinds: tables of several kinds, 1 \.csv, 1 \.json; name the one, or a glob"),
        ("none", r"/none: no tables in it .*found 1 \.xml"),
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
    with pytest.raises(InputError, match=r"gone: no such directory; correct features\.source\.root"):
        records_of("annotations.json", root="gone")
