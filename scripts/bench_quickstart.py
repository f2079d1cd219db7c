"""What a newcomer waits for: the quickstart twice in an empty results directory, each as a process of its own.

    .venv/bin/python scripts/bench_quickstart.py [STUDY.yaml]

Wanted: the first run ends within 4 minutes on 2 cores; the second reaches its first trial within 5 seconds; what `plan`
says before is 0.5 to 2 of what the first run takes. Run it when nothing else runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

MARKS = {"training ": "first trial", "comparing ": "comparison", "writing ": "report"}


def timed_run(study: str, results: Path) -> tuple[dict[str, float], dict[str, object]]:
    """Run a study.

    Returns:
        Seconds from the start of the process to each part of the story and to its end, and what `--json` printed.
    """
    command = [sys.executable, "-m", "lowrank_tune", "run", study, "--results", str(results), "--json"]
    started = time.perf_counter()
    seconds: dict[str, float] = {}
    with (
        tempfile.TemporaryFile("w+") as printed,
        subprocess.Popen(command, stdout=printed, stderr=subprocess.PIPE, text=True) as process,
    ):
        for line in process.stderr or ():
            text = line.split(" s  ", 1)[-1]
            for mark, name in MARKS.items():
                if text.startswith(mark):
                    seconds.setdefault(name, time.perf_counter() - started)
        process.wait()
        seconds["end"] = time.perf_counter() - started
        printed.seek(0)
        return seconds, json.load(printed)


def planned(study: str, results: Path) -> float:
    """The seconds that `plan` says a study will take."""
    command = [sys.executable, "-m", "lowrank_tune", "plan", study, "--results", str(results), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)["seconds"])


def main() -> None:
    """Print the table."""
    study = sys.argv[1] if len(sys.argv) > 1 else "studies/quickstart.yaml"
    with tempfile.TemporaryDirectory() as folder:
        estimate = planned(study, Path(folder))
        first, result = timed_run(study, Path(folder))
        second, _ = timed_run(study, Path(folder))
    table = Table(title=f"{study}: seconds from the start of the process")
    for name in ("until", "first run", "second run", "second / first"):
        table.add_column(name, justify="left" if name == "until" else "right")
    for name in first:
        table.add_row(name, f"{first[name]:.1f}", f"{second[name]:.1f}", f"{second[name] / first[name]:.2f}")
    console = Console()
    console.print(table)
    console.print(f"plan said {estimate:.0f} s: {estimate / first['end']:.2f} of what the first run took")
    trials = result["trials"]
    if isinstance(trials, list):
        console.print(f"{len(trials)} trials, {sum(trial['epochs'] for trial in trials)} epochs")


if __name__ == "__main__":
    main()
