"""YAML text -> plain values, with each key's place, and with the problems that YAML itself passes over in silence.

YAML 1.2 (`1e-3` is a number, `no` is a word), and of it only what a settings file needs: one document of mappings,
lists and plain scalars. Duplicate keys, keys that are not words, tags, anchors and aliases are problems.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, DocumentStartEvent, ScalarEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

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
