"""A study file, and the `--set` values laid over it -> StudySpec, or every problem at once."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, DocumentStartEvent, ScalarEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from lowrank_tune.config.axes import Section
from lowrank_tune.config.schema import StudySpec
from lowrank_tune.errors import StudyFileError

KeyPath = tuple[str | int, ...]

# A study is at most six levels deep. The scanner takes quadratic time over unclosed brackets, so it is stopped early.
_DEEPEST = 20
_STANDARD_TAG = "tag:yaml.org,2002:"
# Dates, `<<` and `=` are words here: a study file has no dates, and merging needs aliases.
_WORDS = ("str", "timestamp", "merge", "value")
_TAGS = {f"{_STANDARD_TAG}{kind}" for kind in ("map", "seq", "null", "bool", "int", "float", *_WORDS)}
_UNQUOTED = "a value that begins with {} needs quotes"
_NO_ALIAS = "`*{0}` is an alias, which study files do not have: write the value out, or quote it if it begins with *"
_NO_ANCHOR = "`&{0}` is an anchor, which study files do not have: remove it, or quote the value if it begins with &"


@dataclass(frozen=True, order=True, slots=True)
class Place:
    """Where a value was given: a line of the file, or the `--set` with this number; sorts in the order of reading."""

    override: int
    line: int
    label: str


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing to correct, ready to be read."""

    place: Place
    text: str

    def __str__(self) -> str:
        return one_line(f"{self.place.label}: {self.text}")


@dataclass(slots=True)
class Document:
    """One document's content.

    Attributes:
        value: mappings, lists and scalars.
        places: where each value was given.
        problems: what is wrong with them as YAML.
        unreadable: the values that have such a problem, about which nothing else need be said.
    """

    value: Any
    places: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    unreadable: set[KeyPath] = field(default_factory=set)

    def place(self, path: KeyPath) -> Place:
        """Where a value was given; a missing one's is that of the mapping that lacks it."""
        while path not in self.places:
            path = path[:-1]
        return self.places[path]


def study_file_error(problems: list[Problem]) -> StudyFileError:
    """The error that tells these problems in the order of reading."""
    return StudyFileError([str(problem) for problem in sorted(problems, key=lambda problem: problem.place)])


def parse_yaml(text: str, place_of: Callable[[int], Place]) -> Document:
    """Read one YAML document.

    Args:
        text: the document.
        place_of: the place of a line, counted from 1.

    Raises:
        StudyFileError: it is not YAML, or uses what study files do without; later lines are not looked at.
    """
    try:
        _refuse_references(text, place_of)
        yaml = YAML(typ="safe", pure=True)
        root = yaml.compose(text)
    except YAMLError as error:
        line, reason = _syntax_reason(error, text)
        raise study_file_error([Problem(place_of(line), reason)]) from None
    if root is None:
        return Document(None, {(): place_of(1)})
    return _Reader(yaml, place_of).read(root)


def key_text(path: KeyPath) -> str:
    """A path as people write it, `search.space.rank[1]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def one_line(text: str) -> str:
    """A text that a terminal shows on one line, whatever a user has put into it."""
    return text if text.isprintable() else ascii(text)[1:-1]


class _Reader:
    """Turns one document's nodes into values."""

    def __init__(self, yaml: YAML, place_of: Callable[[int], Place]) -> None:
        self._constructor = yaml.constructor
        self._place_of = place_of
        self._document = Document(None)

    def read(self, root: Node) -> Document:
        self._document.places[()] = self._place(root)
        self._document.value = self._value(root, ())
        return self._document

    def _place(self, node: Node) -> Place:
        return self._place_of(node.start_mark.line + 1)

    def _report(self, node: Node, path: KeyPath, reason: str) -> None:
        where = f"{key_text(path)}: " if path else ""
        self._document.problems.append(Problem(self._place(node), f"{where}{reason}"))

    def _unreadable(self, node: Node, path: KeyPath, reason: str) -> None:
        self._report(node, path, reason)
        self._document.unreadable.add(path)

    def _value(self, node: Node, path: KeyPath) -> Any:
        if str(node.tag) not in _TAGS:
            self._unreadable(node, path, f"the tag {node.tag} is not one for study files: remove it")
            return None
        if isinstance(node, MappingNode):
            return self._mapping(node, path)
        if isinstance(node, SequenceNode):
            for position, item in enumerate(node.value):
                self._document.places[*path, position] = self._place(item)
            return [self._value(item, (*path, position)) for position, item in enumerate(node.value)]
        return self._scalar(node, path)

    def _mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._scalar(key_node, path) if isinstance(key_node, ScalarNode) else None
            if not isinstance(key, str):
                shown = f" (got {key_node.value})" if isinstance(key_node, ScalarNode) else ""
                self._report(key_node, path, f"a key must be a word{shown}")
            elif key in values:
                first = self._document.places[*path, key].line
                where = f", first on line {first}" if first else ""
                self._report(key_node, (*path, key), f"given twice{where}: remove one")
            else:
                self._document.places[*path, key] = self._place(key_node)
                values[key] = self._value(value_node, (*path, key))
        return values

    def _scalar(self, node: Node, path: KeyPath) -> Any:
        text = str(node.value)
        kind = str(node.tag).removeprefix(_STANDARD_TAG)
        if kind == "null":
            return None
        try:
            if kind in ("bool", "int", "float"):
                return self._number(kind, node)
            text.encode()
        except UnicodeEncodeError:
            self._unreadable(node, path, "the text holds half a character (a lone surrogate): remove it")
        except (ValueError, KeyError):
            self._unreadable(node, path, f"not a number that can be read (got {text[:40]!a})")
        return text

    def _number(self, kind: str, node: Node) -> bool | int | float:
        value: bool | int | float = getattr(self._constructor, f"construct_yaml_{kind}")(node)
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError("too long to be meant, and for Python to print")
        return value


