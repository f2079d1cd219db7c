"""What `render` writes is the study itself; what `schema` says is true of every study file."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from ruamel.yaml import YAML
from study_strategies import studies

from lowrank_tune.config.loading import load_study, parse_study
from lowrank_tune.config.render import render_study, study_schema
from lowrank_tune.config.schema import StudySpec

SCHEMA = study_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
STUDIES = sorted((Path(__file__).parents[2] / "studies").glob("*.yaml"))
SMALLEST = "name: a\nfeatures: {source: {samples: 12}}\nsearch: {space: {rank: 8, families: {sketch: }}}\n"


def plain(text: str) -> Any:
    return YAML(typ="safe", pure=True).load(text)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(studies())
def test_what_is_rendered_reads_back_as_the_same_study(spec: StudySpec) -> None:
    text = render_study(spec)
    assert parse_study(text, "rendered.yaml") == spec
    text.encode()
    VALIDATOR.validate(plain(text))


def test_every_default_is_filled_in_and_explained_and_an_absent_family_stays_absent() -> None:
    text = render_study(parse_study(SMALLEST, "study.yaml"))
    content = plain(text)
    assert list(content) == list(StudySpec.model_fields)
    assert content["search"]["trials"] == 20
    assert content["search"]["space"]["families"] == {"sketch": {}}
    assert content["tracking"] == {"uri": None, "experiment": None, "register_as": None}
    assert "uri: null" in text
    keys = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    comments = [line for line in text.splitlines() if line.lstrip().startswith("#")]
    assert len(comments) == len(keys)
    assert all(len(line) <= 120 for line in comments)
    spec = parse_study(SMALLEST, "study.yaml", ["features.source={tensors: cache}"])
    assert "encoder" not in plain(render_study(spec))["features"]


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_the_studies_that_ship_are_valid_and_the_schema_accepts_them(file: Path) -> None:
    load_study(file)
    VALIDATOR.validate(plain(file.read_text(encoding="utf-8")))


def test_the_schema_is_valid_and_describes_every_key() -> None:
    json.dumps(SCHEMA)
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    sections = [SCHEMA, *SCHEMA["$defs"].values()]
    assert all("description" in section for section in sections)
    keys = [key for section in sections for key in section["properties"].values()]
    assert all("description" in key or "$ref" in key for key in keys)


def test_the_schema_takes_a_family_with_nothing_after_it_and_refuses_no_family() -> None:
    assert VALIDATOR.is_valid(plain(SMALLEST))
    for right, wrong in [("{sketch: }", "{}"), ("sketch", "skecth"), ("rank: 8", 'rank: "8"')]:
        assert not VALIDATOR.is_valid(plain(SMALLEST.replace(right, wrong)))
    for axis in ("[8, 16]", "{int: [2, 9]}", "{nested: [2, 9]}"):
        assert VALIDATOR.is_valid(plain(SMALLEST.replace("8", axis)))
    for axis in ("[8, 8]", "{uniform: [2, 9]}", "{int: [2]}", "{int: [2, 9], nested: [2, 9]}", "0"):
        assert not VALIDATOR.is_valid(plain(SMALLEST.replace("8", axis)))
    assert "default" not in SCHEMA["$defs"]["FamiliesSpec"]["properties"]["direct"]
