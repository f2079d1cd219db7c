from collections import namedtuple
from pathlib import Path

import pytest

from lowrank_tune.errors import InputError
from lowrank_tune.features.cache import Folder, join, on_network_mount

mount = namedtuple("mount", "mountpoint fstype")


def test_a_path_and_its_address_are_the_same_folder(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a").write_bytes(b"12")
    for folder in (Folder.at(tmp_path), Folder.at(tmp_path.as_uri()), Folder.at(f"{tmp_path}/")):
        assert folder.last == tmp_path.name
        assert (folder.files(), folder.folders(), folder.bytes()) == (["a"], ["inner"], 2)
        assert (folder.read("a"), folder.size("a"), folder.exists()) == (b"12", 2, True)
        gone = folder / "gone"
        assert (gone.files(), gone.folders(), gone.exists()) == ([], [], False)
        for missing in (folder.size, folder.read):
            with pytest.raises(FileNotFoundError, match="b$|b'"):
                missing("b")


def test_names_show_neither_credentials_nor_queries():
    folder = Folder.at("s3://someone:s3cret@bucket/results/?endpoint_override=127.0.0.1%3A9&region=us-east-1")
    assert (folder.name, (folder / "features").name) == ("s3://bucket/results", "s3://bucket/results/features")


def test_an_unknown_kind_of_address_is_refused():
    with pytest.raises(InputError, match="nosuch://place: no place to read from"):
        Folder.at("nosuch://place")


def test_joining_keeps_a_query_at_the_end():
    assert join("/data/results", "features") == "/data/results/features"
    assert join("s3://bucket/results/?region=x", "features") == "s3://bucket/results/features?region=x"


@pytest.mark.parametrize(
    ("path", "remote"),
    [
        ("/data/results", False),
        ("/mnt/results", True),
        ("/mnt/fast/results", False),
        ("/mnt/bucket/results", True),
        ("/mnt2/results", False),
        ("/twice/results", True),
    ],
)
def test_network_mounts_are_told_by_the_deepest_and_latest_mount(path, remote):
    mounts = [mount("/", "ext4"), mount("/mnt", "nfs4"), mount("/mnt/fast", "xfs"), mount("/mnt/bucket", "fuse.s3fs")]
    mounts += [mount("/twice", "tmpfs"), mount("/twice", "cifs")]
    assert on_network_mount(path, mounts) is remote


def test_a_link_onto_a_network_mount_lies_there(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "near").symlink_to(tmp_path / "far")
    real = Path(tmp_path).resolve()
    mounts = [mount("/", "ext4"), mount(str(real / "far"), "nfs")]
    assert on_network_mount(str(tmp_path / "near" / "x"), mounts)


def test_this_machines_temporary_folder_is_local(tmp_path):
    assert not Folder.at(tmp_path).is_remote
