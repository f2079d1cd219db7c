"""A study file, and the `--set` values laid over it -> StudySpec, or every problem at once."""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from lowrank_tune.config.axes import Section
from lowrank_tune.config.document import Document, KeyPath, Place, compose, key_text, one_line
from lowrank_tune.config.schema import StudySpec
from lowrank_tune.config.source import SOURCES
from lowrank_tune.errors import StudyFileError

_LARGEST_FILE = 64 * 1024
_LONGEST_VALUE = 60
_FORMS = ("uniform", "loguniform", "int", *SOURCES)
"""The one key of a range or a source."""
_TWO_ENDS = "a range has two ends: [low, high]"
_LET_GO = (("resources", "fuse"),)
"""Keys of older versions, which their studies' resolved files hold."""


def load_study(path: Path, overrides: Sequence[str] = ()) -> StudySpec:
    """Read a study file, YAML 1.2 in UTF-8, with `key.path=value` texts laid over it in their order.

    Raises:
        StudyFileError: with every problem found, in the order of the file, then of the overrides.
    """
    return parse_study(_read_text(path), str(path), overrides)


def load_past_study(path: Path, overrides: Sequence[str] = ()) -> StudySpec:
    """Read a begun study's resolved file, as the version that wrote it understood it."""
    return parse_study(_read_text(path), str(path), overrides, begun=True)


def parse_study(text: str, name: str, overrides: Sequence[str] = (), *, begun: bool = False) -> StudySpec:
    """Read a study file's text, which problems call `name`; of a begun study older versions' keys are no problem."""
    node, wrong = compose(text)
    if wrong:
        raise StudyFileError([one_line(f"{name}:{line}: {reason}") for line, reason in wrong])
    document = Document()
    document.value = document.read(node, (), lambda line: Place(0, line, f"{name}:{line}"))
    if document.value is None:
        raise StudyFileError([f"{name}:1: empty: a study needs name, features.source and search.space.families"])
    if not isinstance(document.value, dict):
        reason = "`key: value` lines are expected, not a list or a single value"
        raise StudyFileError([f"{document.places[()].label}: {reason}"])
    if begun:
        for section, key in _LET_GO:
            if isinstance(document.value.get(section), dict):
                document.value[section].pop(key, None)
        # The split was by image before there were groups.
        if isinstance(split := document.value.setdefault("split", {}), dict):
            split.setdefault("group_by", None)
    for number, override in enumerate(overrides, start=1):
        document.lay_over(Place(number, 0, one_line(f"--set {override}")), override)
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
        _add_with_value(path[:-1], _TWO_ENDS, document)
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
    return tuple(part for part in loc if not (isinstance(part, str) and part.startswith("<")))


_REASONS = {
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "must not hold control characters",
    "tuple_type": "a list is expected",
    "dict_type": "`key: value` pairs are expected",
    "too_short": "the list must not be empty",
    "too_long": _TWO_ENDS,
    "finite_number": "must be finite",
    "multiple_of": "must be a multiple of {multiple_of}",
    "greater_than": "must be above {gt:.15g}",
    "greater_than_equal": "must be at least {ge:.15g}",
    "less_than": "must be below {lt:.15g}",
    "less_than_equal": "must be at most {le:.15g}",
}


def _reason(details: ErrorDetails) -> str:
    kind, value, loc, context = details["type"], details["input"], details["loc"], details.get("ctx", {})
    if kind == "missing":
        return f"required, but not given{_needed_keys(loc)}"
    if value is None and kind != "literal_error":
        *section, key = _untagged(loc)
        field = _fields_at(tuple(section)).get(str(key))
        default = ", or remove the line for the default" if field and not field.is_required() else ""
        return f"nothing is given: write a value{default}"
    match kind:
        case "int_type" | "int_from_float" | "float_type":
            return _number_reason(kind, value, loc)
        case "string_type":
            return "text is expected" + (": put it in quotes" if isinstance(value, int | float) else "")
        case "string_pattern_mismatch" if loc == ("name",):
            return "letters, digits, - and _ only, beginning with a letter or digit, 63 at most"
        case "literal_error":
            words = [{"<word>": "a count", "<form>": "a rank"}[str(loc[-1])]] if loc[-1] in ("<word>", "<form>") else []
            words += re.findall(r"'([^']*)'", context["expected"])
            near = _closest("none" if value is None else str(value), words)
            return f"{' or '.join(filter(None, (', '.join(words[:-1]), words[-1])))} is expected{_did_you_mean(near)}"
        case "model_type":
            return f"`key: value` lines are expected{_needed_keys(loc)}"
        case "range" | "source":
            misspelt = isinstance(value, dict) and len(value) == 1 and not value.keys() & set(_FORMS)
            return details["msg"] + (_did_you_mean(_closest(next(iter(value)), _FORMS)) if misspelt else "")
        case "less_than" if loc[-1] == "<fraction>":
            return "a fraction must be below 1, and a count is written without a point"
        case _:
            return _REASONS.get(kind, details["msg"]).format(**context)


def _number_reason(kind: str, value: Any, loc: tuple[str | int, ...]) -> str:
    whole, expected = (False, "a number") if kind == "float_type" else (True, "a whole number")
    if loc[0] == "split":
        whole, expected = False, "a count or a fraction"
    if isinstance(value, float) and value.is_integer():
        return f"{expected} is expected: write {int(value)}"
    with contextlib.suppress(ValueError):
        number = float(value if isinstance(value, str) else "nan")
        if number.is_integer() or not whole and math.isfinite(number):
            return f"{expected} is expected: write it without quotes"
    forms = ", a list of them or a range" if loc[-1] == "<constant>" else ""
    return f"{expected}{forms} is expected"


def _unknown_reason(tagged: tuple[str | int, ...], path: KeyPath) -> str:
    """What an unknown key may have been meant for: a key beside it, or elsewhere; else all that may stand here."""
    key = str(path[-1])
    known = list(_fields_at(tagged[:-1]))
    what = "unknown family" if path[:-1] == ("search", "space", "families") else "unknown key"
    everywhere = [(*place, name) for place, section in _SECTIONS for name in section.model_fields]
    elsewhere = [key_text(other) for other in everywhere if other[-1].lower() == key.lower() and other != path]
    close = _closest(key, known) or elsewhere
    return what + (_did_you_mean(close) or (f" (known here: {', '.join(known)})" if known else "; none belong here"))


def _closest(word: str, words: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(word.lower(), list(words), n=1)


def _did_you_mean(words: Iterable[str]) -> str:
    quoted = " or ".join(f'"{word}"' for word in words)
    return f"; did you mean {quoted}?" if quoted else ""


def _needed_keys(loc: tuple[str | int, ...]) -> str:
    """The keys that a section must have, or may have when none is a must."""
    fields = _fields_at(loc)
    names = [name for name, field in fields.items() if field.is_required()] or fields
    return f" ({', '.join(names)})" if names else ""


def _fields_at(loc: tuple[str | int, ...]) -> dict[str, FieldInfo]:
    """The keys that may stand in a section, or in the one that the tag at its end chose."""
    here = [section.model_fields for path, section in _SECTIONS if path == _untagged(loc)]
    chosen = [fields for fields in here if loc and str(loc[-1]).strip("<>") in fields]
    return {name: field for fields in chosen or here for name, field in fields.items()}


def _sections(annotation: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], type[Section]]]:
    """Every section within a type, with the keys that lead to it."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield path, annotation
        for name, field in annotation.model_fields.items():
            yield from _sections(field.annotation, (*path, name))
    for part in get_args(annotation):
        yield from _sections(part, path)


_SECTIONS = list(_sections(StudySpec))
