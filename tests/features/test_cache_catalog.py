import os
import subprocess
import threading

import pytest
from cachekit import IDENTITY, KEYS, snapshot

from lowrank_tune.config.schema import FeaturesSpec
from lowrank_tune.errors import InputError
from lowrank_tune.features.cache import differences, fingerprint, image_identity, open_cache, recover, seal
from lowrank_tune.features.checkpoint import read_checkpoint_config
from lowrank_tune.features.remote import (
    cache_row,
    describe_cache,
    find_cache,
    list_caches,
    nearest_cache,
    only_writer,
    remove_cache,
)


@pytest.fixture
def identity(tmp_path):
    """What a real extraction of images depends on."""
    spec = FeaturesSpec.model_validate({"source": {"samples": 9}, "encoder": {"checkpoint": "tiny-random"}})
    return image_identity(spec, read_checkpoint_config("tiny-random", tmp_path), "0123abcd")


def changes(identity, path=()):
    """The identity with each of its fields changed, one at a time."""
    for name, value in identity.items():
        if isinstance(value, dict):
            for field, changed in changes(value, (*path, name)):
                yield field, {**identity, name: changed}
        else:
            yield ".".join((*path, name)), {**identity, name: "another"}


def test_a_change_of_any_field_is_another_cache_and_names_the_field(identity):
    fields = set()
    for field, changed in changes(identity):
        assert fingerprint(changed) != fingerprint(identity)
        (text,) = differences(changed, identity)
        assert text.startswith(f"{field}: expected 'another', found ")
        fields.add(field)
    assert fields >= {
        "kind", "forward", "weights", "vision.depth", "vision.fullatt_block_indexes", "vision.window_size",
        "preprocessing.image_mean", "preprocessing.image_std", "image_size", "compute_dtype", "store_dtype",
        "tokens", "dim",
    }  # fmt: skip


def test_fields_that_only_one_side_has_are_named_too(identity):
    without = {name: value for name, value in identity.items() if name != "forward"}
    assert differences(identity, without) == [f"forward: expected {identity['forward']}, found None"]


def test_caches_are_listed_found_and_shown_on_a_disk_and_on_a_store(cache, bucket):
    results = cache.parent.parent
    (cache.parent / "samples").mkdir()
    unsealed = cache.parent / "0123456789abcdef"
    (unsealed / "commits").mkdir(parents=True)
    (unsealed / "commits" / "a.json").write_text("{}")
    for place in (str(results), results.as_uri(), bucket.put(results, "results")):
        first, second = list_caches(place)
        assert cache_row(second) == {
            "fingerprint": cache.name,
            "images": len(KEYS) - 1,
            "shape": [3, 5],
            "dtype": "float16",
            "bytes": sum(path.stat().st_size for path in (cache / "shards").iterdir()),
            "weights": "unknown",
            "encoder": "imported tensors",
        }
        assert "is not sealed" in cache_row(first)["encoder"]
        assert find_cache(place, cache.name[:5]) == find_cache(None, second) == second
        shown = describe_cache(second)
        assert (shown["quarantined"], shown["shards"], shown["identity"]) == (1, 3, IDENTITY)
        with pytest.raises(InputError, match=f"feature cache ffff: not in .*caches: 0123456789abcdef, {cache.name}"):
            find_cache(place, "ffff")
    with pytest.raises(InputError, match="is no feature cache"):
        find_cache(None, str(results))


def test_a_read_only_results_directory_is_looked_at_all_the_same(tmp_path):
    assert list_caches(tmp_path / "nowhere") == []
    assert not (tmp_path / "nowhere").exists()


def test_the_nearest_cache_is_the_one_that_differs_least(tmp_path):
    for change in ({"dim": 6}, {"dim": 7, "tokens": 4}, {"kind": "images"}):
        identity = {**IDENTITY, **change}
        recover(tmp_path / fingerprint(identity), identity)
        seal(tmp_path / fingerprint(identity), identity, "imported tensors", "unknown")
    name, differ = nearest_cache(tmp_path, IDENTITY)
    assert name == fingerprint({**IDENTITY, "dim": 6})
    assert differ == ["dim: expected 5, found 6"]
    assert nearest_cache(tmp_path / "nowhere", IDENTITY) == ("", [])


def test_removing_a_cache_removes_it_and_nothing_else(cache):
    neighbour = cache.parent / "0123456789abcdef"
    (neighbour / "shards").mkdir(parents=True)
    (neighbour / "shards" / "a").write_text("a")
    (cache.parent.parent / "mlflow.db").write_text("b")
    before = snapshot(cache.parent.parent)
    size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    assert remove_cache(str(cache)) == size
    after = snapshot(cache.parent.parent)
    kept = {name: data for name, data in before.items() if not name.startswith(f"features/{cache.name}/")}
    assert {name: data for name, data in after.items() if not name.endswith(".lock")} == kept


def test_a_cache_in_use_by_an_extraction_is_not_removed(cache):
    entered, leave = threading.Event(), threading.Event()

    def extract():
        with only_writer(cache):
            entered.set()
            leave.wait(30)

    other = threading.Thread(target=extract)
    other.start()
    assert entered.wait(30)
    before = snapshot(cache)
    try:
        with pytest.raises(InputError, match="an extraction is writing into it"):
            remove_cache(str(cache))
    finally:
        leave.set()
        other.join()
    assert snapshot(cache) == before
    remove_cache(str(cache))
    assert not cache.exists()


def test_a_cache_is_removed_by_its_file_address_too(cache):
    remove_cache(cache.as_uri())
    assert not cache.exists()


def test_a_cache_that_cannot_be_removed_is_named_and_stays(cache):
    disk = str(cache.parent)
    if subprocess.run(["mount", "--bind", "-o", "ro", disk, disk], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        with pytest.raises(InputError, match=rf"{cache.name}: cannot be removed \(Read-only file system\)"):
            remove_cache(str(cache))
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    assert len(open_cache(cache).rows) == len(KEYS) - 1


def test_what_is_no_cache_of_this_machine_is_left_alone(cache, tmp_path):
    with pytest.raises(InputError, match="is no feature cache, and is left alone"):
        remove_cache(str(cache.parent))
    with pytest.raises(InputError, match="only local caches"):
        remove_cache(f"s3://bucket/features/{cache.name}")
    link = tmp_path / cache.name
    os.symlink(cache, link)
    with pytest.raises(InputError, match="is a link"):
        remove_cache(str(link))
    assert (cache / "manifest.json").exists()
