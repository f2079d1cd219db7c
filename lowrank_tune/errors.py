"""The errors that the service raises on purpose.

    LowrankTuneError            exit code 1: the work failed
    ├── InputError              exit code 2: the user's input is wrong; the message says what to change
    │   └── StudyFileError      the study file; carries every problem found, each with file:line
    ├── CacheError              a feature cache is unsealed, mismatched or damaged; extract or import it again
    ├── TrackingError           the MLflow server or database does not answer
    └── StudyFailedError        the study ended without a single usable trial

A message names the thing, the place and the remedy, in that order; a traceback needs `--debug`.
"""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable


class LowrankTuneError(Exception):
    """The base of every deliberate error; an address in its message shows no credentials."""

    exit_code = 1

    def __init__(self, *said: object) -> None:
        super().__init__(*(printable(redact(part)) if isinstance(part, str) else part for part in said))


class InputError(LowrankTuneError):
    """The user's input is wrong: fix what the message names."""

    exit_code = 2


class StudyFileError(InputError):
    """The study file does not describe a study: fix every listed line, each `file:line: …`."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = [redact(problem) for problem in problems]
        super().__init__("\n".join(self.problems))


class CacheError(LowrankTuneError):
    """A feature cache cannot be trusted: repair it by the command in the message."""


class TrackingError(LowrankTuneError):
    """The tracking store does not answer: start it, or name another in `tracking.uri`."""


class StudyFailedError(LowrankTuneError):
    """No trial gave a model: the message holds the reasons, most frequent first."""


def redact(text: str) -> str:
    """Take user names, passwords and query strings out of every address in a text; a file's has none."""
    return re.sub(r"(://[^\s?]*)\?[^\s\"']+", r"\1", re.sub(r"(?<!file)(?<!sqlite)://\S*@", "://", text))


def printable(text: str) -> str:
    """Show as escapes what no terminal or table takes: bytes of a name that are not UTF-8, and control characters."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", _escape, text)


def _escape(character: re.Match[str]) -> str:
    code = ord(character[0])
    # Python keeps a byte of a name that is not UTF-8 as one half of a surrogate pair.
    return f"\\x{code & 0xFF:02x}" if code < 0x80 or 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


def is_utf8(text: str) -> bool:
    """Whether a text can be written: not with a byte of a name that is no UTF-8, nor half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def writable(text: str) -> str:
    """The text with escapes for what `is_utf8` finds in it."""
    return text.encode("utf-8", "backslashreplace").decode()


def unescaped(text: str) -> str:
    """The name that `printable` showed so, bytes that are not UTF-8 as Python keeps them."""
    return re.sub(r"\\x([01][0-9a-f]|7f|[89a-f][0-9a-f])", _character, text)


def _character(escape: re.Match[str]) -> str:
    code = int(escape[1], 16)
    return chr(code if code < 0x80 else 0xDC00 + code)


def did_you_mean(name: str, others: Iterable[str]) -> str:
    """Return the end of a message, which asks for the name that is most like this one; empty where none is."""
    near = difflib.get_close_matches(name, list(others), n=1)
    return f"; did you mean {near[0]}?" if near else ""


_ELSEWHERE = "or choose another place (--results, TMPDIR)"
_LOOK = "see that its place answers; --debug shows where this happened"
_REMEDIES = {
    errno.ENOSPC: f"make room there, {_ELSEWHERE}",
    errno.EDQUOT: f"make room there, {_ELSEWHERE}",
    errno.EFBIG: f"lift the limit on a file's size (`ulimit -f`), {_ELSEWHERE}",
    errno.EACCES: f"let this user read and write there, {_ELSEWHERE}",
    errno.EPERM: f"let this user read and write there, {_ELSEWHERE}",
    errno.EROFS: f"it is mounted for reading only: mount it otherwise, {_ELSEWHERE}",
    errno.EMFILE: "let a process have more files open: `ulimit -n 4096`",
    errno.ENFILE: "this machine has too many files open: end what holds them",
    errno.ENOMEM: "free memory, or lift its limit (`ulimit -v`, the container's or the job's)",
    errno.EAGAIN: "free memory or let this user have more processes (`ulimit -u`)",
}


def machine_fault(error: Exception) -> str:
    """What is wrong with the machine or the installation, and the remedy; empty where neither is."""
    match error:
        case OSError():
            reason = error.strerror or str(error).strip() or type(error).__name__
            place = f"{error.filename}: " if error.filename else ""
            remedy = _REMEDIES.get(error.errno or 0, _LOOK)
            return f"{place}{reason}; {remedy}"
        case MemoryError():
            return f"no memory is left ({error}); {_REMEDIES[errno.ENOMEM]}".replace(" ()", "")
        case ImportError() if not (error.name or "").startswith("lowrank_tune"):
            return f"a library cannot be loaded ({error}): install lowrank-tune again, or lift the limit on memory"
        case UnicodeEncodeError() if error.encoding.lower() != "utf-8":
            characters = ascii(error.object[error.start : error.end])
            return f"file names cannot hold {characters} in this locale: set PYTHONUTF8=1, or LC_ALL=C.UTF-8"
    # Libraries in Rust and sqlite wrap the system's errors in their own.
    said = " ".join(str(error).split())
    if number := re.search(r"\(os error (\d+)\)|\[Errno (\d+)\]", said):
        return f"{said}; {_REMEDIES.get(int(number[1] or number[2]), _LOOK)}"
    return f"{said}; {_REMEDIES[errno.ENOSPC]}" if "disk is full" in said else ""
