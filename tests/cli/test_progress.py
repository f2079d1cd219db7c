"""What a running study shows: lines where there is no terminal, one view in place where there is."""

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from lowrank_tune.cli.progress import TerminalProgress
from lowrank_tune.records import TrialConfig, TrialOutcome


def begun(number: int, family: str = "sketch", rank: int = 8, **fields: Any) -> TrialConfig:
    name = f"r{rank:03d}-{family}-{number:04d}"
    return TrialConfig(name, number, 0, family, rank, 1e-3, 0.0, 4, 5, 5, **fields)


def ended(number: int, stopped_by: str = "budget", status: str = "finished", reason: str = "") -> TrialOutcome:
    best = {} if status == "failed" else {"val_residual_ratio": 1.25}
    return TrialOutcome(begun(number), status, stopped_by, 5, 4, best, str(Path("t")), 1.0, reason)  # type: ignore[arg-type]


def tell_all(progress: TerminalProgress) -> None:
    progress.stage("training 2 trials")
    progress.trials(2)
    progress.trial_started(begun(0))
    progress.trial_started(begun(1, "direct", 16))
    for epoch, ratio in ((1, 1.5), (2, 1.25)):
        progress.trial_epoch("r008-sketch-0000", epoch, {"val_residual_ratio": ratio})
    progress.trial_epoch("r016-direct-0001", 1, {"val_residual_ratio": float("nan")})
    progress.trial_ended(ended(0, "asha", "pruned"))


def test_a_study_in_bytes_tells_them_in_place_of_the_ratio() -> None:
    out = io.StringIO()
    with TerminalProgress(5, Console(file=out, width=120, force_terminal=True, highlight=False)) as progress:
        progress.trials(2)
        progress.trial_started(begun(0, "shared"))
        for size in (2048.0, 1536.0):
            figures = {"val_bytes_at_error": size, "val_residual_ratio": 1.5, "val_mse": 0.1}
            progress.trial_epoch("r008-shared-0000", 1, figures)
    assert "KiB" in out.getvalue() and "1.5" in out.getvalue() and "ρ" not in out.getvalue()
    out = io.StringIO()
    with TerminalProgress(5, Console(file=out, width=100)) as progress:
        progress.trials(2)
        for best in ({"val_bytes_at_error": 2048.0, "val_residual_ratio": 1.5, "val_mse": 0.1}, {"val_mse": 0.0125}):
            progress.trial_ended(replace(ended(0), best=best))
    first, second = out.getvalue().splitlines()
    assert "r008-sketch-0000  2.0 KiB at epoch 4 of 5" in first
    assert "r008-sketch-0000  MSE 0.0125 at epoch 4 of 5" in second


def test_plain_lines_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    with TerminalProgress(5, Console(file=out, width=100)) as progress:
        for done in (10, 11, 50, 99, 100):
            progress.images(done, 100)
        tell_all(progress)
    lines = [line.split("s  ", 1)[1] for line in out.getvalue().splitlines()]
    assert [line.split(",")[0] for line in lines] == [
        "50/100 images", "99/100 images", "100/100 images", "training 2 trials",
        "1/2 r008-sketch-0000  ρ 1.250 at epoch 4 of 5",
    ]  # fmt: skip
    assert "stopped by ASHA" in lines[-1] and "left" in lines[-1]
    assert "images/s" in lines[0]


def test_one_view_in_place_on_a_terminal() -> None:
    out = io.StringIO()
    with TerminalProgress(5, Console(file=out, width=120, force_terminal=True, highlight=False)) as progress:
        tell_all(progress)
        progress.trial_ended(ended(1, "error", "failed", reason="loss is not finite"))
        progress.trial_epoch("r016-direct-0001", 2, {"val_residual_ratio": float("nan")})
    lines = [line.split() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).splitlines()]
    assert ["8", "r008-sketch-0000", "2", "1.250"] in lines
    assert ["r016-direct-0001", "2/5", "—"] in lines
    assert any({"training", "2/2"} <= set(line) for line in lines)
    assert "1 stopped by ASHA, 1 failed" in out.getvalue()
    assert "r008-sketch-0000  ρ" not in out.getvalue(), "what ended well gets no line"
    assert "2/2 r008-sketch-0001  no model, failed: loss is not finite" in out.getvalue()


def test_what_lacks_something_that_is_required_is_no_ranks_best() -> None:
    out = io.StringIO()
    with TerminalProgress(5, Console(file=out, width=120, force_terminal=True, highlight=False)) as progress:
        progress.trials(2)
        for number, ratio, worst in ((0, 1.1, 1.9), (1, 1.3, 1.4)):
            progress.trial_started(begun(number, require={"val_residual_ratio_worst": 1.5}))
            figures = {"val_residual_ratio": ratio, "val_residual_ratio_worst": worst}
            progress.trial_epoch(f"r008-sketch-{number:04d}", 2, figures)
    lines = [line.split() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).splitlines()]
    assert ["8", "r008-sketch-0001", "2", "1.300"] in lines
    assert ["8", "r008-sketch-0000", "2", "1.100"] not in lines
