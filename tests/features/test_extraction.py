"""Every kind of source through the real pipeline, on real Ray."""

import json
import os
import subprocess
import sys
import time

import pandas as pd
import pytest
import ray
import torch
from cachekit import snapshot
from PIL import Image
from safetensors.torch import load_file

from lowrank_tune.config.schema import FeaturesSpec
from lowrank_tune.errors import CacheError, InputError
from lowrank_tune.features.cache import open_cache, verify_cache
from lowrank_tune.features.checkpoint import find_tower, read_checkpoint_config
from lowrank_tune.features.decoding import decode_image
from lowrank_tune.features.encoder import Encoder
from lowrank_tune.features.extract import extract_features, probe_shape

pytestmark = pytest.mark.usefixtures("ray_cluster")

SIZE = 56
MANY = 70


def images_spec(source, **keys):
    encoder = {"checkpoint": "tiny-random", "image_size": SIZE, "compute_dtype": "float32", **keys.pop("encoder", {})}
    return FeaturesSpec.model_validate({"source": source, "encoder": encoder, **keys})


def stored(features, row):
    return load_file(f"{features.directory}/shards/{row.shard}")["features"][row.row]


def broken_files(folder):
    (folder / "text.jpg").write_text("Dear reader,")
    (folder / "empty.png").write_bytes(b"")
    Image.new("L", (20000, 10)).save(folder / "ribbon.png")
    whole = (folder / "photo-00.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    return {"text.jpg", "empty.png", "ribbon.png", "truncated.jpg"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, photographs):
    """Small photographs: more than one shard of them, a duplicate, a 1x1 image and four broken files."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(MANY):
        with Image.open(photographs[number % len(photographs)]) as image:
            image.convert("RGB").resize((90 + number, 80)).save(folder / f"photo-{number:02}.jpg")
    (folder / "sub").mkdir()
    (folder / "sub" / "again.jpg").write_bytes((folder / "photo-03.jpg").read_bytes())
    Image.new("RGB", (1, 1), "teal").save(folder / "one.png")
    broken_files(folder)
    (folder / "README.md").write_text("Photographs.")
    os.rename(folder / "photo-05.jpg", folder / "photo-05-caf\udce9.jpg")
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("results") / "features"


@pytest.fixture(scope="module")
def extracted(ray_cluster, root, folder):
    """The folder's features, what was told while they were made, and the notes."""
    told, notes = [], []
    spec = images_spec({"images": str(folder)}, max_quarantined=0.1)
    features = extract_features(
        spec, root, seed=0, on_progress=lambda done, total: told.append((done, total)), on_note=notes.append
    )
    return features, told, notes


def test_a_folder_becomes_a_sealed_cache_of_true_features(extracted, root, folder):
    features, told, notes = extracted
    assert notes.count("left out: 1 .md") == 1
    assert rf"{folder}/photo-05-caf\xe9.jpg" in pd.read_parquet(features.records_path).path.tolist()
    assert (features.tokens, features.dim) == (4, 256)
    assert probe_shape(images_spec({"images": str(folder)}), root, 0) == (4, 256)
    assert len(features.rows) == MANY + 1
    assert (features.encoder, features.weights, features.dtype) == ("tiny-random", "random", "float16")
    assert told[0] == (0, MANY + 5) and told[-1] == (MANY + 5, MANY + 5) and told == sorted(told)
    assert verify_cache(root / features.fingerprint, full=True) == []
    assert {row.key for row in open_cache(root / features.fingerprint).rows} == {row.key for row in features.rows}
    config = read_checkpoint_config("tiny-random", root)
    encoder = Encoder(config, find_tower(config, root), "float32")
    table = pd.read_parquet(features.records_path).set_index("key")
    for row in features.rows[::15]:
        path = table.loc[[row.key]].path.iloc[0]
        with open(path, "rb") as file:
            expected = encoder.encode(decode_image(file.read(), SIZE)[None])[0]
        torch.testing.assert_close(stored(features, row), expected.half(), rtol=2e-3, atol=2e-3)


def test_broken_files_are_quarantined_one_by_one_and_a_duplicate_shares_a_row(extracted, folder):
    features = extracted[0]
    table = pd.read_parquet(features.records_path)
    assert table.record.tolist() == list(range(MANY + 6))
    errors = {
        path.rsplit("/", 1)[1]: error
        for path, error in zip(table.path, table.error, strict=True)
        if isinstance(error, str)
    }
    assert set(errors) == {"text.jpg", "empty.png", "ribbon.png", "truncated.jpg"}
    assert "not an image" in errors["text.jpg"] and "truncated" in errors["truncated.jpg"]
    assert "aspect ratio 2000" in errors["ribbon.png"] and "empty" in errors["empty.png"]
    assert features.quarantined == 4
    keys = dict(zip(table.path, table.key, strict=True))
    assert keys[str(folder / "sub" / "again.jpg")] == keys[str(folder / "photo-03.jpg")]
    assert [row.key for row in features.rows] == list(dict.fromkeys(table.key[table.error.isna()]))


def test_a_manifest_of_cached_images_starts_nothing_and_keeps_its_columns(extracted, root, folder, tmp_path):
    """In a process without Ray, with torch and Ray Data forbidden: reading and hashing is all there is."""
    names = [f"photo-{number:02}.jpg" for number in (7, 3, 7, 60)]
    records = [{"image": name, "question": name[6:8], "boxes": [[1, 2], [3, 4]]} for name in names]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    spec = images_spec({"manifest": str(tmp_path / "data.jsonl"), "root": str(folder)})
    program = (
        "import sys, pathlib; sys.modules['torch'] = sys.modules['ray.data'] = None\n"
        "from lowrank_tune.features.extract import extract_features\n"
        "from lowrank_tune.config.schema import FeaturesSpec\n"
        "spec = FeaturesSpec.model_validate_json(sys.argv[1])\n"
        "features = extract_features(spec, pathlib.Path(sys.argv[2]), seed=0)\n"
        "features.write(pathlib.Path(sys.argv[3]))\n"
    )
    arguments = [spec.model_dump_json(), str(root), str(tmp_path / "features.json")]
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, env=dict(os.environ), timeout=120)
    features = type(extracted[0]).read(tmp_path / "features.json")
    assert len(features.rows) == 3
    assert set(features.rows) <= set(extracted[0].rows)
    table = pd.read_parquet(features.records_path)
    assert table.question.tolist() == ["07", "03", "07", "60"]
    assert table.key[0] == table.key[2]
    assert table.boxes[1][1].tolist() == [3, 4]


