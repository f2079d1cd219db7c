"""Files of folders, globs and lists of them, as they lie there: images, or tensors."""

from __future__ import annotations

import errno
import fnmatch
import functools
import itertools
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from urllib.parse import unquote

import pyarrow as pa

from lowrank_tune.config.source import ImageSource
from lowrank_tune.errors import InputError, printable
from lowrank_tune.features.decoding import IMAGE_SUFFIXES, looks_like_an_image
from lowrank_tune.features.images import SourceRecords
from lowrank_tune.features.named import is_address

_NO_DATA = frozenset(
    {"__macosx", "@eadir", "$recycle.bin", "#recycle", "@recycle", "system volume information", "lost+found"}
    | {"thumbs.db", "ehthumbs.db", "desktop.ini"}
)
"""Beside hidden names, what systems and file managers leave in folders, in lower case."""

# A camera's RAW file begins like a TIFF, and what can be read of it is a thumbnail.
_RAW = re.compile(
    r"\.(3fr|arw|cr[23]|dcr|dng|erf|fff|iiq|kdc|mef|mos|mrw|nef|nrw|orf|pef|raf|raw|rw2|rwl|sr2|srf|srw|x3f)"
)
_RECORDS = {".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".tar"}
_PLURAL = {"dead link": "dead links", "no file": "no files"}
_KINDS_SHOWN, _NAMES_SHOWN, _MOST_BRACES, _MOST_GROUPS = 12, 3, 1_000_000, 50


@dataclass(frozen=True, slots=True)
class Wanted:
    """Files of a kind.

    Attributes:
        one: what a person calls one of them.
        many: and several.
        said: where the user named them.
        left_out: the kind of a file that is none, for people, and empty for one that is; where a path or a glob names
            the suffix, its first bytes count as well.
        tables: whether a table may have been meant.
    """

    one: str
    many: str
    said: str
    left_out: Callable[[str, bool], str]
    tables: bool = False


def find_images(source: ImageSource) -> SourceRecords:
    """Find the images of directories, of globs and of files.

    Raises:
        InputError: an entry gives no image, or a folder's disk does not answer.
    """
    entries = (source.images,) if isinstance(source.images, str) else source.images
    images, notes = find_files(entries, Wanted("image", "images", "features.source.images", _kind_left_out, True))
    return SourceRecords(tuple(images), pa.table({}), tuple(notes))


def find_files(entries: Sequence[str], wanted: Wanted) -> tuple[list[str], list[str]]:
    """Find the files of directories, subfolders included, of globs and of paths; each real file once. Tell notes, too.

    Links are followed; hidden files and folders, and what file managers leave, are not looked at. Which files are
    wanted their suffixes tell, or, where there is none or a glob or a path names another, their first bytes.

    Raises:
        InputError: an entry gives none, or a folder's disk does not answer.
    """
    walk, files, problems = _Walk(wanted), dict[str, None](), list[str]()
    for entry in entries:
        found = walk.files_of(_path_of(entry, wanted))
        if not found and "\\" in entry.strip("\\"):
            found = walk.files_of(_path_of(entry.replace("\\", "/"), wanted))
        if not found:
            problems.append(f"{printable(entry)}: {walk.nothing(_path_of(entry, wanted))}")
        files |= dict.fromkeys(found)
    if problems:
        raise InputError("\n".join((*problems[:-1], f"{problems[-1]}; correct {wanted.said}")))
    return list(files), list(walk.notes())


def _path_of(entry: str, wanted: Wanted) -> str:
    """An absolute path, with its wildcards, that names nothing yet; `..` stays, for it may follow a link."""
    if entry.lower().startswith("file://"):
        entry = unquote(re.sub(r"^file://(localhost)?(?=/)", "", entry, flags=re.IGNORECASE))
    elif is_address(entry):
        raise InputError(
            f"{entry}: {wanted.many} are read from paths, not from addresses; mount or download it, then correct "
            f"{wanted.said}"
        )
    return os.path.join(os.getcwd(), os.path.expanduser(entry))


def _existing(base: str, parts: list[str]) -> tuple[str, list[str]]:
    """How far a path leads as it is written, wildcards in a folder's real name included, and what is left of it."""
    for number, part in enumerate(parts):
        further = os.path.join(base, part)
        # A star is one, even where somebody has a file of that name; a folder's name is meant as it is written.
        is_star = not part.strip("*") or (re.search(r"[*?]", part) and not os.path.isdir(further))
        if is_star or not os.path.lexists(further):
            return base, parts[number:]
        base = further
    return base, []


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]


