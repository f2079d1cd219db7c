"""The command line: argv becomes one call of the library, and an error one message and an exit code."""

from __future__ import annotations

import io
import logging
import os
import shlex
import sys
import traceback
import warnings
from typing import NoReturn

from lowrank_tune.errors import InputError, LowrankTuneError, StudyFileError, machine_fault, redact

INTERRUPTED = 130
_TELL_THEMSELVES = {"run", "resume", "extend", "clone", "wait", "watch"}
_NARROWEST = 20


def main() -> NoReturn:
    """Run `sys.argv` and exit: 0 done, 1 failed, 2 the user's input is wrong, 130 interrupted."""
    # `--debug` is wanted after a command has failed, so it may stand anywhere on the line.
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    _mend_terminal()
    if sys.getfilesystemencoding() != "utf-8" and not sys.flags.utf8_mode:
        # Names of files are UTF-8 whatever an old locale says; what is printed stays in the terminal's own.
        encodings = {"PYTHONIOENCODING": sys.stdout.encoding, **os.environ, "PYTHONUTF8": "1"}
        os.execve(sys.executable, sys.orig_argv, encodings)
    if not debug:
        # The libraries' own chatter does not belong on the terminal.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        for name in (None, "huggingface_hub"):
            logging.getLogger(name).setLevel(logging.ERROR)
        # What of this machine Ray has to do without is told, with --quiet, too.
        logging.getLogger("lowrank_tune.runtime").setLevel(logging.WARNING)
        warnings.simplefilter("ignore")
    sys.exit(run(arguments, debug=debug))


def run(arguments: list[str], *, debug: bool = False) -> int:
    """Run argv without the program's name; returns its exit code."""
    try:
        _check_working_directory()
        code = _call(arguments)
        sys.stdout.flush()
        return code
    except Exception as error:
        if debug and not isinstance(error, StudyFileError):
            traceback.print_exc()
        if isinstance(error, LowrankTuneError):
            # Each line of a study file's errors begins with file:line, where editors jump to.
            print(error if isinstance(error, StudyFileError) else f"error: {error}", file=sys.stderr)
            return error.exit_code
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whoever read it has gone
        elif fault := machine_fault(error):
            print(redact(f"error: {fault}"), file=sys.stderr)
        else:
            print(redact(f"error: {type(error).__name__}: {error}"), file=sys.stderr)
            print(
                "This is a defect of lowrank-tune; --debug anywhere on the line shows the traceback.", file=sys.stderr
            )
        return 1


def _call(arguments: list[str]) -> int:
    from lowrank_tune.cli.app import app

    try:
        app(args=arguments, prog_name="lowrank-tune")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
        if code == INTERRUPTED and arguments[0] not in _TELL_THEMSELVES:
            line = redact(shlex.join(["lowrank-tune", *arguments]))
            print(f"interrupted; what is cached stays cached. Start again with: {line}", file=sys.stderr)
        return code
    return 0


def _mend_terminal() -> None:
    """Make do with what daemons, serial lines and old locales give: closed streams, no width, no UTF-8."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets this number, which the next file, a database maybe, would have got
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    for name in ("COLUMNS", "LINES", "TERMINAL_WIDTH"):
        value = os.environ.get(name, "")
        if not value.isdecimal() or int(value) < _NARROWEST and name != "LINES":
            os.environ.pop(name, None)


def _check_working_directory() -> None:
    try:
        os.getcwd()
    except OSError as error:
        raise InputError(f"the working directory is not there any more ({error.strerror}): cd to one that is") from None
