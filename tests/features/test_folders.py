"""Folders, globs and lists of images, as they lie there; nothing is decoded."""

import os
import socket
from pathlib import Path

import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lowrank_tune.config.source import ImageSource
from lowrank_tune.errors import InputError, printable
from lowrank_tune.features.folders import find_images
from lowrank_tune.features.images import SourceRecords, hash_files, write_record_table


def found(images, root=None):
    """What is found below a folder, and the notes."""
    records = find_images(ImageSource(images=images))
    return [os.path.relpath(image, root or Path.cwd()) for image in records.images], records.notes


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def photos(here):
    make(
        here / "photos",
        "b.jpg",
        "a/2.PNG",
        "a/deep/1.webp",
        "notes.txt",
        "a/more.txt",
        "film.MP4",
        "raw.CR2",
        "LICENSE",
    )
    return here / "photos"


LEFT_OUT = "left out: 2 .txt, 1 .cr2, 1 .mp4, 1 without a suffix"
ALL = ["photos/a/2.PNG", "photos/a/deep/1.webp", "photos/b.jpg"]


@pytest.mark.parametrize(
    ("images", "names"),
    [
        ("photos", ALL),
        ("photos/", ALL),
        ("photos/**", ALL),
        ("./photos//**/*", ALL),
        ("photos/*", ["photos/b.jpg"]),
        ("photos/**/*.png", ["photos/a/2.PNG"]),
        ("photos/{b,c}.{JPG,png}", ["photos/b.jpg"]),
        ("photos/{b.jpg,a/*}", ["photos/a/2.PNG", "photos/b.jpg"]),
        ("photos/a/{000..012}.png", []),
        ("photos/a/{3..0}.png", ["photos/a/2.PNG"]),
        ("photos/**/{00000..99999,2,deep/1}.{png,webp}", ["photos/a/2.PNG", "photos/a/deep/1.webp"]),
        ("photos/{a,b}/{2,[ab]}.png", ["photos/a/2.PNG"]),
        ("photos/a/[12].png", ["photos/a/2.PNG"]),
        (["photos/*.jpg", "photos/a", "photos/a/2.PNG"], ["photos/b.jpg", "photos/a/2.PNG", "photos/a/deep/1.webp"]),
        ("photos/b.jpg", ["photos/b.jpg"]),
        ("photos\\a\\*.png", ["photos/a/2.PNG"]),
        ("photos/a/../*.jpg", ["photos/a/../b.jpg"]),
    ],
)
def test_directories_globs_braces_lists_and_files_name_images(photos, images, names):
    if not names:
        with pytest.raises(InputError, match="matches no image"):
            found(images)
        return
    records = find_images(ImageSource(images=images))
    assert [image.removeprefix(f"{photos.parent}/") for image in records.images] == names
    looked_at_all = {ALL[0], ALL[1], ALL[2]} == set(names) and isinstance(images, str)
    assert records.notes == ((LEFT_OUT,) if looked_at_all else records.notes)


def test_addresses_and_the_home_directory_are_understood(photos, monkeypatch):
    (photos.parent / "my photos").symlink_to(photos)
    assert len(found(f"file://{photos.parent}/my%20photos")[0]) == 3
    assert len(found(f"FILE://localhost{photos}/**/*.png")[0]) == 1
    monkeypatch.setenv("HOME", str(photos))
    assert found("~/*.jpg") == (["photos/b.jpg"], ())


def test_a_folder_whose_name_has_wildcards_is_meant_as_it_is_written(here, monkeypatch):
    make(here, "[raw] {a,b} *?/x.jpg", "[raw] {a,b} *?/[1].jpg", "r/y.jpg", "*/z.jpg", "q/z.png")
    assert len(found("[raw] {a,b} *?/*.jpg")[0]) == len(found("[raw] {a,b} *?")[0]) == 2
    assert found("[raw] {a,b} *?/[1].jpg")[0] == ["[raw] {a,b} *?/[1].jpg"]
    assert len(found("*/*")[0]) == 5, "a star alone is always a wildcard"
    make(here, "q/*.png", "q/{a,b}.jpg", "q/a.jpg")
    assert found("q/*.png")[0] == ["q/*.png", "q/z.png"]
    assert found("q/{a,b}.jpg")[0] == ["q/{a,b}.jpg"]
    monkeypatch.chdir(here / "[raw] {a,b} *?")
    assert found("*.jpg")[0] == ["[1].jpg", "x.jpg"]


