"""A study file, and the `--set` values laid over it -> StudySpec, or every problem at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lowrank_tune.errors import StudyFileError
from lowrank_tune.spec.document import (
    Document,
    KeyPath,
    Place,
    Problem,
    key_text,
    one_line,
    parse_yaml,
    study_file_error,
)
from lowrank_tune.spec.explain import explain
from lowrank_tune.spec.schema import StudySpec

_LARGEST_FILE = 64 * 1024


def load_study(path: Path, overrides: Sequence[str] = ()) -> StudySpec:
    """Read a study file.

    Args:
        path: the file, YAML 1.2 in UTF-8.
        overrides: `key.path=value` texts with values in YAML, laid over the file in their order.

    Raises:
        StudyFileError: with every problem found, in the order of the file, then of the overrides.
    """
    return parse_study(_read_text(path), str(path), overrides)


def parse_study(text: str, name: str, overrides: Sequence[str] = ()) -> StudySpec:
    """Read a study file's text.

    Args:
        text: YAML 1.2.
        name: what problems call the file.
        overrides: as for `load_study`.

    Raises:
        StudyFileError: with every problem found.
    """
    document = parse_yaml(text, lambda line: Place(0, line, f"{name}:{line}"))
    if document.value is None:
        raise StudyFileError([f"{name}:1: empty: a study needs name, features.source and search.space.families"])
    if not isinstance(document.value, dict):
        reason = "`key: value` lines are expected, not a list or a single value"
        raise study_file_error([Problem(document.place(()), reason)])
    for number, override in enumerate(overrides, start=1):
        _lay_over(document, number, override)
    _fill_empty_families(document.value)
    try:
        spec = StudySpec.model_validate(document.value)
    except ValidationError as error:
        raise study_file_error(document.problems + explain(error, document)) from None
    if document.problems:
        raise study_file_error(document.problems)
    return spec


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_FILE + 1)
    except FileNotFoundError:
        raise StudyFileError([f"{path}: no such file"]) from None
    except IsADirectoryError:
        raise StudyFileError([f"{path}: a directory; name the study file in it"]) from None
    except (OSError, ValueError) as error:
        raise StudyFileError([f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})"]) from None
    if len(data) > _LARGEST_FILE:
        raise StudyFileError([f"{path}: larger than {_LARGEST_FILE // 1024} KiB; that is not a study file"])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise StudyFileError([f"{path}:{line}: not UTF-8 text; save the file as UTF-8"]) from None


def _lay_over(document: Document, number: int, override: str) -> None:
    """Put one override's value into a document, or its problem into the document's problems."""
    place = Place(number, 0, one_line(f"--set {override}"))
    key, equals, text = override.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        document.problems.append(Problem(place, "key.path=value is expected, such as training.epochs=5"))
        return
    try:
        given = parse_yaml(text, lambda _: place)
    except StudyFileError as error:
        document.problems += [Problem(place, problem.removeprefix(f"{place.label}: ")) for problem in error.problems]
        return
    document.problems += given.problems
    document.unreadable |= {path + inner for inner in given.unreadable}
    mapping = _mapping_at(document, path[:-1], place)
    if mapping is None:
        return
    mapping[path[-1]] = given.value
    for known in [known for known in document.places if known[: len(path)] == path]:
        del document.places[known]
    document.places.update({path + inner: place for inner in given.places})


def _mapping_at(document: Document, path: KeyPath, place: Place) -> dict[str, Any] | None:
    """The mapping at a path, made where nothing is; None when something else stands there, which is then a problem."""
    mapping: dict[str, Any] = document.value
    for depth, part in enumerate(path, start=1):
        if mapping.get(str(part)) is None:
            mapping[str(part)] = {}
            document.places[path[:depth]] = place
        inner = mapping[str(part)]
        if not isinstance(inner, dict):
            what = "a list" if isinstance(inner, list) else "a value"
            document.problems.append(Problem(place, f"{key_text(path[:depth])} holds {what}, not keys: set it whole"))
            return None
        mapping = inner
    return mapping


def _fill_empty_families(study: dict[str, Any]) -> None:
    """Give a family that is named with nothing after it an empty mapping: it is meant with its defaults."""
    families: Any = study
    for key in ("search", "space", "families"):
        families = families.get(key) if isinstance(families, dict) else None
    if isinstance(families, dict):
        families.update({family: {} for family, own in families.items() if own is None})
