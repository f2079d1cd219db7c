"""The golden files are studies with something wrong, each beside all that is said of it.

A comment `# --set key.path=value` in one of them is an override.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_tune.config.axes import DirectSpace, Range, SketchSpace
from lowrank_tune.config.loading import load_past_study, load_study, parse_study
from lowrank_tune.config.schema import StudySpec
from lowrank_tune.config.source import TensorSource
from lowrank_tune.errors import StudyFileError

GOLDEN = Path(__file__).parent / "golden"
VALID = """\
name: no
features: {source: {samples: 12}}
search:
  space:
    rank: 8
    lr: 1e-3
    families: {sketch: }
"""


def problems_of(file: Path) -> str:
    text = file.read_text(encoding="utf-8")
    overrides = [line.removeprefix("# --set ") for line in text.splitlines() if line.startswith("# --set ")]
    with pytest.raises(StudyFileError) as caught:
        parse_study(text, file.name, overrides)
    return str(caught.value) + "\n"


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_problem_is_told_with_its_place_and_remedy(file: Path) -> None:
    assert problems_of(file) == file.with_suffix(".txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("value", ['!!int ""', "!!int", "!!int +", "!!float", '!!float "_"', "!!bool"])
def test_a_tagged_value_that_is_no_number_is_told_as_such(value: str) -> None:
    with pytest.raises(StudyFileError, match="seed: not a number that can be read"):
        parse_study(VALID, "study.yaml", [f"seed={value}"])


def test_yaml_is_read_as_people_mean_it() -> None:
    spec = parse_study(VALID, "study.yaml")
    assert (spec.name, spec.search.space.lr, spec.search.trials) == ("no", 0.001, 20)


def test_a_study_file_is_checked_without_waiting_for_a_heavy_library() -> None:
    code = (
        "import sys, lowrank_tune.config.loading, lowrank_tune.config.plan, lowrank_tune.config.render;"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "pydantic" in loaded
    assert {"torch", "ray", "mlflow", "optuna", "matplotlib", "transformers", "pandas", "numpy"}.isdisjoint(loaded)


def test_a_family_with_nothing_after_it_has_its_defaults_and_an_absent_one_is_not_tried() -> None:
    sketch, direct = {"sketch": SketchSpace()}, {"direct": DirectSpace()}
    families = "search.space.families"
    for overrides, chosen in (
        ([], sketch), ([f"{families}.direct="], direct | sketch), ([f"{families}={{direct: {{}}}}"], direct)
    ):  # fmt: skip
        assert parse_study(VALID, "s", overrides).search.space.families.chosen() == chosen


@pytest.mark.parametrize(
    ("overrides", "path", "value"),
    [
        (["training.epochs=5"], "training.epochs", 5),
        (["training.epochs=5", "training.epochs=7"], "training.epochs", 7),
        (["search.space.lr={loguniform: [1e-4, 1e-2]}"], "search.space.lr", Range("loguniform", (1e-4, 1e-2))),
        (["search.space.rank=[4, 8]"], "search.space.rank", (4, 8)),
        (["features.source={tensors: cache}"], "features.source.tensors", "cache"),
        (['name="1e-3"'], "name", "1e-3"),
        (["tracking.uri=http://host:5000/?a=b"], "tracking.uri", "http://host:5000/?a=b"),
        (["training.epochs=2"], "scheduler.grace_epochs", 2),
    ],
)
def test_overrides_are_laid_over_the_file(overrides: list[str], path: str, value: Any) -> None:
    found: Any = parse_study(VALID, "study.yaml", overrides)
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value


def test_a_past_studys_key_that_was_let_go_is_passed_over_there_and_unknown_in_a_users_file(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(f"{VALID}resources: {{fuse: never, cpus_per_trial: 2}}\n", encoding="utf-8")
    assert load_past_study(file) == parse_study(VALID, "study.yaml", ["resources.cpus_per_trial=2"], begun=True)
    with pytest.raises(StudyFileError, match=r"resources.fuse: unknown key \(known here: cpus_per_trial"):
        load_study(file)


def test_samples_go_by_photograph_a_past_study_as_it_did_and_only_a_manifest_has_columns(tmp_path: Path) -> None:
    samples = ["features.source={samples: 96}"]
    assert parse_study(VALID, "study.yaml", samples).split.group_by == "photograph"
    assert parse_study(VALID, "study.yaml", [*samples, "split.group_by=null"]).split.group_by is None
    assert parse_study(VALID, "study.yaml", samples, begun=True).split.group_by is None
    manifest = ["features.source={manifest: data.csv}", "split.group_by=scene"]
    assert parse_study(VALID, "study.yaml", manifest).split.group_by == "scene"
    tensors = ["features.source={tensors: features}", "split.group_by=folder"]
    assert parse_study(VALID, "study.yaml", tensors).split.group_by == "folder"
    with pytest.raises(StudyFileError, match=r"split.group_by: .*only a manifest has columns to group by"):
        parse_study(VALID, "study.yaml", ["features.source={images: photos}", "split.group_by=scene"])
    with pytest.raises(StudyFileError, match=r"split.group_by: .*samples are grouped by photograph"):
        parse_study(VALID, "study.yaml", [*samples, "split.group_by=scene"])


def test_a_character_that_json_writes_as_two_halves_is_one(tmp_path: Path) -> None:
    spec = parse_study(VALID, "study.yaml", ["features.source=" + json.dumps({"tensors": "photos \U0001f600"})])
    assert spec.features.source == TensorSource(tensors="photos \U0001f600")


def test_patience_as_long_as_the_budget_is_allowed_and_a_given_grace_counts_for_asha_alone() -> None:
    overrides = ["training={epochs: 4, patience: 30}", "scheduler={kind: none, grace_epochs: 9}"]
    spec = parse_study(VALID, "study.yaml", overrides)
    assert (spec.training.patience, spec.scheduler.grace_epochs) == (30, 9)


def test_a_file_is_read_with_or_without_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    for encoding in ("utf-8", "utf-8-sig"):
        file.write_text(VALID.replace("\n", "\r\n"), encoding=encoding)
        assert load_study(file) == parse_study(VALID, "study.yaml")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"name: caf\xe9\n", ":1: not UTF-8 text"),
        ("name: x\n".encode("utf-16"), "not UTF-8"),
        (b"", ":1: empty"),
        (b"\x00" * 10, "cannot stand in YAML"),
        (b"# filler\n" * 20_000, "larger than 64 KiB"),
        (b"a: " + b"[" * 60_000, "levels of nesting"),
        (b"? " * 30_000, "levels of nesting"),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value[:9]),
)
def test_a_file_that_is_no_study_gets_one_clear_line(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "study.yaml"
    file.write_bytes(content)
    with pytest.raises(StudyFileError) as caught:
        load_study(file)
    (problem,) = caught.value.problems
    assert problem.startswith(str(file))
    assert said in problem


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing.yaml", "missing.yaml: no such file"),
        ("", "a directory"),
        ("nul\0", "cannot be"),
        ("x" * 300, "cannot be"),
    ],
)
def test_a_path_that_is_no_file_gets_one_clear_line(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(StudyFileError, match=said):
        load_study(tmp_path / name)


@settings(deadline=None, max_examples=60)
@given(st.text(alphabet=st.sampled_from(list("abn:-[]{}#&*!|>'\"%@`,? \n\t.1e~<")), max_size=60))
def test_whatever_is_written_the_answer_is_lines_and_never_a_traceback(text: str) -> None:
    try:
        parse_study(text, "study.yaml")
    except StudyFileError as error:
        assert all(problem.startswith("study.yaml:") and problem.isprintable() for problem in error.problems)


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=40), st.text(max_size=20))
def test_whatever_is_set_the_answer_is_lines_and_never_a_traceback(key: str, value: str) -> None:
    try:
        assert isinstance(parse_study(VALID, "study.yaml", [f"{key}={value}"]), StudySpec)
    except StudyFileError as error:
        assert all(problem.isprintable() for problem in error.problems)


def key_paths(content: Any, prefix: str = "") -> Iterator[str]:
    for key, value in content.items() if isinstance(content, dict) else ():
        yield f"{prefix}{key}"
        yield from key_paths(value, f"{prefix}{key}.")


KEYS = list(key_paths(parse_study(VALID, "study.yaml").model_dump()))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["int", "uniform", "loguniform", "samples", "sketch", "rank"]), inner)
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(KEYS), values)
def test_whatever_a_key_holds_the_answer_is_in_words_of_the_study_file(key: str, value: Any) -> None:
    override = f"{key}={json.dumps(value)}"
    try:
        assert isinstance(parse_study(VALID, "study.yaml", [override]), StudySpec)
    except StudyFileError as error:
        for problem in error.problems:
            assert "Input should be" not in problem
            # A problem repeats what was set, some characters of it escaped: look behind that, and before the value.
            said = problem.replace(override, "").partition(" (got ")[0]
            assert "<" not in (said.partition(f": {key}")[2] if "<" in override else said)