def test_what_is_hidden_or_of_a_file_manager_is_taken_only_where_it_is_named(here):
    junk = [
        "._1.jpg", "__MACOSX/._1.jpg", "__MACOSX/1.jpg", ".ipynb_checkpoints/1.jpg", "@eaDir/1.jpg",
        ".Trash-1000/1.jpg", ".thumbnails/1.jpg", "$RECYCLE.BIN/1.jpg", "Thumbs.db",
        "sub/.hidden/1.jpg", "sub/desktop.ini",
    ]  # fmt: skip
    make(here / "in", "1.jpg", "sub/2.jpg", *junk)
    for images in ("in", "in/**/*.jpg", "in/**/*"):
        assert found(images) == (["in/1.jpg", "in/sub/2.jpg"], ()), images
    assert found("in/*/*.jpg")[0] == ["in/sub/2.jpg"]
    assert found("in/.thumbnails/*.jpg")[0] == ["in/.thumbnails/1.jpg"]
    assert found("in/**/.hidden/*")[0] == ["in/sub/.hidden/1.jpg"]
    assert found("in/__MACOSX")[0] == ["in/__MACOSX/1.jpg"]
    make(here / "only", ".a.jpg", ".b.jpg")
    with pytest.raises(InputError, match="only: no images in it, only 2 hidden or of a file manager"):
        found("only")


def test_links_are_followed_and_each_real_file_is_taken_once(here):
    make(here, "store/0.jpg", "store/deep/1.jpg", "in/2.jpg", "in/z/3.jpg")
    for link, target in [
        ("in/train", "../store"), ("in/a", "z"), ("in/0.jpg", "2.jpg"), ("in/z/up", ".."), ("in/gone.jpg", "nowhere"),
        ("in/self", "self"), ("store/deep/back", "../../in"),
    ]:  # fmt: skip
        os.symlink(target, here / link)
    expected = ["in/2.jpg", "in/train/0.jpg", "in/train/deep/1.jpg", "in/z/3.jpg"]
    notes = (
        "left out: 2 dead links",
        "1 link leads to images that are there already; each image is taken once",
    )
    assert found("in") == (expected, notes)
    assert found("in/**/*.jpg")[0] == expected


def test_what_is_no_file_is_never_opened(here):
    make(here, "in/1.jpg")
    (here / "in" / "folder.jpg").mkdir()
    os.mkfifo(here / "in" / "pipe.jpg")
    os.mkfifo(here / "in" / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("in/socket.png")
        assert found("in") == (["in/1.jpg"], ("left out: 3 no files",))
    with pytest.raises(InputError, match=r"in/pipe\.jpg: is no file that can be read"):
        found("in/pipe.jpg")
    assert hash_files(SourceRecords(("in/pipe.jpg", "/dev/zero", "in"), None)).unread == ("is no regular file",) * 3


def test_a_suffix_that_is_named_or_lacks_gives_way_to_the_content(here):
    make(here, "in/1.dat", "in/readme")
    for name, kind in [
        ("2.dat", "PNG"),
        ("3.dat", "TIFF"),
        ("4.jpeg~", "JPEG"),
        ("deadbeef", "WEBP"),
        ("5.nef", "TIFF"),
    ]:
        Image.new("RGB", (4, 4)).save(here / "in" / name, kind)
    assert found("in") == (["in/deadbeef"], ("left out: 3 .dat, 1 .jpeg~, 1 .nef, 1 without a suffix",))
    assert found("in/*.dat") == (["in/2.dat", "in/3.dat"], ("left out: 1 .dat",))
    assert found("in/4.jpeg~")[0] == ["in/4.jpeg~"]
    with pytest.raises(InputError, match=r"in/\*\.nef: matches no image .*only 1 \.nef"):
        found("in/*.nef")


SUFFIXES = (
    "jpg jpeg jfif jpe jp2 j2k png apng gif webp avif heic heif hif tif tiff bmp dib ppm pgm tga ico psd qoi mpo dds"
)

NO_SUFFIXES = "eps ps wmf emf pdf svg mpg h5 grib mp4 dng nef xcf docx"


def test_every_format_that_pillow_reads_is_an_image_and_no_other(here):
    make(here, *(f"in/1.{suffix}" for suffix in SUFFIXES.split()))
    make(here, *(f"no/1.{suffix}" for suffix in NO_SUFFIXES.split()))
    assert len(found("in")[0]) == len(SUFFIXES.split())
    with pytest.raises(InputError, match=r"no images in it, only 1 \.dng, .*2 of other kinds"):
        found("no")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("nowhere", r"^nowhere: no such directory or file, /.* has no nowhere; correct features\.source\.images$"),
        ("{a,b}" * 60, "too many names"),
        ("photos/{a,b}.png", r"^photos/\{a,b\}\.png: matches no image from /.*/photos; correct"),
        ("$HOME/x", r"^\$HOME/x: .* has no \$HOME; variables such as \$HOME are not filled in; correct"),
        ("empty", r"^empty: no images in it; correct features\.source\.images"),
        ("photos/*.tiff", r"^photos/\*\.tiff: matches no image from /.*/photos; correct"),
        ("photos/d*", r"^photos/d\*: matches directories only, such as /.*/photos/dir; end it with /\*\* for"),
        ("photos/*.txt", r"^photos/\*\.txt: matches no image from .*, only 1 \.txt; correct"),
        ("*.json", r"^\*\.json: matches no image from .*, only 1 \.json; for tables .*`manifest:`"),
        ("data.json", r"^data\.json: is no image; for a table .*`manifest:` instead of `images:`"),
        ("photos/x.txt", r"^photos/x\.txt: is no image"),
        (["photos/*.tiff", "photos", "gone"], r"^photos/\*\.tiff: matches .*\ngone: no such .*correct features"),
        ("https://example.org/photos", r"^https://example\.org/photos: images are read from paths, not from addresses"),
        ("s3://bucket/photos/", "^s3://bucket/photos/: images are read from paths"),
        ("photos/{0..99999999}.jpg", r"^\{0\.\.99999999\}\.jpg: too many names"),
    ],
)
def test_a_source_that_gives_no_image_is_named_with_what_lies_there(here, images, message):
    make(here, "photos/dir/1.jpg", "photos/x.txt", "photos/1.jpg", "data.json")
    (here / "empty").mkdir()
    with pytest.raises(InputError, match=message):
        found(images)


