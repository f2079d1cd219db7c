import errno
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank_tune.cli import run
from lowrank_tune.config.render import study_schema

QUICKSTART = str(Path(__file__).parents[2] / "studies" / "quickstart.yaml")


def loaded_by(*commands: list[str]) -> set[str]:
    """The heavy libraries that these commands, one after the other in a process of their own, have loaded."""
    code = (
        "import sys, lowrank_tune.cli\n"
        f"codes = [lowrank_tune.cli.run(command) for command in {commands!r}]\n"
        "heavy = {'torch', 'ray', 'mlflow', 'transformers', 'matplotlib', 'pandas'} & set(sys.modules)\n"
        "print('heavy:', *sorted(heavy))\n"
        "sys.exit(max(codes))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].removeprefix("heavy:").split())


def test_commands_about_the_file_load_no_heavy_library() -> None:
    assert loaded_by(["--help"], ["run", "--help"], ["validate", QUICKSTART], ["schema"], ["list"]) == set()


COMMANDS = [
    "validate", "plan", "render", "schema", "run", "trial", "extract", "ui", "doctor", "compare", "visualize", "report",
    "submit", "list", "status", "logs", "wait", "stop", "resume", "extend", "clone", "reconcile", "export", "apply",
    "rm", "note", "watch",
]  # fmt: skip
FEATURES = ("features ls", "features show", "features verify", "features import", "features rm")


@pytest.mark.parametrize("command", [*COMMANDS, *FEATURES])
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command.split(), "--help"]) == 0
    assert f"Example: lowrank-tune {command}" in " ".join(capsys.readouterr().out.split())


def test_wrong_study_file_exits_2_with_its_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = tmp_path / "wrong.yaml"
    study.write_text(
        "name: wrong\nfeatures:\n  source: {samples: 9}\n  actorz: 2\n"
        "search: {space: {rank: 0, families: {sketch: }}}\n"
    )
    assert run(["validate", str(study)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "wrong.yaml:4" in lines[0]
    assert "did you mean" in lines[0]
    assert "wrong.yaml:5" in lines[1]


def test_schema_and_render_print_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == study_schema()
    assert run(["render", QUICKSTART, "--set", "training.epochs=7"]) == 0
    assert "epochs: 7" in capsys.readouterr().out


def test_unknown_command_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["valdate", QUICKSTART]) == 2
    assert "valdate" in capsys.readouterr().err


def test_unexpected_error_is_one_line_without_debug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("lowrank_tune.cli.app.load_study", broken)
    assert run(["validate", QUICKSTART]) == 1
    brief = capsys.readouterr().err
    assert "a defect" in brief
    assert "Traceback" not in brief
    assert run(["validate", QUICKSTART], debug=True) == 1
    assert "Traceback" in capsys.readouterr().err


def typed_in(environment: dict[str, str], *words: str, shell: str = "{}") -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, within a line of the shell."""
    line = shell.format(shlex.join([sys.executable, "-m", "lowrank_tune", *words]))
    return subprocess.run(["bash", "-c", line], env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("environment", "shell", "code", "said"),
    [
        ({"PYTHONIOENCODING": "ascii"}, "{}", 0, "best \\u03c1 of"),
        ({"COLUMNS": "0", "TERMINAL_WIDTH": "wide"}, "{}", 0, "Example: lowrank-tune status"),
        ({}, "{} >&-", 0, ""),
        ({}, "{} 2>&-", 0, "Example"),
        ({}, "{} | true; exit 3", 3, ""),
        ({}, "{} >/dev/full", 1, "error: No space left on device; make room there"),
        ({}, "mkdir gone; cd gone; rmdir ../gone; {}", 2, "error: the working directory is not there any more"),
    ],
    ids=["ascii", "no width", "no stdout", "no stderr", "no reader", "full", "no folder"],
)
def test_whatever_the_terminal_is_a_command_works_or_says_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], shell: str, code: int, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    package = {"PYTHONPATH": str(Path(QUICKSTART).parents[1])}
    done = typed_in(environment | package, "status", "--help", shell=shell)
    assert done.returncode == code
    assert said in done.stdout + done.stderr
    assert not {"Traceback", "defect", "Exception"} & set((done.stdout + done.stderr).replace(":", " ").split())


def test_an_old_locale_finds_a_file_with_an_accent(tmp_path: Path) -> None:
    (tmp_path / "é.yaml").write_bytes(Path(QUICKSTART).read_bytes())
    old = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = typed_in(old, "validate", str(tmp_path / "é.yaml"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\\xe9.yaml: a valid study file, quickstart\n")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/data"), "error: /data: Permission denied; let this user"),
        (OSError(errno.EMFILE, "Too many open files"), "error: Too many open files; let a process have more"),
        (OSError("the mount is gone"), "error: the mount is gone; see that its place answers"),
        (
            ValueError("I/O error: No space left (os error 28)"),
            "error: I/O error: No space left (os error 28); make room",
        ),
        (
            ValueError("(sqlite3.OperationalError) database or disk is full"),
            "error: (sqlite3.OperationalError) database",
        ),
        (MemoryError(), "error: no memory is left; free memory"),
        (ImportError("libtorch.so: failed to map", name="torch"), "error: a library cannot be loaded (libtorch.so"),
        (UnicodeEncodeError("ascii", "é", 0, 1, "no"), "error: file names cannot hold '\\xe9' in this locale"),
    ],
)
def test_a_fault_of_the_machine_is_no_defect(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, said: str
) -> None:
    def broken(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("lowrank_tune.cli.app.load_study", broken)
    assert run(["validate", QUICKSTART]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said)