def _refuse_references(text: str, place_of: Callable[[int], Place]) -> None:
    """Find anchors, aliases, other YAML versions and endless nesting before anything follows them."""
    problems = []
    depth = 0
    for event in YAML(typ="safe", pure=True).parse(text):
        place = place_of(event.start_mark.line + 1)
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > _DEEPEST:
            problems.append(Problem(place, f"more than {_DEEPEST} levels of nesting: a study file has six at most"))
            break
        if isinstance(event, DocumentStartEvent) and event.version not in (None, (1, 2)):
            problems.append(Problem(place, "study files are YAML 1.2: remove the %YAML line"))
        elif isinstance(event, AliasEvent):
            problems.append(Problem(place, _NO_ALIAS.format(event.anchor)))
        elif isinstance(event, CollectionStartEvent | ScalarEvent) and event.anchor:
            problems.append(Problem(place, _NO_ANCHOR.format(event.anchor)))
    if problems:
        raise study_file_error(problems)


def _syntax_reason(error: YAMLError, text: str) -> tuple[int, str]:
    """The line of a syntax error, and what it means to someone who does not know YAML's grammar."""
    if isinstance(error, ReaderError):
        character = text[error.position : error.position + 1]
        return text.count("\n", 0, error.position) + 1, f"character {character!a} cannot stand in YAML: remove it"
    if not isinstance(error, MarkedYAMLError):
        return 1, f"not YAML: {' '.join(str(error).split())}"
    problem, context = error.problem or "", error.context or ""
    mark = error.problem_mark
    if problem.startswith(("expected ',' or", "found unexpected end", "could not find expected ':'")):
        # What is wrong begins where the context does; the parser noticed it lines later.
        mark = error.context_mark
    return mark.line + 1 if mark else 1, _plain_reason(problem, context)


def _plain_reason(problem: str, context: str) -> str:
    if problem.startswith("found character '\\t'"):
        return "a tab where YAML wants spaces: indent with spaces"
    if problem.startswith("found character"):
        return _UNQUOTED.format(problem.split()[2])
    if "alias" in context or "anchor" in context:
        return _UNQUOTED.format("* or &")
    if problem.startswith("expected ',' or"):
        return f"the {problem[17]} that closes what opens here is missing, or a comma before it"
    if "quoted scalar" in context and "end of stream" in problem:
        return "the quote that opens here is never closed"
    if problem == "mapping values are not allowed here":
        return "a `:` that cannot stand here: quote the value before it, or correct the indentation"
    if problem.startswith(("expected <block end>", "expected '<document start>'")):
        return "the indentation fits none of the lines above"
    if problem == "could not find expected ':'":
        return "`key: value` is expected"
    if problem.startswith("found unknown escape character"):
        return "a backslash between double quotes is an escape: use single quotes"
    if problem == "but found another document":
        return "a second document begins here: a study file holds one"
    return f"not YAML: {', '.join(part for part in (context, problem) if part)}"


_LONGEST_VALUE = 60


def explain(error: ValidationError, document: Document) -> list[Problem]:
    """Every problem that pydantic found, at the place where its value was given."""
    return [problem for details in error.errors(include_url=False) for problem in _problems(details, document)]


def _problems(details: ErrorDetails, document: Document) -> Iterator[Problem]:
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
            yield _problem((*path, *place), context["reason"], document)
    elif details["type"] == "missing" and isinstance(path[-1], int):
        yield _problem(path[:-1], "a range has two ends: [low, high]", document)
    elif unknown:
        yield _problem(path, _unknown_reason(tagged, path), document)
    else:
        yield _problem(path, _reason(details), document)


def _problem(path: KeyPath, reason: str, document: Document) -> Problem:
    value: Any = document.value
    for part in path:
        if isinstance(value, dict) and part not in value:
            return Problem(document.place(path), f"{key_text(path)}: {reason}")
        value = value[part]
    return Problem(document.place(path), f"{key_text(path) or 'study'}: {reason} (got {_shown(value)})")


def _untagged(loc: tuple[str | int, ...]) -> KeyPath:
    return tuple(part for part in loc if not _is_tag(part))


def _is_tag(part: str | int) -> bool:
    return isinstance(part, str) and part.startswith("<")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…"


def _reason(details: ErrorDetails) -> str:
    """What is wrong with a value, and what to write instead."""
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
            count = ["a count"] if details["loc"][-1] == "<word>" else []
            return _word_reason(value, count + re.findall(r"'([^']*)'", context["expected"]))
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
            return details["msg"] + _misspelt(value)
        case "less_than" if details["loc"][-1] == "<fraction>":
            return "a fraction must be below 1, and a count is written without a point"
        case _:
            return _bound_reason(context) or details["msg"]


def _bound_reason(context: dict[str, Any]) -> str:
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    return " and ".join(f"must be {word} {context[key]:.15g}" for key, word in words.items() if key in context)


def _number_reason(kind: str, value: Any, loc: tuple[str | int, ...]) -> str:
    """What kind of number is expected, and how to write what was meant."""
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


def _word_reason(value: Any, words: list[str]) -> str:
    listed = ", ".join(words[:-1]) + " or " + words[-1] if len(words) > 1 else words[0]
    written = "none" if value is None else str(value)
    return f"{listed} is expected{_did_you_mean(_closest(written, words))}"


def _misspelt(value: Any) -> str:
    """A suggestion for the one key of a range or a source."""
    keys = list(value) if isinstance(value, dict) else []
    forms = ["uniform", "loguniform", "int", "images", "manifest", "tensors", "samples"]
    return _did_you_mean(_closest(keys[0], forms)) if len(keys) == 1 and keys[0] not in forms else ""


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
