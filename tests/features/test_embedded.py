import base64
import decimal
import gzip
import hashlib
import io
import json
import pickle
import tarfile
from datetime import datetime
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lowrank_tune.config.schema import FeaturesSpec
from lowrank_tune.errors import InputError
from lowrank_tune.features.decoding import decode_image, decode_shard
from lowrank_tune.features.embedded import decode_text, is_encoded, keep_text
from lowrank_tune.features.groups import listed_groups
from lowrank_tune.features.images import hash_files, read_bytes, read_unchanged, write_record_table
from lowrank_tune.features.shards import ShardPlan
from lowrank_tune.features.sources import read_records
from lowrank_tune.records import FeatureSet
from lowrank_tune.report.spatial import photograph

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
HUGGING_FACE = {
    b"huggingface": json.dumps(
        {"info": {"features": {"picture": {"_type": "Image"}, "note": {"dtype": "string", "_type": "Value"}}}}
    ).encode()
}


def picture(number, kind="JPEG"):
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (number * 20, 100, 255 - number * 20)).save(buffer, kind)
    return buffer.getvalue()


PICTURES = [picture(number) for number in range(4)]
TEXTS = [base64.b64encode(data).decode() for data in PICTURES]
TEXTS[1] = f"data:image/jpeg;base64,{TEXTS[1]}"
TEXTS[2] = "\n".join(TEXTS[2][start : start + 76] for start in range(0, len(TEXTS[2]), 76))
NAMES = [f"{number}.jpg" for number in range(4)]


def structs(inside=(0, 1, 2, 3)):
    return [{"bytes": PICTURES[n] if n in inside else None, "path": NAMES[n]} for n in range(4)]


def extension(storage):
    class Photo(pa.ExtensionType):
        def __init__(self):
            super().__init__(pa.binary(), "test.photo")

        def __arrow_ext_serialize__(self):
            return b""

        @classmethod
        def __arrow_ext_deserialize__(cls, storage_type, serialized):
            return cls()

    return pa.ExtensionArray.from_storage(Photo(), storage)


FIXED = max(map(len, PICTURES))
ARRAYS = {
    "paths": pa.array(NAMES),
    "large paths": pa.array(NAMES, pa.large_string()),
    "viewed paths": pa.array(NAMES, pa.string_view()),
    "dictionary of paths": pa.array(NAMES).dictionary_encode(),
    "bytes": pa.array(PICTURES),
    "large bytes": pa.array(PICTURES, pa.large_binary()),
    "viewed bytes": pa.array(PICTURES, pa.binary_view()),
    "fixed bytes": pa.array([data.ljust(FIXED, b"\0") for data in PICTURES], pa.binary(FIXED)),
    "dictionary of bytes": pa.array(PICTURES).dictionary_encode(),
    "extension": extension(pa.array(PICTURES)),
    "structs": pa.array(structs(), STRUCT),
    "structs of paths": pa.array(structs(inside=()), STRUCT),
    "structs of nothing but paths": pa.array(structs(inside=())),
    "mixed structs": pa.array(structs(inside=(1, 2)), STRUCT),
    "base64": pa.array(TEXTS),
    "base64 or paths": pa.array([TEXTS[0], NAMES[1], TEXTS[2], NAMES[3]]),
    "lists of paths": pa.array([[name] for name in NAMES]),
    "lists of bytes": pa.array([[data] for data in PICTURES], pa.large_list(pa.binary())),
    "lists of structs": pa.array([[struct] for struct in structs()], pa.list_(STRUCT)),
    "lists of mixed structs": pa.array([[struct] for struct in structs(inside=(0, 3))], pa.list_(STRUCT)),
    "lists of base64": pa.array([[text] for text in TEXTS]),
}


def records_of(path, **more):
    manifest = path if isinstance(path, list) else str(path)
    spec = FeaturesSpec.model_validate({"source": {"manifest": manifest, **more}})
    return read_records(spec.source, Path("unused"), 0)


@pytest.fixture
def folder(tmp_path):
    for name, data in zip(NAMES, PICTURES, strict=True):
        (tmp_path / name).write_bytes(data)
    return tmp_path


@pytest.mark.parametrize("kind", ARRAYS)
def test_every_kind_of_column_gives_its_images_and_the_users_columns(folder, kind):
    path = folder / "train.parquet"
    pq.write_table(pa.table({"id": range(4), "image": ARRAYS[kind]}), path, row_group_size=3)
    records = records_of(path)
    assert [read_bytes(image).rstrip(b"\0") for image in records.images] == [data.rstrip(b"\0") for data in PICTURES]
    if kind != "fixed bytes":
        assert hash_files(records).keys == tuple(hashlib.sha256(data).hexdigest() for data in PICTURES)
    assert records.columns["id"].to_pylist() == list(range(4))
    assert records.columns.nbytes < 1000  # places and names
    if kind in ("structs", "lists of structs"):
        assert [name[0] if "list" in kind else name for name in records.columns["image.path"].to_pylist()] == NAMES