_BRACES = re.compile(r"\{(?:([^{},]*(?:,[^{},]*)+)|(\d+)\.\.(\d+))\}")
_SUFFIX = re.compile(r"\.[^.*?\[\]]+$")


def expand_braces(pattern: str) -> list[str]:
    """All that a shell's braces mean, `{a,b}` and `{000..012}`; an InputError where they are too many to list."""
    names = list(itertools.islice(_expanded(pattern), _MOST_BRACES + 1)) if pattern.count("{") <= _MOST_GROUPS else []
    if not 0 < len(names) <= _MOST_BRACES:
        raise InputError(f"{pattern}: too many names; write wildcards instead")
    return names


def _expanded(pattern: str) -> Iterator[str]:
    braces = _BRACES.search(pattern)
    if braces is None:
        yield pattern
        return
    listed, first, last = braces.groups()
    each: Iterable[str]
    if listed is None:
        low, high, width = int(first), int(last), max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
        each = (f"{number:0{width}}" for number in (range(low, high + 1) if low <= high else range(low, high - 1, -1)))
    else:
        each = listed.split(",")
    for text in each:
        yield from _expanded(pattern[: braces.start()] + text + pattern[braces.end() :])


def _patterns(text: str) -> list[list[str]]:
    """The patterns that a text means, in parts whose braces are left; only those round a `/` make several."""
    depths = itertools.accumulate((character == "{") - (character == "}") for character in text)
    spans = any(character == "/" and depth > 0 for character, depth in zip(text, depths, strict=True))
    return [_parts(pattern) for pattern in (expand_braces(text) if spans else [text])]


class _Part:
    """One name of a pattern: `**`, or a name with wildcards and braces; the last one's suffix fits in any case."""

    def __init__(self, text: str, last: bool) -> None:
        self.last = last
        names = [unicodedata.normalize("NFC", name) for name in expand_braces(text)]
        self.is_deep = names == ["**"]
        self.by_content = any(map(_SUFFIX.search, names))
        # A hundred thousand names in braces are looked up, not tried one by one.
        self.names = {self._plain(name) for name in names if not re.search(r"[*?\[]", name)}
        self.patterns: list[tuple[str, Callable[[str], object], str]] = []
        for name in set(names) - self.names:
            suffix = ending[0] if last and (ending := _SUFFIX.search(name)) else ""
            stem = re.compile(fnmatch.translate(name[: len(name) - len(suffix)])).match
            self.patterns.append((name, stem, suffix.lower()))

    def fits(self, name: str) -> bool:
        """Whether it means this name; what is hidden only where it begins so itself."""
        if not name.isascii():
            name = unicodedata.normalize("NFC", name)  # a Mac writes ü as two characters
        if self._plain(name) in self.names:
            return True
        hidden = _is_no_data(name)
        for pattern, stem, suffix in self.patterns:
            cut = len(name) - len(suffix)
            if hidden and not (name.startswith(".") and pattern.startswith(".")):
                continue
            if cut >= 0 and name[cut:].lower() == suffix and stem(name[:cut]):
                return True
        return False

    def _plain(self, name: str) -> str:
        stem, suffix = os.path.splitext(name) if self.last else (name, "")
        return stem + suffix.lower()


def _is_no_data(name: str) -> bool:
    return name.startswith(".") or name.lower() in _NO_DATA


