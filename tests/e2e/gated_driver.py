"""A study's driver that halts at the second epoch of a trial, until it is killed or gets a signal.

python -m tests.e2e.gated_driver run|resume FILE|ID RESULTS TRIAL REACHED ADDRESS
"""

import select
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from lowrank_tune import resume_study, run_study
from lowrank_tune.cli import INTERRUPTED
from lowrank_tune.records import StudyProgress

command, study, results, trial, reached, address = sys.argv[1:]
arrived, woken = socket.socketpair()
woken.setblocking(False)
signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)


class Gate(StudyProgress):
    def stage(self, text: str) -> None:
        print(text, file=sys.stderr)

    def trial_epoch(self, trial_id: str, epoch: int, metrics: dict[str, Any]) -> None:
        if epoch == 2 and trial_id.endswith(f"-{int(trial):04d}"):
            Path(reached).touch()
            select.select([arrived], [], [])


try:
    {"run": run_study, "resume": resume_study}[command](study, results=results, address=address, progress=Gate())
except KeyboardInterrupt:
    sys.exit(INTERRUPTED)
