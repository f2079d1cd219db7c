"""Ready features, in the forms that they are saved in."""

import json
import pickle
import zipfile
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lowrank_tune.config.schema import FeaturesSpec
from lowrank_tune.config.source import TensorSource
from lowrank_tune.errors import InputError
from lowrank_tune.features.commits import UnusableError
from lowrank_tune.features.extract import plan_extraction
from lowrank_tune.features.groups import listed_groups
from lowrank_tune.features.images import hash_files, read_bytes
from lowrank_tune.features.sources import read_records
from lowrank_tune.features.tensors import common_shape, load_tensor
from lowrank_tune.files import file_sha256

X_NTD = torch.randn(4, 6, 10, generator=torch.Generator().manual_seed(0))
X_HWD = torch.randn(2, 3, 3, 10, generator=torch.Generator().manual_seed(1))


def records_of(tensors):
    return read_records(TensorSource.model_validate({"tensors": tensors}), None, 0)


def tensors_of(tensors):
    """What a worker loads of each record."""
    records = records_of(tensors)
    shape = common_shape(records)
    return [load_tensor(read_bytes(image), shape) for image in records.images]


def save(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    match path.suffix:
        case ".npy":
            np.save(path, content)
        case ".npz":
            np.savez(path, **content)
        case ".safetensors":
            save_file(content, path)
        case _:
            torch.save(content, path)


def a_file_each(suffix, make):
    return {f"features_{number}{suffix}": make(x_TD) for number, x_TD in enumerate(X_NTD)}


def named(x_TD):
    return {"features": x_TD, "grid_thw": torch.tensor([1, 2, 3]), "image_id": "im1"}


FORMS = {
    "plain": a_file_each(".pt", lambda x_TD: x_TD),
    "batch of one": a_file_each(".pth", lambda x_TD: x_TD[None]),
    "grid of one": {f"{n}.bin": x_TD.reshape(1, 2, 3, 10) for n, x_TD in enumerate(X_NTD)},
    "gradient": a_file_each(".pt", lambda x_TD: torch.nn.Parameter(x_TD)),
    "strided": a_file_each(".PT", lambda x_TD: x_TD.T.contiguous().T),
    "dict": a_file_each(".pt", lambda x_TD: {"image_embeds": x_TD, "pooled": x_TD[0]}),
    "nested": a_file_each(".pt", lambda x_TD: {"out": OrderedDict(named(x_TD)), "n": 3}),
    "list": a_file_each(".pt", lambda x_TD: [x_TD]),
    "tuple": a_file_each(".pt", lambda x_TD: (x_TD, torch.tensor(3))),
    "NumPy": a_file_each(".npy", lambda x_TD: x_TD.numpy()),
    "big-endian": a_file_each(".npy", lambda x_TD: x_TD.numpy().astype(">f4")),
    "Fortran": a_file_each(".npy", lambda x_TD: np.asfortranarray(x_TD.numpy())),
    "npz": a_file_each(".npz", lambda x_TD: {"features": x_TD.numpy(), "ids": np.array(["a", "b"])}),
    "safetensors": a_file_each(".safetensors", lambda x_TD: {"features": x_TD}),
    "stack": {"all.pt": X_NTD},
    "batches": {"b0.npy": X_NTD[:3].numpy(), "b1.npy": X_NTD[3:].numpy()},
    "stack of Fortran": {"x.npy": np.asfortranarray(X_NTD.double().numpy())},
    "stack in a dict": {"x.pt": {"features": X_NTD[None], "labels": torch.arange(4)}},
    "stack in npz": {"x.npz": {"features": X_NTD.numpy(), "labels": np.arange(4)}},
    "stack of safetensors": {"x.safetensors": {"features": X_NTD}},
    "by number": {"x.pt": dict(enumerate(X_NTD))},
    "by list": {"x.pt": list(X_NTD)},
    "list of batches": {"x.pt": [X_NTD[:2], X_NTD[2:]]},
    "by name": {"x.safetensors": {f"img{number + 8}": x_TD.clone() for number, x_TD in enumerate(X_NTD)}},
    "by name in npz": {f"{k}.npz": {f"i{2 * k + n}": X_NTD[2 * k + n].numpy() for n in range(2)} for k in range(2)},
    "kinds": {"a0.pt": X_NTD[0], "a1.npy": X_NTD[1].numpy(), "a2.pth": X_NTD[2], "a3.safetensors": {"x": X_NTD[3]}},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_what_lies_in_files_is_found_in_order_to_the_last_bit(tmp_path, form):
    for name, content in FORMS[form].items():
        save(tmp_path / name, content)
    found = tensors_of(str(tmp_path))
    assert torch.equal(torch.stack(found).float(), X_NTD)
    assert not any(tensor.requires_grad for tensor in found)


def test_a_grid_is_one_image_and_says_so(tmp_path):
    for number, x_HWD in enumerate(X_HWD):
        save(tmp_path / "each" / f"{number}.pt", x_HWD)
    save(tmp_path / "all" / "x.npy", X_HWD.numpy())
    save(tmp_path / "one.pt", X_HWD[0])
    for folder in ("each", "all"):
        assert torch.equal(torch.stack(tensors_of(str(tmp_path / folder))), X_HWD.flatten(1, 2))
        (note,) = records_of(str(tmp_path / folder)).notes
        assert "each grid taken as tokens, row by row: 2 images" in note
    assert torch.equal(torch.stack(tensors_of(str(tmp_path / "one.pt"))), X_HWD[0]), "one image alone is no study"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2"])
def test_every_floating_dtype_is_read(tmp_path, dtype):
    x_NTD = X_NTD.to(getattr(torch, dtype))
    save(tmp_path / "a" / "x.pt", x_NTD)
    save(tmp_path / "b" / "x.safetensors", {"x": x_NTD})
    for folder in "ab":
        assert torch.equal(torch.stack(tensors_of(str(tmp_path / folder))).double(), x_NTD.double())
        assert records_of(str(tmp_path / folder)).columns["dtype"].to_pylist() == [dtype] * 4


def test_the_key_of_a_file_of_one_tensor_is_its_bytes_and_that_of_an_entry_its_tensor(tmp_path):
    save(tmp_path / "each" / "features_0.pt", X_NTD[0])
    save(tmp_path / "each" / "features_1.pt", {"x": X_NTD[1]})
    keys = hash_files(records_of(str(tmp_path / "each"))).keys
    assert keys == tuple(file_sha256(tmp_path / "each" / f"features_{n}.pt") for n in range(2))
    for name in ("stack in a dict", "stack in npz", "stack of safetensors", "by list", "stack"):
        for file, content in FORMS[name].items():
            save(tmp_path / name / file, content)
    entries = {hash_files(records_of(str(tmp_path / name))).keys for name in FORMS if (tmp_path / name).exists()}
    assert len(entries) == 1 and len(set(entries.pop())) == 4, "the same features, however they were saved"


def test_a_key_names_the_entry_to_take(tmp_path):
    for number, x_TD in enumerate(X_NTD):
        content = {"hidden": {"first": x_TD, "last": -x_TD}, "layers": [x_TD, 2 * x_TD], 7: x_TD[None]}
        save(tmp_path / f"{number}.pt", content)
    for key, factor in [("hidden.last", -1), ("hidden.first", 1), ("layers.1", 2), ("layers[1]", 2), (7, 1)]:
        assert torch.equal(torch.stack(tensors_of({"path": str(tmp_path), "key": key})), factor * X_NTD)
    save(tmp_path / "layers" / "a1.pt", (X_NTD[0], X_NTD[1]))
    save(tmp_path / "layers" / "a2.pt", (X_NTD[2], X_NTD[3]))
    assert torch.equal(torch.stack(tensors_of({"path": str(tmp_path / "layers"), "key": 1})), X_NTD[[1, 3]])
    with pytest.raises(InputError, match=r"holds 2 entries that may be the features, \(0\) \(float32"):
        common_shape(records_of(str(tmp_path / "layers")))
    keys = [
        hash_files(records_of({"path": str(tmp_path / "[0-9].pt"), "key": f"hidden.{name}"})).keys
        for name in ("first", "last")
    ]
    assert not set(keys[0]) & set(keys[1]), "another entry is another image"
    with pytest.raises(InputError, match=r'holds 5 entries .*7 \(float32 \[1, 6, 10\]\), hidden.first .*key: "7"'):
        common_shape(records_of(str(tmp_path / "*.pt")))
    with pytest.raises(InputError, match=r"no entry hiden, but .*hidden.last \(float32 \[6, 10\]\).*correct key"):
        common_shape(records_of({"path": str(tmp_path / "*.pt"), "key": "hiden"}))
    for number, x_NTD in enumerate((X_NTD[:3], X_NTD[3:])):
        save(tmp_path / f"dicts/b{number}.pt", [{"x": x_TD, "y": x_TD[:2], "z": -x_TD} for x_TD in x_NTD])
    with pytest.raises(InputError, match=r'holds 9 entries that may be .*key: "x"'):
        common_shape(records_of(str(tmp_path / "dicts")))
    assert torch.equal(torch.stack(tensors_of({"path": str(tmp_path / "dicts"), "key": "z"})), -X_NTD)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["features_10.pt", "features_9.pt", "features_100.pt"], ["features_9", "features_10", "features_100"]),
        (["b_2.pt", "a_10.pt"], ["b_2", "a_10"]),
        (["s1/f_1.pt", "s0/f_2.pt", "s0/f_0.pt"], ["f_0", "f_1", "f_2"]),
        (["s10/f_1.pt", "s9/f_2.pt", "s9/f_1.pt"], ["f_1", "f_2", "f_1"]),
        (["z.pt", "y10.pt", "y9.pt"], ["y9", "y10", "z"]),
        (["features_1.pt", "mean.pt", ".features_2.pt", "._features_3.pt", "__MACOSX/features_4.pt"], ["features_1"]),
        (["a.pt", "notes.txt", "labels.csv", ".git/x.pt"], ["a"]),
    ],
)  # fmt: skip
def test_files_are_ordered_by_their_numbers_or_else_by_name(tmp_path, names, expected):
    for name in names:
        save(tmp_path / name, X_NTD[0])
    records = records_of(str(tmp_path))
    assert [name.rpartition("/")[2].removesuffix(".pt") for name in records.columns["file"].to_pylist()] == expected


