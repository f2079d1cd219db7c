"""`resume`, `extend` and `clone`: here, or as a job of a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def carry(
    command: str, study_id: str, address: str | None, results: Path | None, as_json: bool, **settings: Any
) -> None:
    """Go on with a study and print what came out; with the address of a job server, let its cluster do so.

    Args:
        command: `resume`, `extend` or `clone`.
        study_id: the study.
        address: `http://host:8265` of a job server; anything else is a Ray to work in.
        results: the results directory.
        as_json: print JSON.
        settings: the command's own, as the library's function has them.
    """
    if address is not None and address.startswith(("http://", "https://")):
        from lowrank_tune.cli.status import print_job
        from lowrank_tune.cluster.studies import submit_again

        print_job(submit_again(address, command, study_id, _arguments(settings), results=results), address, as_json)
        return
    from lowrank_tune.session import ray_session

    with ray_session(address, meanwhile=("torch", "pandas", "matplotlib.figure")):
        from lowrank_tune import life
        from lowrank_tune.cli.progress import shown_progress
        from lowrank_tune.cli.tables import print_result

        carry_on = {"resume": life.resume_study, "extend": life.extend_study, "clone": life.clone_study}[command]
        with shown_progress() as progress:
            result = carry_on(study_id, results=results, address=address, progress=progress, **settings)
    print_result(result, as_json)


def _arguments(settings: dict[str, Any]) -> list[str]:
    trials = ["--trials", str(settings["trials"])] if settings.get("trials") else []
    return trials + [word for text in settings.get("overrides", ()) for word in ("--set", text)]
