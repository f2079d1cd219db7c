"""The commands of a study's life: submitted, listed, watched, stopped and gone on with."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lowrank_tune.cli import output
from lowrank_tune.cli.options import JobServer, Json, NewId, Overrides, Results, StudyFile, StudyId, StudyIds
from lowrank_tune.cli.output import show
from lowrank_tune.cli.progress import shown_progress
from lowrank_tune.errors import InputError

# Imported while Ray starts; either takes seconds.
WITH_RAY = ("torch", "optuna", "lowrank_tune.comparison.compare")

_ENDINGS = {"finished": 0, "failed": 1, "stopped": 130}
"""What `wait` and `watch` exit with."""

life_app = typer.Typer()


@life_app.command(epilog="Example: lowrank-tune submit studies/quickstart.yaml --address http://127.0.0.1:8265")
def submit(
    study: StudyFile,
    address: JobServer = None,
    overrides: Overrides = None,
    results: Results = None,
    as_json: Json = False,
) -> None:
    """Submit a study to a cluster; returns when the cluster, the results directory and MLflow were found sound."""
    from lowrank_tune.cluster.studies import submit_study

    if address is None:
        raise InputError("submit: --address is missing, the cluster's job server, such as http://127.0.0.1:8265")
    output.show_job(submit_study(address, study, overrides=overrides or (), results=results), address, as_json)


@life_app.command("list", epilog="Example: lowrank-tune list --results /data/results")
def list_all(address: JobServer = None, results: Results = None, as_json: Json = False) -> None:
    """List studies with their state, times and lineage."""
    from lowrank_tune.cluster.studies import list_studies

    show(list_studies(address=address, results=results), as_json, output.print_studies)


@life_app.command(epilog="Example: lowrank-tune status quickstart-0d1e2f3a --json")
def status(study_id: StudyId, address: JobServer = None, results: Results = None, as_json: Json = False) -> None:
    """Show where a study stands: trials, the best ρ of each rank, the time left."""
    from lowrank_tune.cluster.studies import study_status

    show(study_status(study_id, address=address, results=results), as_json, output.print_status)


@life_app.command(epilog="Example: lowrank-tune logs quickstart-0d1e2f3a -f --address http://127.0.0.1:8265")
def logs(
    study_id: StudyId,
    address: JobServer = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the study ends.")] = False,
) -> None:
    """Print what a submitted study has printed."""
    from lowrank_tune.cluster.studies import study_logs

    for piece in study_logs(study_id, address=address, follow=follow):
        print(piece, end="", flush=True)


@life_app.command(epilog="Example: lowrank-tune wait quickstart-0d1e2f3a")
def wait(study_id: StudyId, address: JobServer = None, results: Results = None, as_json: Json = False) -> None:
    """Wait until a study is over: exit code 0 finished, 1 failed, 130 stopped."""
    from lowrank_tune.cluster.studies import wait_study

    found = wait_study(study_id, address=address, results=results)
    show(found, as_json, output.print_state)
    raise typer.Exit(_ENDINGS[found["state"]])


@life_app.command(epilog="Example: lowrank-tune watch quickstart-0d1e2f3a --address http://127.0.0.1:8265")
def watch(study_id: StudyId, address: JobServer = None, results: Results = None) -> None:
    """Watch a study of another process or a cluster: its trials, live, until it is over; exit codes as of `wait`."""
    from lowrank_tune.cluster.studies import stream_study, study_status, visible_folder

    directory = visible_folder(study_id, address=address, results=results)
    if directory is None and address is not None:
        for piece in stream_study(study_id, address=address, results=results):
            print(piece, end="", flush=True)
    elif directory is not None:
        from lowrank_tune.cli.watching import show_watched
        from lowrank_tune.cluster.watching import watch_study

        show_watched(watch_study(directory.name, address=address, results=results, directory=directory))
    found = study_status(study_id, address=address, results=results)
    if directory is not None:
        output.print_state(found)
    raise typer.Exit(_ENDINGS[found["state"]])


@life_app.command(epilog="Example: lowrank-tune stop quickstart-0d1e2f3a")
def stop(study_id: StudyId, address: JobServer = None, results: Results = None, as_json: Json = False) -> None:
    """Stop a study: its trials keep what they have trained, and `resume` goes on."""
    from lowrank_tune.cluster.studies import stop_study

    show(stop_study(study_id, address=address, results=results), as_json, output.print_state)


@life_app.command(epilog="Example: lowrank-tune resume quickstart-0d1e2f3a")
def resume(study_id: StudyId, address: JobServer = None, results: Results = None, as_json: Json = False) -> None:
    """Go on with a study that was stopped or has failed; what is done is not done again."""
    _go_on("resume", study_id, address, results, as_json)


@life_app.command(
    epilog="Example: lowrank-tune extend quickstart-0d1e2f3a --trials 20 --set search.space.lr=[1e-4,1e-3]"
)
def extend(
    study_id: StudyId,
    trials: Annotated[
        int, typer.Option("--trials", min=0, metavar="N", help="How many trials to add; a grid grows with its space.")
    ] = 0,
    overrides: Overrides = None,
    address: JobServer = None,
    results: Results = None,
    as_json: Json = False,
) -> None:
    """Add trials, or a wider space, to a finished study; the searcher knows the old trials, and all are compared."""
    _go_on("extend", study_id, address, results, as_json, trials=trials, overrides=overrides or ())


@life_app.command(epilog="Example: lowrank-tune clone quickstart-0d1e2f3a --set training.epochs=40")
def clone(
    study_id: StudyId,
    overrides: Overrides = None,
    address: JobServer = None,
    results: Results = None,
    as_json: Json = False,
    new_id: NewId = "",
) -> None:
    """Run a new study from another one's file; it records its parent and the difference."""
    _go_on("clone", study_id, address, results, as_json, overrides=overrides or (), new_id=new_id)


