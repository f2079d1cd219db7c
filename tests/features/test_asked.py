import json
from pathlib import Path

import pytest

from lowrank_tune.config.fidelity import FidelitySpec
from lowrank_tune.config.source import ManifestSource
from lowrank_tune.errors import InputError
from lowrank_tune.features.asked import Asked, check_questions, image_questions
from lowrank_tune.features.images import write_record_table
from lowrank_tune.features.sources import read_records
from lowrank_tune.records import FeatureRow, FeatureSet

RECORDS = [
    {"image": "1.png", "question": "What brand?", "answers": ["cola", "Cola "], "record": "a", "size": 3},
    {"image": "2.png", "question": "  ", "answers": ["nothing"], "record": "b", "size": 3},
    {"image": "1.png", "question": "<image>\nWhich year?", "answers": [], "record": "c", "size": 3},
    {"image": "1.png", "question": " What brand? ", "answers": ["pepsi"], "record": "d", "size": 3},
    {"image": "2.png", "question": "<|image_pad|>", "answers": ["a"], "record": "f", "size": 3},
    {"image": "2.png", "question": ["What?"], "answers": ["a"], "record": "g", "size": 3},
    {"image": "3.png", "question": None, "answers": None, "record": "e", "size": 3},
]


@pytest.fixture
def features(tmp_path: Path) -> FeatureSet:
    """The records of three images, as a cache keeps them; that of the third is not there."""
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    records = read_records(source(tmp_path), tmp_path, 0)
    keys = [Path(str(place)).stem for place in records.images]
    table = write_record_table(tmp_path, records, keys, [None] * len(keys))
    rows = tuple(FeatureRow(key, "shard", 0) for key in ("1", "2"))
    return FeatureSet(str(tmp_path), "", "tower", "random", "float16", 4, 8, rows, str(table))


def source(folder: Path) -> ManifestSource:
    return ManifestSource(manifest=str(folder / "data.jsonl"))


def test_each_image_has_its_questions_once_and_blanks_are_counted(features: FeatureSet) -> None:
    found = image_questions(features, FidelitySpec(questions="question", answers="answers"))
    assert found.by_image == {"1": (Asked("What brand?", ("cola", "Cola")), Asked("Which year?"))}
    assert found.blank == 3


def test_one_question_is_asked_of_every_image(features: FeatureSet) -> None:
    found = image_questions(features, FidelitySpec(questions="What is this?"))
    assert found.by_image == {key: (Asked("What is this?"),) for key in ("1", "2")}
    assert found.blank == 0


def test_a_users_column_with_a_taken_name_is_found(features: FeatureSet, tmp_path: Path) -> None:
    named = FidelitySpec(questions="record")
    check_questions(source(tmp_path), named)
    assert [asked.question for asked in image_questions(features, named).by_image["1"]] == ["a", "c", "d"]


@pytest.mark.parametrize(
    ("value", "answers"),
    [
        ("red", ("red",)),
        ("['red', 'blue']", ("red", "blue")),
        ([{"answer": "yes", "answer_id": 1}, {"answer": "no", "answer_id": 2}], ("yes", "no")),
        (7, ("7",)),
        ([3.0, 0.5, float("nan")], ("3", "0.5")),
    ],
)
def test_answers_are_read_as_data_sets_write_them(tmp_path: Path, value: object, answers: tuple[str, ...]) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps({"image": "1.png", "right": value}))
    records = read_records(source(tmp_path), tmp_path, 0)
    table = write_record_table(tmp_path, records, ["1"], [None])
    rows = (FeatureRow("1", "shard", 0),)
    features = FeatureSet(str(tmp_path), "", "tower", "random", "float16", 4, 8, rows, str(table))
    found = image_questions(features, FidelitySpec(questions="What is it?", answers="right"))
    assert found.by_image == {"1": (Asked("What is it?", answers),)}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"questions": "qestion"}, "fidelity.questions: .* no column 'qestion', only .*; did you mean question?"),
        ({"questions": "size"}, "fidelity.questions: column 'size' holds int64, and not one text"),
        ({"questions": "question", "answers": "anwers"}, "fidelity.answers: .* did you mean answers?"),
    ],
)
def test_a_column_that_is_not_there_is_told_before_anything_runs(
    features: FeatureSet, tmp_path: Path, keys: dict[str, str], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        check_questions(source(tmp_path), FidelitySpec.model_validate(keys))