def test_interrupted_extended_and_uninterrupted_caches_are_the_same_bytes(extracted, root, folder, tmp_path):
    features = extracted[0]

    def interrupt(done, total):
        if done:
            raise KeyboardInterrupt

    spec = images_spec({"images": str(folder)}, max_quarantined=0.1)
    with pytest.raises(KeyboardInterrupt):
        extract_features(spec, tmp_path, seed=0, on_progress=interrupt)
    with pytest.raises(CacheError, match="not sealed"):
        open_cache(tmp_path / features.fingerprint)
    committed = len(list((tmp_path / features.fingerprint / "commits").iterdir()))
    assert committed >= 1
    told = []
    again = extract_features(spec, tmp_path, seed=0, on_progress=lambda done, total: told.append(done))
    assert again.rows == features.rows
    assert told[0] >= 11, "the smaller of the two shards"
    assert told[-1] == MANY + 5
    uninterrupted = snapshot(root / features.fingerprint)
    # The other tests of this room have recorded sources of their own in there.
    expected = {name: data for name, data in uninterrupted.items() if not name.startswith("sources/")}
    found = {name: data for name, data in snapshot(tmp_path / features.fingerprint).items() if "sources/" not in name}
    assert found == expected


def test_too_many_broken_images_stop_the_run_with_their_reasons(root, folder):
    with pytest.raises(InputError) as error:
        extract_features(images_spec({"images": str(folder / "[!pR]*")}, max_quarantined=0.5), root, seed=0)
    message = str(error.value)
    assert "5 of 5 files" not in message
    assert "4 of 5 files cannot be used, features.max_quarantined = 0.5 allows 2" in message
    assert f"{folder / 'text.jpg'}: not an image" in message


