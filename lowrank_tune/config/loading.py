"""A study file, and the `--set` values laid over it -> StudySpec, or every problem at once."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from lowrank_tune.config.axes import Section
from lowrank_tune.config.document import Document, KeyPath, NotYamlError, Place, compose, key_text, one_line
from lowrank_tune.config.schema import SOURCES, StudySpec
from lowrank_tune.errors import StudyFileError

_LARGEST_FILE = 64 * 1024
_LONGEST_VALUE = 60
_FORMS = ("uniform", "loguniform", "int", *SOURCES)
"""The one key of a range or a source."""
_LET_GO = (("resources", "fuse"),)
"""Keys of older versions, which their studies' resolved files hold."""


def load_study(path: Path, overrides: Sequence[str] = ()) -> StudySpec:
    """Read a study file, YAML 1.2 in UTF-8, with `key.path=value` texts laid over it in their order.

    Raises:
        StudyFileError: with every problem found, in the order of the file, then of the overrides.
    """
    return parse_study(_read_text(path), str(path), overrides)


def load_past_study(path: Path, overrides: Sequence[str] = ()) -> StudySpec:
    """Read a begun study's resolved file; keys that older versions wrote are passed over."""
    return parse_study(_read_text(path), str(path), overrides, passed_over=_LET_GO)


def parse_study(
    text: str, name: str, overrides: Sequence[str] = (), passed_over: Iterable[tuple[str, str]] = ()
) -> StudySpec:
    """Read a study file's text, which problems call `name`; keys to be passed over are no problem in it."""
    document = Document()
    try:
        document.value = document.read(compose(text), (), lambda line: Place(0, line, f"{name}:{line}"))
    except NotYamlError as error:
        raise StudyFileError([one_line(f"{name}:{line}: {reason}") for line, reason in error.found]) from None
    if document.value is None:
        raise StudyFileError([f"{name}:1: empty: a study needs name, features.source and search.space.families"])
    if not isinstance(document.value, dict):
        reason = "`key: value` lines are expected, not a list or a single value"
        raise StudyFileError([f"{document.places[()].label}: {reason}"])
    for section, key in passed_over:
        if isinstance(document.value.get(section), dict):
            document.value[section].pop(key, None)
    for number, override in enumerate(overrides, start=1):
        document.lay_over(Place(number, 0, one_line(f"--set {override}")), override)
    document.fill_empty_families()
    try:
        spec = StudySpec.model_validate(document.value)
    except ValidationError as error:
        for details in error.errors(include_url=False):
            _explain(details, document)
    if document.problems:
        problems = sorted(document.problems, key=lambda problem: problem[0])
        raise StudyFileError([one_line(f"{place.label}: {text}") for place, text in problems])
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


def _explain(details: ErrorDetails, document: Document) -> None:
    unknown = details["type"] == "extra_forbidden"
    tagged = details["loc"]
    # An unknown key is the user's own, and may look like a tag.
    path: KeyPath = _untagged(tagged[:-1]) + (tagged[-1:] if unknown else _untagged(tagged[-1:]))
    if path in document.unreadable or (details["type"] == "too_short" and details["input"]):
        # Of a list without a single valid item pydantic says that it is empty, too.
        return
    if details["type"] == "study":
        context = details["ctx"]
        for place in context["places"]:
            _add_with_value((*path, *place), context["reason"], document)
    elif details["type"] == "missing" and isinstance(path[-1], int):
        _add_with_value(path[:-1], "a range has two ends: [low, high]", document)
    else:
        _add_with_value(path, _unknown_reason(tagged, path) if unknown else _reason(details), document)


def _add_with_value(path: KeyPath, reason: str, document: Document) -> None:
    value: Any = document.value
    for part in path:
        if isinstance(value, dict) and part not in value:
            document.add(path, reason)
            return
        value = value[part]
    text = json.dumps(value, ensure_ascii=False)
    text = text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…"
    document.add(path, f"{reason} (got {text})")


def _untagged(loc: tuple[str | int, ...]) -> KeyPath:
    return tuple(part for part in loc if not _is_tag(part))


def _is_tag(part: str | int) -> bool:
    return isinstance(part, str) and part.startswith("<")