@dataclass(frozen=True, slots=True)
class _Entry:
    """Something in a folder: `kind` is that of what a link leads to, 0 where it leads nowhere."""

    name: str
    kind: int
    is_link: bool


@dataclass
class _Walk:
    """What was found in all folders that were looked through."""

    wanted: Wanted
    taken: dict[str, str] = field(default_factory=dict)  # a wanted file's real path -> as it was reached first
    again: set[str] = field(default_factory=set)  # paths that lead to wanted files which were reached otherwise
    left_out: dict[str, str] = field(default_factory=dict)  # a file's real path -> its kind
    folders: set[str] = field(default_factory=set)  # that fit, where files were looked for
    unread: dict[str, str] = field(default_factory=dict)  # folders that may not be read
    hidden: int = 0

    def __post_init__(self) -> None:
        # Two names of a pattern in a row look at the same folder, and so do all of its braces.
        self._listed = functools.lru_cache(4)(self._list)

    def files_of(self, path: str) -> list[str]:
        """The wanted files that a path or pattern means, sorted."""
        base, left = _existing("/", _parts(path))
        found: dict[str, str] = {}
        links: dict[str, str] = {}
        for pattern in _patterns("/".join(left)):
            place, names = _existing(base, pattern)
            if os.path.isfile(place) and not names:
                files, by_content = iter([(place, os.path.realpath(place), False)]), True
            else:
                if not names or names[-1] == "**":
                    names += ["*"] if names else ["**", "*"]
                parts = [_Part(name, number == len(names) - 1) for number, name in enumerate(names)]
                files, by_content = self._matching(place, parts), parts[-1].by_content
            for file, real, is_link in files:
                if kind := self.wanted.left_out(file, by_content):
                    self.left_out[real] = kind
                else:
                    (links if is_link else found).setdefault(real, file)
        # Where a file and a link to it are both meant, the file's own name is told.
        for real, file in itertools.chain(found.items(), links.items()):
            if self.taken.setdefault(real, file) != file:
                self.again.add(file)
        return sorted({self.taken[real] for real in itertools.chain(found, links)}, key=lambda file: file.split("/"))

    def _matching(self, place: str, parts: list[_Part]) -> Iterator[tuple[str, str, bool]]:
        """The files below a folder that a pattern means, their real paths and whether they are links.

        Each real folder is entered once, by its own name where there is one.
        """
        folders, linked = [(place, os.path.realpath(place), 0)], list[tuple[str, str, int]]()
        entered: set[tuple[str, int]] = set()
        while folders or linked:
            folder, real, number = (folders or linked).pop()
            if (real, number) in entered:
                continue
            entered.add((real, number))
            part = parts[number]
            deep, last = part.is_deep, part.last
            if deep:
                self.hidden += sum(_is_no_data(entry.name) for entry in self._listed(folder))
            for entry in self._listed(folder):
                if _is_no_data(entry.name) if deep else not part.fits(entry.name):
                    continue
                path = os.path.join(folder, entry.name)
                target = path if folder == real else os.path.join(real, entry.name)
                if entry.is_link:
                    target = _real(path)
                if stat.S_ISDIR(entry.kind) and (deep or not last):
                    (linked if entry.is_link else folders).append((path, target, number if deep else number + 1))
                elif stat.S_ISDIR(entry.kind):
                    self.folders.add(path)
                elif last and stat.S_ISREG(entry.kind):
                    yield path, target, entry.is_link
                elif last:
                    self.left_out[path] = "no file" if entry.kind else "dead link"
            if deep:
                folders.append((folder, real, number + 1))

    def _list(self, folder: str) -> list[_Entry]:
        try:
            with os.scandir(folder) as entries:
                return [_Entry(entry.name, _kind(entry), entry.is_symlink()) for entry in entries]
        except (PermissionError, FileNotFoundError, NotADirectoryError) as error:
            self.unread[folder] = error.strerror or type(error).__name__
            return []
        except OSError as error:
            raise InputError(
                f"{folder}: cannot be read to its end ({error.strerror}); see that its place answers, then run again"
            ) from error

    def nothing(self, path: str) -> str:
        """Why nothing was found, with what was found instead."""
        base, left = _existing("/", _parts(path))
        if left and not re.search(r"[*?\[{]", "/".join(left)):
            variable = "; variables such as $HOME are not filled in" if "$" in "/".join(left) else ""
            return f"no such directory or file, {base} has no {left[0]}{variable}"
        if not left and not os.path.isdir(base):
            suffix = os.path.splitext(base)[1].lower()
            if self.wanted.tables and suffix == ".txt":
                return "is no image; a list of paths becomes a `manifest:` by a first line, image, and the suffix .csv"
            if self.wanted.tables and suffix in _RECORDS:
                return "is no image; for a table or a tar of records write `manifest:` instead of `images:`"
            return (
                f"is no {self.wanted.one} that can be read" if os.path.isfile(base) else "is no file that can be read"
            )
        found = self._left_out() + [f"{folder} ({reason})" for folder, reason in self.unread.items()]
        if self.hidden:
            found.append(f"{self.hidden} hidden or of a file manager")
        beside = f", only {', '.join(found)}" if found else ""
        if self.wanted.tables and set(self.left_out.values()) & _RECORDS:
            beside += "; for tables or tars of records write `manifest:` instead of `images:`"
        if not left:
            return f"no {self.wanted.many} in it{beside}"
        if self.folders and not self.left_out and "**" not in left:
            return f"matches directories only, such as {min(self.folders)}; end it with /** for what is in them"
        return f"matches no {self.wanted.one} from {base}{beside}"

    def _left_out(self) -> list[str]:
        counts = Counter(kind for real, kind in self.left_out.items() if real not in self.taken)
        kinds = sorted(counts.items(), key=lambda each: (-each[1], each[0]))
        told = [f"{number} {kind if number == 1 else _PLURAL.get(kind, kind)}" for kind, number in kinds[:_KINDS_SHOWN]]
        if len(kinds) > _KINDS_SHOWN:
            told.append(f"{sum(number for _, number in kinds[_KINDS_SHOWN:])} of other kinds")
        return [printable(text) for text in told]

    def notes(self) -> Iterator[str]:
        """What of the folders was left out."""
        if told := self._left_out():
            yield f"left out: {', '.join(told)}"
        if self.again:
            links = "1 link leads" if len(self.again) == 1 else f"{len(self.again)} links lead"
            yield f"{links} to {self.wanted.many} that are there already; each {self.wanted.one} is taken once"
        if self.unread:
            named = [printable(f"{folder} ({reason})") for folder, reason in list(self.unread.items())[:_NAMES_SHOWN]]
            more = f" and {len(self.unread) - len(named)} more" if len(self.unread) > len(named) else ""
            yield f"left out, for they cannot be read: {', '.join(named)}{more}"


def _real(path: str) -> str:
    try:
        return os.path.realpath(path)
    except OSError:  # it has gone meanwhile
        return path


def _kind(entry: os.DirEntry[str]) -> int:
    try:
        if not entry.is_symlink():
            # Without asking the disk about each file.
            return stat.S_IFDIR if entry.is_dir() else stat.S_IFREG if entry.is_file() else stat.S_IFIFO
        return entry.stat().st_mode
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EACCES, errno.ENAMETOOLONG):
            return 0
        raise


def _kind_left_out(file: str, by_content: bool) -> str:
    """The kind of a file that is no image, for people; empty where it is one."""
    suffix = os.path.splitext(file)[1].lower()
    if suffix in IMAGE_SUFFIXES:
        return ""
    if (by_content or not suffix) and not _RAW.fullmatch(suffix) and looks_like_an_image(file):
        return ""
    return suffix or "without a suffix"