def test_missing_files_of_a_manifest_count_as_broken(root, folder, tmp_path):
    (tmp_path / "data.csv").write_text("image,answer\nphoto-01.jpg,1\ngone.jpg,2\n,3\n")
    source = {"manifest": str(tmp_path / "data.csv"), "root": str(folder)}
    with pytest.raises(InputError, match=r"2 of 3 files(.|\n)*gone\.jpg: No such file(.|\n)*names no file"):
        extract_features(images_spec(source), root, seed=0)
    features = extract_features(images_spec(source, max_quarantined=0.7), root, seed=0)
    assert (len(features.rows), features.quarantined) == (1, 2)


def test_samples_of_the_same_encoder_extend_the_cache(extracted, root):
    before = snapshot(root / extracted[0].fingerprint / "shards")
    features = extract_features(images_spec({"samples": 6}), root, seed=3)
    assert features.fingerprint == extracted[0].fingerprint
    assert len(features.rows) == 6
    assert before.items() < snapshot(root / features.fingerprint / "shards").items()
    assert verify_cache(root / features.fingerprint) == []


def tensors_spec(folder, **keys):
    return FeaturesSpec.model_validate({"source": {"tensors": str(folder)}, **keys})


def test_ready_tensors_are_imported_in_numeric_order_and_unusable_ones_quarantined_with_their_reasons(tmp_path):
    folder, root = tmp_path / "feature_cache_real", tmp_path / "features"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    contents = [torch.randn(6, 10, generator=generator) for _ in range(13)]
    spoilt = {
        1: (torch.zeros(6, 10).fill_(float("nan")), "NaN"),
        2: (torch.zeros(5, 10), "float32 [5, 10]; most files have [6, 10]"),
        3: (torch.full((6, 10), 1e6), "1e+06 does not fit float16; set features.store_dtype"),
        4: ({"features": "none"}, "a dict, not one tensor"),
        5: (pd.DataFrame({"a": [1]}), "needs pickle"),
        6: (torch.zeros(6, 10, dtype=torch.int64), "int64 [6, 10], not floating"),
        12: (
            torch.eye(6, 10).to_sparse(),
            "a sparse or nested tensor, not a dense one; save it again as [tokens, dim]",
        ),
    }
    for number, tensor in enumerate(contents):
        torch.save(spoilt[number][0] if number in spoilt else tensor, folder / f"features_{number}.pt")
    (folder / "features_7.pt").write_bytes(b"")
    spec = tensors_spec(folder, max_quarantined=0.7)
    assert probe_shape(spec, root, 0) == (6, 10)
    features = extract_features(spec, root, seed=0)
    assert (features.tokens, features.dim, features.weights) == (6, 10, "unknown")
    for number, row in zip((0, 8, 9, 10, 11), features.rows, strict=True):
        assert torch.equal(stored(features, row), contents[number].half())
    table = pd.read_parquet(features.records_path)
    assert table.number.tolist() == list(range(13))
    for number, (_, reason) in spoilt.items():
        assert reason in table.error[number]
    assert table.error[7] == "the file is empty"
    assert verify_cache(root / features.fingerprint) == []
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == 2, "its workers are gone"


def test_a_folder_of_tensors_without_a_usable_one_says_why(tmp_path):
    torch.save(pd.DataFrame({"a": [1]}), tmp_path / "features_0.pt")
    with pytest.raises(InputError, match=r"none of the 1 files holds features(.|\n)*features_0.pt: needs pickle"):
        extract_features(tensors_spec(tmp_path), tmp_path / "features", seed=0)