def _reason(details: ErrorDetails) -> str:
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    if kind == "missing":
        return f"required, but not given{_needed_keys(details['loc'])}"
    if value is None and kind != "literal_error":
        return f"nothing is given: write a value{_or_default(details['loc'])}"
    match kind:
        case "int_type" | "int_from_float" | "float_type":
            return _number_reason(kind, value, details["loc"])
        case "string_type":
            return "text is expected" + (": put it in quotes" if isinstance(value, int | float) else "")
        case "string_too_short":
            return "must not be empty"
        case "string_pattern_mismatch" if details["loc"] == ("name",):
            return "letters, digits, - and _ only, beginning with a letter or digit, 63 at most"
        case "string_pattern_mismatch":
            return "must not hold control characters"
        case "literal_error":
            words = ["a count"] if details["loc"][-1] == "<word>" else []
            words += re.findall(r"'([^']*)'", context["expected"])
            near = _closest("none" if value is None else str(value), words)
            return f"{' or '.join(filter(None, (', '.join(words[:-1]), words[-1])))} is expected{_did_you_mean(near)}"
        case "model_type":
            return f"`key: value` lines are expected{_needed_keys(details['loc'])}"
        case "tuple_type":
            return "a list is expected"
        case "too_short":
            return "the list must not be empty"
        case "too_long":
            return "a range has two ends: [low, high]"
        case "finite_number":
            return "must be finite"
        case "multiple_of":
            return f"must be a multiple of {context['multiple_of']}"
        case "range" | "source":
            keys = list(value) if isinstance(value, dict) else []
            known = not keys or keys[0] in _FORMS
            return details["msg"] + ("" if known or len(keys) > 1 else _did_you_mean(_closest(keys[0], _FORMS)))
        case "less_than" if details["loc"][-1] == "<fraction>":
            return "a fraction must be below 1, and a count is written without a point"
        case _:
            bounds = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
            broken = [f"must be {word} {context[key]:.15g}" for key, word in bounds.items() if key in context]
            return " and ".join(broken) or details["msg"]


def _number_reason(kind: str, value: Any, loc: tuple[str | int, ...]) -> str:
    whole = kind != "float_type"
    expected = "a whole number" if whole else "a number"
    if loc[0] == "split":
        whole, expected = False, "a count or a fraction"
    number = _as_number(value) if isinstance(value, str) else None
    if isinstance(number, int) or (number is not None and not whole):
        return f"{expected} is expected: write it without quotes"
    if isinstance(value, float) and value.is_integer():
        return f"{expected} is expected: write {int(value)}"
    forms = ", a list of them or a range" if loc[-1] == "<constant>" else ""
    return f"{expected}{forms} is expected"


def _as_number(text: str) -> int | float | None:
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError):
        return None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _unknown_reason(tagged: tuple[str | int, ...], path: KeyPath) -> str:
    """What an unknown key may have been meant for: a key beside it, or elsewhere; else all that may stand here."""
    key = str(path[-1])
    known = [name for section in _sections_at(tagged[:-1]) for name in section.model_fields]
    what = "unknown family" if path[:-1] == ("search", "space", "families") else "unknown key"
    elsewhere = [name for name in _all_paths(StudySpec) if name.rpartition(".")[2].lower() == key.lower()]
    close = _closest(key, known) or [name for name in elsewhere if name != key_text(path)]
    return what + (_did_you_mean(close) or (f" (known here: {', '.join(known)})" if known else "; none belong here"))


def _closest(word: str, words: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(word.lower(), list(words), n=1)


def _did_you_mean(words: Iterable[str]) -> str:
    quoted = " or ".join(f'"{word}"' for word in words)
    return f"; did you mean {quoted}?" if quoted else ""


def _needed_keys(loc: tuple[str | int, ...]) -> str:
    """The keys that a section must have, or may have when none is a must."""
    fields = [item for section in _sections_at(loc) for item in section.model_fields.items()]
    names = [name for name, field in fields if field.is_required()] or [name for name, _ in fields]
    return f" ({', '.join(names)})" if names else ""


def _or_default(loc: tuple[str | int, ...]) -> str:
    path = _untagged(loc)
    fields = [section.model_fields.get(str(path[-1])) for section in _sections_at(path[:-1])]
    return ", or remove the line for the default" if any(field and not field.is_required() for field in fields) else ""


def _sections_at(loc: tuple[str | int, ...]) -> list[type[Section]]:
    """The sections that may stand at a path, or the one that its last tag chose."""
    found: list[type[Section]] = [StudySpec]
    for part in loc:
        if _is_tag(part):
            found = [section for section in found if str(part)[1:-1] in section.model_fields]
        else:
            fields = [section.model_fields[part] for section in found if part in section.model_fields]
            found = [section for field in fields for section in _sections_in(field.annotation)]
    return found


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in get_args(annotation):
        yield from _sections_in(part)


def _all_paths(section: type[Section], prefix: str = "") -> Iterator[str]:
    for name, info in section.model_fields.items():
        yield prefix + name
        for inner in _sections_in(info.annotation):
            yield from _all_paths(inner, f"{prefix}{name}.")