def test_a_list_is_an_image_each_and_nothing_is_a_record_without_one(folder):
    path = folder / "train.parquet"
    lists = [structs()[:2], [], None, [None, structs()[3]]]
    table = pa.table({"images": pa.array(lists, pa.list_(STRUCT)), "id": ["a", "b", "c", "d"]})
    pq.write_table(table, path)
    records = records_of(path, image_column="images")
    assert records.columns["id"].to_pylist() == ["a", "a", "b", "c", "d"]
    places = [f"{path}::images[0][0]", f"{path}::images[0][1]", None, None, f"{path}::images[3][1]"]
    assert list(records.images) == places
    assert [read_bytes(image) for image in records.images if image] == [PICTURES[n] for n in (0, 1, 3)]
    pq.write_table(pa.table({"image": pa.array([PICTURES[0], None])}), path)
    assert records_of(path).images == (f"{path}::image[0]", None)


def test_a_published_table_needs_no_column_named_and_keeps_what_is_no_image(folder):
    path = folder / "train-00000-of-00001.parquet"
    others = {
        "note": pa.array(["a", "b", "c", "d"]).dictionary_encode(),
        "price": pa.array([decimal.Decimal("1.50")] * 4),
        "taken": pa.array([datetime(2026, 1, 2)] * 4, pa.timestamp("ms", "UTC")),
        "objects": [{"bbox": [[1, 2, 3, 4]], "category": [7]}] * 4,
        "digest": pa.array([b"x" * 16] * 4, pa.binary(16)),
        "small": pa.array([b"x"] * 4),
        "mask": pa.array(structs(), STRUCT),
        "path": ["theirs"] * 4,
        "view": pa.array(["v"] * 4, pa.string_view()),
    }
    table = pa.table({"picture": pa.array(structs(), STRUCT), **others})
    pq.write_table(table.replace_schema_metadata(HUGGING_FACE), path)
    records = records_of(path)
    assert records.images[2] == f"{path}::picture[2]"
    files = hash_files(records)
    written = write_record_table(folder, records, files.keys, [None] * 4)
    table = pq.read_table(written).to_pylist()[2]
    assert table["path"] == records.images[2]
    assert table["key"] == hashlib.sha256(PICTURES[2]).hexdigest()
    assert (table["picture.path"], table["source_path"], table["note"]) == ("2.jpg", "theirs", "c")
    assert (table["mask"], table["small"], table["digest"]) == (f"{path}::mask[2]", b"x", b"x" * 16)
    assert table["objects"] == {"bbox": [[1, 2, 3, 4]], "category": [7]}
    features = FeatureSet("", "", "", "", "float16", 1, 1, (), str(written), 0)
    assert photograph(features, table["key"]).getpixel((0, 0)) == Image.open(io.BytesIO(PICTURES[2])).getpixel((0, 0))
    assert len(pd.read_parquet(written)) == 4


@pytest.mark.parametrize(
    ("columns", "wanted", "message"),
    [
        ({"a": structs(), "b": structs()}, None, r"columns 'a', 'b' hold images; write which in .*image_column"),
        ({"a": structs()}, "aa", r"has no column 'aa', only 'a', 'a.path'; did you mean a\?"),
        ({"messages": [[{"content": structs()}]]}, None, r"'messages' holds images' bytes deep inside"),
        ({"image": [[7, 8]]}, "image", r"'image' holds list<.*int64>, which are no files' names"),
        ({"image": [[1.5]]}, "image", r"'image' holds list<.*double>, which names no image"),
    ],
)
def test_columns_without_images_are_refused(tmp_path, columns, wanted, message):
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    with pytest.raises(InputError, match=message):
        records_of(tmp_path / "t.parquet", **({"image_column": wanted} if wanted else {}))


def test_a_file_whose_name_looks_like_a_place_is_a_file(tmp_path):
    table = tmp_path / "a::b" / "t.parquet"
    table.parent.mkdir()
    pq.write_table(pa.table({"x[1]": PICTURES[:2], "image": PICTURES[2:]}), table)
    for name, data in (("x[1][0]", PICTURES[0]), ("image[1]", PICTURES[3])):
        assert read_bytes(f"{table}::{name}") == data
    alone = tmp_path / "u.parquet"
    table.rename(alone)
    Path(f"{alone}::image[1]").write_bytes(b"a file")
    assert read_bytes(f"{alone}::image[1]") == b"a file"
    assert read_bytes(f"{alone}::image[0]") == PICTURES[2]
    with pytest.raises(FileNotFoundError):
        read_bytes(f"{table}::image[0]")


