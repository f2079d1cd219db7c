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

import re


class LowrankTuneError(Exception):
    """The base of every deliberate error; the command line prints its message and exits with `exit_code`.

    Whatever a message quotes, an address in it shows no credentials.
    """

    exit_code = 1

    def __init__(self, *said: object) -> None:
        super().__init__(*(redact(part) if isinstance(part, str) else part for part in said))


class InputError(LowrankTuneError):
    """The user's input is wrong: fix what the message names and run again."""

    exit_code = 2


class StudyFileError(InputError):
    """The study file does not describe a study: fix every listed line.

    Args:
        problems: One text a problem, each beginning with `file:line`.
    """

    def __init__(self, problems: list[str]) -> None:
        """Keep the problems, one a line."""
        self.problems = [redact(problem) for problem in problems]
        super().__init__("\n".join(self.problems))


class CacheError(LowrankTuneError):
    """A feature cache cannot be trusted: the message says what differs and which command repairs it."""


class TrackingError(LowrankTuneError):
    """The tracking store does not answer: start it, or name another in `tracking.uri`."""


class StudyFailedError(LowrankTuneError):
    """No trial of the study gave a model: the message holds the reasons, most frequent first."""


def redact(text: str) -> str:
    """Take user names, passwords and query strings out of every address in a text, for messages and files."""
    return re.sub(r"(://[^\s?]*)\?[^\s\"']+", r"\1", re.sub(r"://[^\s\"']*@", "://", text))