def test_records_have_number_folder_file_and_entry_to_group_by(tmp_path):
    for video, x_NTD in (("v1", X_NTD[:3]), ("v2", X_NTD[3:])):
        save(tmp_path / video / "frames_7.npy", x_NTD.numpy())
    (tmp_path / "v1" / "about.txt").write_text("")
    source = TensorSource(tensors=str(tmp_path))
    columns = read_records(source, None, 0).columns.to_pydict()
    assert columns["entry"] == ["[0]", "[1]", "[2]", None] and columns["number"] == [7] * 4
    assert columns["file"][-1] == "v2/frames_7.npy"
    assert listed_groups(source, "folder") == ["v1"] * 3 + ["v2"]
    assert read_records(source, None, 0).notes[0] == "left out: 1 .txt"


def test_files_globs_and_lists_are_sources_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, x_TD in enumerate(X_NTD):
        save(tmp_path / "[x]" / f"{number}.pt", x_TD)
        np.save(tmp_path / "[x]" / f"{number}.npy", x_TD)
    monkeypatch.chdir(tmp_path / "[x]")
    (tmp_path / "links" / "deep").mkdir(parents=True)
    for number in range(4):
        (tmp_path / "links" / "deep" / f"n{number}.pt").symlink_to(tmp_path / "[x]" / f"{number}.pt")
    for tensors in ("*.pt", ["0.pt", "[1-3].npy"], ["*.npy", "1.npy"], "{0,1,2,3}.pt", str(tmp_path / "links")):
        assert torch.equal(torch.stack(tensors_of(tensors)), X_NTD)
    with pytest.raises(InputError, match=r"holds \d twice, as \.\w+ and as \.\w+; choose one kind"):
        records_of(str(tmp_path))