def test_a_table_is_read_in_any_order_and_its_loss_or_change_is_told(tmp_path):
    path = tmp_path / "t.parquet"
    data = [bytes([number % 256]) * 20_000 for number in range(2000)]
    pq.write_table(pa.table({"image": data}), path, row_group_size=1500)
    for row in (0, 1999, 3, 1499, 1500, 700):
        assert read_bytes(f"{path}::image[{row}]") == data[row]
    key = hashlib.sha256(data[5]).hexdigest()
    pq.write_table(pa.table({"image": data[:5]}), path)
    with pytest.raises(InputError, match=r"t\.parquet::image\[5\].*; run again"):
        read_unchanged(f"{path}::image[5]", key)
    pq.write_table(pa.table({"image": data[6:]}), path)
    with pytest.raises(InputError, match=r"t\.parquet::image\[5\]: changed while"):
        read_unchanged(f"{path}::image[5]", key)
    pq.write_table(pa.table({"image": data[:6]}), path)
    assert read_unchanged(f"{path}::image[5]", key) == data[5]


def test_a_damaged_part_of_a_table_costs_its_own_records(tmp_path):
    path = tmp_path / "t.parquet"
    data = [hashlib.sha512(bytes([number])).digest() * 50 for number in range(30)]
    pq.write_table(pa.table({"image": data}), path, row_group_size=10, compression="zstd", use_dictionary=False)
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    with path.open("r+b") as file:
        file.seek(chunk.data_page_offset)
        file.write(b"\xff" * 60)
    files = hash_files(records_of(path))
    assert [key is None for key in files.keys] == [False] * 10 + [True] * 10 + [False] * 10
    assert all(files.unread[10:20])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"t\.parquet: cannot be read as PARQUET"):
        records_of(path)


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


SAMPLES = [
    ("a/0.1.jpg", PICTURES[0]),
    ("a/0.json", b'{"caption": "zero", "width": 32, "tags": ["x"]}'),
    ("a/0.txt", b"nil"),
    ("a/._0.jpg", b"resource fork"),
    ("b/0.left.png", picture(1, "PNG")),
    ("b/0.right.png", picture(2, "PNG")),
    ("b/0.cls", b"7"),
    ("PaxHeaders/0.jpg", b"x"),
    ("failed.json", b'{"caption": "gone"}'),
    ("b/0.npy", b"array"),
    ("README.md", b"no sample"),
    ("plain.webp", picture(3, "WEBP")),
]


def test_a_tars_samples_are_the_files_of_one_name(tmp_path):
    path = tmp_path / "00000.tar"
    write_tar(path, SAMPLES)
    records = records_of(path)
    places = [f"{path}::a/0.1.jpg", f"{path}::b/0.left.png", f"{path}::b/0.right.png", None, f"{path}::plain.webp"]
    assert list(records.images) == places
    rows = records.columns.to_pylist()
    assert [row["__key__"] for row in rows] == ["a/0", "b/0", "b/0", "failed", "plain"]
    assert {row["__url__"] for row in rows} == {str(path)}
    assert [row["caption"] for row in rows] == ["zero", None, None, "gone", None]
    assert [row["cls"] for row in rows] == [None, "7", "7", None, None]
    assert (rows[0]["txt"], rows[0]["width"], rows[0]["tags"]) == ("nil", 32, ["x"])
    assert records.notes == (f"{path}: left out: 1 .npy, 1 .md",)
    held = {f"{path}::{name}": hashlib.sha256(data).hexdigest() for name, data in SAMPLES}
    assert list(hash_files(records).keys) == [place and held[place] for place in places]
    assert decode_image(read_bytes(places[1]), 28).shape == (28, 28, 3)
    assert records_of(path, image_column="left.png").images == (None, places[1], None, None)
    assert records_of(path, image_column="png").images == (None, *places[1:3], None, None)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[: len(data) // 2], "cut short or damaged"),
        (lambda data: data[: data.index(b"b/0.cls")] + b"?" * 600, "cut short or damaged"),
        (lambda data: b"", "cut short or damaged"),
        (gzip.compress, r"compressed tar.*unpack it"),
    ],
)
def test_a_tar_that_is_no_whole_one_is_named(tmp_path, spoil, message):
    path = tmp_path / "00000.tar"
    write_tar(path, SAMPLES)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(InputError, match=rf"00000\.tar: .*{message}"):
        records_of(path)