def _go_on(
    command: str, study_id: str, address: str | None, results: str | None, as_json: bool, **settings: Any
) -> None:
    """`resume`, `extend` or `clone`: on the cluster of a job server's address, else in a Ray of this process."""
    if address is not None and address.startswith(("http://", "https://")):
        from lowrank_tune.cluster.studies import submit_again

        settings.pop("new_id", None)
        output.show_job(submit_again(address, command, study_id, results=results, **settings), address, as_json)
        return
    from lowrank_tune.runtime import ray_session

    with ray_session(address, meanwhile=WITH_RAY):
        from lowrank_tune import study

        library = {"resume": study.resume_study, "extend": study.extend_study, "clone": study.clone_study}
        with shown_progress() as progress:
            result = library[command](study_id, results=results, address=address, progress=progress, **settings)
    output.show_study(result, as_json)


@life_app.command(epilog="Example: lowrank-tune reconcile rank-sweep-0a1b2c3d")
def reconcile(study_id: StudyId, results: Results = None, as_json: Json = False) -> None:
    """Repair what MLflow holds of a study, from the study's own files; once more changes nothing."""
    from lowrank_tune.upkeep import reconcile_study

    show(reconcile_study(study_id, results), as_json)


@life_app.command(epilog="Example: lowrank-tune rm quickstart-0d1e2f3a rank-sweep-0a1b2c3d")
def rm(study_ids: StudyIds, results: Results = None, as_json: Json = False) -> None:
    """Remove studies and their runs in MLflow, without asking; not one at work, nor what others may use."""
    from lowrank_tune.upkeep import remove_studies

    show(remove_studies(study_ids, results), as_json, output.print_removals)


@life_app.command(epilog='Example: lowrank-tune note quickstart-0d1e2f3a "the first with the new photographs"')
def note(
    study_id: StudyId,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What to write down.", show_default=False)],
    results: Results = None,
    as_json: Json = False,
) -> None:
    """Write something down about a study, in its folder and in MLflow; its earlier notes stay."""
    from lowrank_tune.upkeep import note_study

    noted = note_study(study_id, text, results)
    show(noted, as_json, lambda found: output.print_facts({"study": found["study_id"], "notes": found["notes"]}))
    if noted["untracked"] and not as_json:
        typer.echo(f"not in MLflow: {noted['untracked']}; `lowrank-tune reconcile` tells it later", err=True)