Output = namedtuple("Output", "last_hidden_state")


class Harmful:
    def __reduce__(self):
        return open, ("harmed", "w")


def program(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/constants.pkl", "")


def text(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")


REFUSED = {
    "integers": (lambda path: save(path, (X_NTD[0] * 9).to(torch.int8)), r"holds int8 \[6, 10\], not floating.*float"),
    "complex": (lambda path: save(path, X_NTD[0] + 0j), r"complex64 \[6, 10\], not floating"),
    "vector": (lambda path: save(path, X_NTD[0, 0]), r"float32 \[10\], not floating \[tokens, dim\]"),
    "nothing": (lambda path: save(path, X_NTD[:, :0]), r"float32 \[4, 0, 10\]"),
    "sparse": (lambda path: save(path, torch.eye(6).to_sparse()), "a sparse or nested tensor"),
    "meta": (lambda path: save(path, torch.ones(6, 6, device="meta")), "without values"),
    "expanded": (lambda path: save(path, torch.ones(1).expand(10**6, 10**6)), "repeats its values"),
    "words": (lambda path: save(path, {"a": "b"}), "holds a dict, not one tensor"),
    "weights": (lambda path: save(path, torch.nn.GRU(3, 4).state_dict()), "holds 2 entries that may be the features"),
    "layers": (lambda path: save(path, {"a": X_NTD[0], "b": X_NTD[0, :3]}), r"2 entries .*b \(float32 \[3, 10\]\)"),
    "stacks": (lambda path: save(path, {"a": X_NTD, "b": X_NTD}), r"2 entries .*; name one of them"),
    "a class": (lambda path: save(path, Output(X_NTD[0])), "needs pickle for .*Output.*torch.save"),
    "a NumPy array": (lambda path: save(path, X_NTD[0].numpy()), r"needs pickle for a NumPy array.*np\.save"),
    "code": (lambda path: save(path, Harmful()), "needs pickle for .*open"),
    "pickled code": (lambda path: path.write_bytes(pickle.dumps(Harmful())), "needs pickle"),
    "old code": (lambda path: torch.save(Harmful(), path, _use_new_zipfile_serialization=False), "needs pickle"),
    "objects": (lambda path: np.save(path.with_suffix(""), np.array([{}, 1])) or path.with_suffix(".npy").rename(path),
                "an object array, which would have to be unpickled"),
    "an empty file": (lambda path: path.write_bytes(b""), "the file is empty"),
    "a pointer": (text, "git lfs pull"),
    "half": (lambda path: (save(path, X_NTD), path.write_bytes(path.read_bytes()[:700])), "cut short or damaged"),
    "a program": (program, "a TorchScript program"),
    "a page": (lambda path: path.write_text("<!DOCTYPE html>"), "no file of torch, NumPy or safetensors"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_features_says_what_it_is_and_nothing_in_it_is_executed(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    make, said = REFUSED[case]
    make(tmp_path / "x.pt")
    records = records_of(".")
    hash_files(records)
    with pytest.raises(InputError, match=f"features.source.tensors: none of the 1 files holds features:\n.*{said}"):
        common_shape(records)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ("~nosuchuser/x", "~nosuchuser/x: no such"),
        ("gone", r"gone: no such directory or file, .*; correct features\.source\.tensors"),
        (
            "empty",
            r"empty: no files of tensors in it, only 1 \.txt; correct .* \(\.pt, .* and \.safetensors are read\)",
        ),
        ("*.{pt,npy}", r"^\*\.{pt,npy}: matches no file of tensors from /"),
        ("empty/a.txt", "a.txt: is no file of tensors that can be read"),
        ("s3://bucket/x", "s3://bucket/x: files of tensors are read from paths, not from addresses"),
    ],
)
def test_a_place_without_tensors_is_named(tmp_path, monkeypatch, tensors, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("")
    with pytest.raises(InputError, match=said):
        records_of(tensors)


def test_other_shapes_are_counted_before_anything_is_imported(tmp_path):
    for number in range(20):
        save(tmp_path / f"{number}.pt", torch.ones(6 if number % 3 else 5, 10))
    (tmp_path / "4.pt").write_bytes(b"")
    records = records_of(str(tmp_path))
    spec = {"source": {"tensors": str(tmp_path)}, "max_quarantined": 0.3}
    with pytest.raises(InputError) as error:
        plan_extraction(FeaturesSpec.model_validate(spec), tmp_path, records)
    said = str(error.value).splitlines()
    assert "8 of 20 files" in said[0] and "features.max_quarantined = 0.3 allows 6" in said[0]
    assert said[1:4] == [
        f"  12 of [6, 10], such as {tmp_path}/1.pt",
        f"  7 of [5, 10], such as {tmp_path}/0.pt",
        f"  1 unusable, such as {tmp_path}/4.pt: the file is empty",
    ]
    job = plan_extraction(FeaturesSpec.model_validate(spec | {"max_quarantined": 0.4}), tmp_path, records)
    assert (job.identity["tokens"], job.identity["dim"]) == (6, 10)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for suffix in (".pt", ".npy", ".npz", ".safetensors"):
        x_NTD = X_NTD.numpy() if suffix.startswith(".n") else X_NTD
        save(folder / f"x{suffix}", {"x": x_NTD} if suffix in (".npz", ".safetensors") else x_NTD)
    torch.save(X_NTD, folder / "old.pth", _use_new_zipfile_serialization=False)
    return {path.suffix: path.read_bytes() for path in folder.iterdir()}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_give_records_or_a_reason(saved, tmp_path_factory, data):
    content = bytearray(data.draw(st.sampled_from(sorted(saved.values()))))
    for place in data.draw(st.lists(st.integers(0, min(len(content), 1200) - 1), max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))]
    path = tmp_path_factory.mktemp("damaged") / "x.pt"
    path.write_bytes(data.draw(st.binary(max_size=80)) if data.draw(st.booleans()) and not content else content)
    records = records_of(str(path))
    for image, key in zip(records.images, hash_files(records).keys, strict=True):
        try:
            load_tensor(read_bytes(image)) if key else None
        except UnusableError as error:
            assert str(error)


def test_a_study_file_names_tensors_in_every_form():
    for tensors in ("d", ["a", "b"], {"path": "d", "key": "x"}, {"path": ["a", "b"], "key": 3}):
        source = TensorSource.model_validate({"tensors": tensors})
        assert json.loads(json.dumps(source.model_dump()["tensors"])) in (tensors, {"path": ["a", "b"], "key": "3"})
    assert (source.paths, source.key) == (("a", "b"), "3")