def test_a_tar_of_images_alone_and_one_without(tmp_path):
    path = tmp_path / "t.tar"
    write_tar(path, [("./1.JPG", PICTURES[1]), ("1.jpg", PICTURES[2]), ("1.jpg", PICTURES[3])])
    records = records_of(path)
    assert [read_bytes(image) for image in records.images] == [PICTURES[1], PICTURES[3]]
    assert any("twice" in note for note in records.notes)
    write_tar(path, [("1.txt", b"x"), ("2.npy", b"x")])
    with pytest.raises(InputError, match=r"no images in it .*found 1 \.npy"):
        records_of(path)


def test_workers_decode_what_lies_in_tables_and_tars_and_quarantine_what_is_broken(tmp_path):
    pq.write_table(pa.table({"image": [*PICTURES[:2], PICTURES[2][:300]]}), tmp_path / "t.parquet")
    write_tar(tmp_path / "u.tar", SAMPLES[:1])
    records = records_of([str(tmp_path / "t.parquet"), str(tmp_path / "u.tar")])
    files = hash_files(records)
    plan = ShardPlan("s", tuple(files.images), tuple(files.images.values()))
    row = decode_shard({"plan": pickle.dumps(plan)}, 28, 10**9)
    keys, quarantined, problem = pickle.loads(row["decoded"])
    assert (keys, problem) == ([files.keys[0], files.keys[1]], None)
    assert row["pixels"].shape == (2, 28, 28, 3)
    assert [key for key, _ in quarantined] == [files.keys[2]]
    with pytest.raises(InputError, match=r"t\.parquet::image\[2\]: "):
        files.check(dict(quarantined), 0.1, "source", "limit")


@pytest.mark.parametrize("number", range(4))
def test_texts_are_told_from_paths_and_decoded(tmp_path, number):
    assert is_encoded(TEXTS[number])
    assert decode_text(TEXTS[number]) == PICTURES[number]
    path = keep_text(TEXTS[number], tmp_path)
    assert read_bytes(path) == PICTURES[number]
    assert keep_text(TEXTS[number], tmp_path) == path


def test_images_written_as_text_in_a_list_are_kept_beside_the_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chat = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": TEXTS[1]}}, {"type": "text"}]}]
    part = {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": TEXTS[0]}}
    files = {
        "a.jsonl": "\n".join(json.dumps({"id": n, "image": TEXTS[n]}) for n in range(4)),
        "b.json": json.dumps([{"image": [TEXTS[n], NAMES[n]], "id": n} for n in range(2)]),
        "c.json": json.dumps([{"messages": chat}]),
        "d.csv": "id,image\n" + "".join(f'{n},"{TEXTS[n]}"\n' for n in range(4)),
        "e.tsv": f"id\timage\n1\t{TEXTS[:2]}\n",
        "f.jsonl": json.dumps({"image": {"bytes": TEXTS[0], "path": NAMES[0]}}),
        "g.jsonl": json.dumps({"messages": [{"role": "user", "content": [part]}, {"role": "system", "content": "x"}]}),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        source = FeaturesSpec.model_validate({"source": {"manifest": name}}).source
        assert len(listed_groups(source, None)) == len(read_records(source, None, 0).images)
        assert not (tmp_path / "embedded").exists()
        records = read_records(source, tmp_path / "cache", 0)
        kept = [image for image in records.images if not image.endswith(".jpg")]
        cut = {"b": slice(2), "c": slice(1, 2), "e": slice(2), "f": slice(1), "g": slice(1)}.get(name[0], slice(4))
        assert [read_bytes(image) for image in kept] == PICTURES[cut]
        assert all(Path(image).is_relative_to(tmp_path / "cache") for image in kept)
        assert max(len(str(row)) for row in records.columns.to_pylist()) < 400


@pytest.mark.parametrize(
    "text",
    [
        "1.jpg",
        "a" * 60,
        "COCO_train2014_000000123456",
        "/9j/1.jpg",
        "/work/data/train/photos/000000001",
        "",
        "photos/" * 30,
    ],
)
def test_paths_are_no_images(text):
    assert not is_encoded(text)


def test_columns_of_one_name_and_tables_without_rows(tmp_path):
    path = tmp_path / "t.parquet"
    arrays = [pa.array(PICTURES[:2]), pa.array(["a", "b"]), pa.array(["c", "d"])]
    table = pa.Table.from_arrays(arrays, names=["image", "note", "note"])
    pq.write_table(table, path)
    assert [column.to_pylist() for column in records_of(path).columns.columns[1:]] == [["a", "b"], ["c", "d"]]
    pq.write_table(table.slice(0, 0), path)
    with pytest.raises(InputError, match="has no records"):
        records_of(path)
