"""A study file's text and the `--set` values laid over it -> their content, and where each value was given.

YAML is read node by node: ruamel's round trip stops at the first key given twice, loses the tags of lists, and makes
dates, merges and aliases of what a study file means as words.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, DocumentStartEvent, ScalarEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

KeyPath = tuple[str | int, ...]

# A study is at most six levels deep. The scanner takes quadratic time over unclosed brackets, so it is stopped early.
_DEEPEST = 20
_STANDARD_TAG = "tag:yaml.org,2002:"
# Dates, `<<` and `=` are words here: a study file has no dates, and merging needs aliases.
_TAGS = ("map", "seq", "null", "bool", "int", "float", "str", "timestamp", "merge", "value")
_UNQUOTED = "a value that begins with {} needs quotes"
_NO_ALIAS = "`*{0}` is an alias, which study files do not have: write the value out, or quote it if it begins with *"
_NO_ANCHOR = "`&{0}` is an anchor, which study files do not have: remove it, or quote the value if it begins with &"
_INDENTATION = "the indentation fits none of the lines above"
# What ruamel says, and what it means to someone who does not know YAML's grammar; True where the fault begins at the
# context: the parser noticed it lines later.
_SYNTAX = (
    ("expected ',' or '(.)'", "the {} that closes what opens here is missing, or a comma before it", True),
    ("scanning an (alias|anchor)", _UNQUOTED.format("* or &"), False),
    ("quoted scalar.*end of stream", "the quote that opens here is never closed", True),
    (r"found character '\\t'", "a tab where YAML wants spaces: indent with spaces", False),
    ("found character (.*) that", _UNQUOTED, False),
    (
        "mapping values are not",
        "a `:` that cannot stand here: quote the value before it, or correct the indentation",
        False,
    ),
    ("expected (<block end>|'<document start>')", _INDENTATION, False),
    ("could not find expected ':'", "`key: value` is expected", True),
    ("unknown escape character", "a backslash between double quotes is an escape: use single quotes", False),
    ("found another document", "a second document begins here: a study file holds one", False),
)
_NUMBERS = YAML(typ="safe", pure=True).constructor


def key_text(path: KeyPath) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def one_line(text: str) -> str:
    """A text that a terminal shows on one line, whatever it holds."""
    return text if text.isprintable() else ascii(text)[1:-1]


@dataclass(frozen=True, order=True, slots=True)
class Place:
    """Where a value was given: a line of the file, or the `--set` with this number."""

    override: int
    line: int
    label: str


@dataclass(slots=True)
class Document:
    """A study file's content, where each value was given, what is wrong, and which values cannot be read at all."""

    value: Any = None
    places: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[tuple[Place, str]] = field(default_factory=list)
    unreadable: set[KeyPath] = field(default_factory=set)

    def add(self, path: KeyPath, reason: str, place: Place | None = None) -> None:
        """Note a problem; a missing value's place is that of the mapping that lacks it."""
        where = path
        while where not in self.places:
            where = where[:-1]
        self.problems.append((place or self.places[where], f"{key_text(path)}: {reason}" if path else reason))

    def read(self, node: Node | None, path: KeyPath, place_of: Callable[[int], Place]) -> Any:
        """The value of a node, with its places and problems noted."""
        place = place_of(node.start_mark.line + 1 if node else 1)
        self.places.setdefault(path, place)
        if node is None:
            return None
        if str(node.tag).removeprefix(_STANDARD_TAG) not in _TAGS:
            reason: str | None = f"the tag {node.tag} is not one for study files: remove it"
            value: Any = None
        elif isinstance(node, MappingNode):
            return self._mapping(node, path, place_of)
        elif isinstance(node, SequenceNode):
            return [self.read(item, (*path, position), place_of) for position, item in enumerate(node.value)]
        else:
            value, reason = _scalar(node)
        if reason:
            self.add(path, reason, place)
            self.unreadable.add(path)
        return value

    def _mapping(self, node: MappingNode, path: KeyPath, place_of: Callable[[int], Place]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = place_of(key_node.start_mark.line + 1)
            key, unreadable = _scalar(key_node) if isinstance(key_node, ScalarNode) else (None, None)
            if unreadable:
                self.add(path, f"of a key, {unreadable}", place)
            elif not isinstance(key, str):
                shown = f" (got {key_node.value})" if isinstance(key_node, ScalarNode) else ""
                self.add(path, f"a key must be a word{shown}", place)
            elif key in values:
                first = self.places[*path, key].line
                where = f", first on line {first}" if first else ""
                self.add((*path, key), f"given twice{where}: remove one", place)
            else:
                self.places[*path, key] = place
                values[key] = self.read(value_node, (*path, key), place_of)
        return values

    def lay_over(self, place: Place, override: str) -> None:
        key, equals, text = override.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            self.add((), "key.path=value is expected, such as training.epochs=5", place)
            return
        node, wrong = compose(text)
        if wrong:
            self.problems += [(place, reason) for _, reason in wrong]
            return
        mapping: dict[str, Any] = self.value
        for depth, part in enumerate(path[:-1], start=1):
            if mapping.get(part) is None:
                mapping[part] = {}
                self.places[path[:depth]] = place
            inner = mapping[part]
            if not isinstance(inner, dict):
                what = "a list" if isinstance(inner, list) else "a value"
                self.problems.append((place, f"{key_text(path[:depth])} holds {what}, not keys: set it whole"))
                return
            mapping = inner
        for known in [known for known in self.places if known[: len(path)] == path]:
            del self.places[known]
        mapping[path[-1]] = self.read(node, path, lambda _: place)


def _scalar(node: Node) -> tuple[Any, str | None]:
    text, kind = str(node.value), str(node.tag).removeprefix(_STANDARD_TAG)
    if kind == "null":
        return None, None
    try:
        if kind in ("bool", "int", "float"):
            number = getattr(_NUMBERS, f"construct_yaml_{kind}")(node)
            if isinstance(number, int) and abs(number) >= 2**63:
                raise ValueError("too long to be meant, and for Python to print")
            return number, None
        # JSON writes a character beyond U+FFFF as two halves, which YAML does not join.
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
        text.encode()
    except UnicodeEncodeError:
        return text, "the text holds half a character (a lone surrogate): remove it"
    except (ValueError, KeyError, IndexError):
        return text, f"not a number that can be read (got {text[:40]!a})"
    return text, None


def compose(text: str) -> tuple[Node | None, list[tuple[int, str]]]:
    """The nodes of one YAML document; or what is wrong with it, or what study files do without, each with its line."""
    found, depth = [], 0
    try:
        for event in YAML(typ="safe", pure=True).parse(text):
            line = event.start_mark.line + 1
            depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
            if depth > _DEEPEST:
                found.append((line, f"more than {_DEEPEST} levels of nesting: a study file has six at most"))
                break
            if isinstance(event, DocumentStartEvent) and event.version not in (None, (1, 2)):
                found.append((line, "study files are YAML 1.2: remove the %YAML line"))
            elif isinstance(event, AliasEvent):
                found.append((line, _NO_ALIAS.format(event.anchor)))
            elif isinstance(event, CollectionStartEvent | ScalarEvent) and event.anchor:
                found.append((line, _NO_ANCHOR.format(event.anchor)))
        return (None if found else YAML(typ="safe", pure=True).compose(text)), found
    except ReaderError as error:
        line, character = text.count("\n", 0, error.position) + 1, text[error.position : error.position + 1]
        return None, [(line, f"character {character!a} cannot stand in YAML: remove it")]
    except MarkedYAMLError as error:
        said = f"{error.context or ''}: {error.problem or ''}"
        for pattern, reason, at_context in _SYNTAX:
            if told := re.search(pattern, said):
                mark = error.context_mark if at_context else error.problem_mark
                return None, [(mark.line + 1, reason.format(*told.groups()))]
        return None, [(error.problem_mark.line + 1 if error.problem_mark else 1, f"not YAML: {said}")]
    except YAMLError as error:
        return None, [(1, f"not YAML: {' '.join(str(error).split())}")]