def test_a_folder_that_may_not_be_read_is_told_and_one_that_fails_is_an_error(here, monkeypatch):
    make(here, "in/1.jpg", "in/locked/2.jpg")
    real, problem = os.scandir, PermissionError(13, "Permission denied")

    class Failing:
        def __init__(self, path):
            self.entries = real(path)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.entries.close()

        def __iter__(self):
            yield next(self.entries)
            raise problem

    monkeypatch.setattr(os, "scandir", lambda path: Failing(path) if str(path).endswith("locked") else real(path))
    told = f"left out, for they cannot be read: {here}/in/locked (Permission denied)"
    assert found("in") == (["in/1.jpg"], (told,))
    problem = OSError(5, "Input/output error")
    with pytest.raises(InputError, match=r"in/locked: cannot be read to its end \(Input/output error\)"):
        found("in")


def test_names_of_every_kind_are_found_hashed_and_recorded(here):
    names = [
        "a b.jpg", "c#1%20?x=1.jpg", "g\nh.jpg", "i'j\".jpg", "\U0001f600.jpg", "u\u0308.jpg", "k" * 251 + ".jpg",
        "-rf.jpg", "l\\m.jpg", "~p.jpg", "$HOME.jpg", "trailing .jpg", " .jpg", "caf\udce9.jpg",
        "a::b[0].jpg", "\udcff/\udcfe.jpg",
    ]  # fmt: skip
    make(here, *(f"in/{name}" for name in names))
    for images in ("in", "in/**/*.jpg"):
        records = find_images(ImageSource(images=images))
        assert {os.path.relpath(image, here / "in") for image in records.images} == set(names)
    files = hash_files(records)
    assert set(files.unread) == {None}
    (here / "sources").mkdir()
    table = write_record_table(here, records, files.keys, files.unread)
    paths = pyarrow.parquet.read_table(table).column("path").to_pylist()
    assert f"{here}/in/caf\\xe9.jpg" in paths and f"{here}/in/\U0001f600.jpg" in paths
    assert str(InputError(records.images[0])).isprintable() or "\n" in records.images[0]
    assert found("in/\u00fc.jpg")[0] == ["in/u\u0308.jpg"], "a Mac's two characters are one"


NAMES = st.binary(min_size=1, max_size=40).filter(lambda name: not {0, 47} & {*name} and name not in (b".", b".."))


@given(names=st.lists(NAMES, min_size=1, max_size=6, unique=True), suffix=st.sampled_from([b".jpg", b".JPG", b""]))
def test_whatever_bytes_a_name_has_its_file_is_found_or_left_out(tmp_path_factory, names, suffix):
    folder = tmp_path_factory.mktemp("names")
    for name in names:
        (folder / os.fsdecode(name + suffix)).write_bytes(b"x")
    try:
        records = find_images(ImageSource(images=str(folder)))
        images, notes = records.images, records.notes
    except InputError as error:
        images, notes = (), (str(error),)
    assert all(Path(image).is_file() for image in images)
    " ".join(map(printable, (*images, *notes))).encode()
    if suffix:
        assert len(images) == sum(not name.startswith(b".") for name in names)
