"""The commands of a study's life: submitted, watched, stopped, gone on with, extended, cloned."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from lowrank_tune.cli.options import JobServer, Json, NewId, Overrides, Results, StudyFile, StudyName
from lowrank_tune.errors import InputError

studies_app = typer.Typer()

Trials = Annotated[
    int, typer.Option("--trials", min=0, metavar="N", help="How many trials to add; a grid grows with its space.")
]


@studies_app.command(epilog="Example: lowrank-tune submit studies/quickstart.yaml --address http://127.0.0.1:8265")
def submit(
    study: StudyFile,
    address: JobServer = None,
    overrides: Overrides = None,
    results: Results = None,
    as_json: Json = False,
) -> None:
    """Submit a study to a cluster; returns when the cluster, the results directory and MLflow were found sound."""
    from lowrank_tune.cli.status import print_job
    from lowrank_tune.cluster.studies import submit_study

    if address is None:
        raise InputError("submit: --address is missing, the cluster's job server, such as http://127.0.0.1:8265")
    print_job(submit_study(address, study, overrides=overrides or (), results=results), address, as_json)


@studies_app.command("list", epilog="Example: lowrank-tune list --results /data/results")
def list_all(address: JobServer = None, results: Results = None, as_json: Json = False) -> None:
    """List studies with their state, times and lineage."""
    from lowrank_tune.cli.status import print_list
    from lowrank_tune.cluster.studies import list_studies

    statuses = list_studies(address=address, results=results)
    print(json.dumps(statuses, indent=2)) if as_json else print_list(statuses)


@studies_app.command(epilog="Example: lowrank-tune status quickstart-0d1e2f3a --json")
def status(study_id: StudyName, address: JobServer = None, results: Results = None, as_json: Json = False) -> None:
    """Show where a study stands: trials, the best ρ of each rank, the time left."""
    from lowrank_tune.cli.status import print_status
    from lowrank_tune.cluster.studies import study_status

    found = study_status(study_id, address=address, results=results)
    print(json.dumps(found, indent=2)) if as_json else print_status(found)


@studies_app.command(epilog="Example: lowrank-tune logs quickstart-0d1e2f3a -f --address http://127.0.0.1:8265")
def logs(
    study_id: StudyName,
    address: JobServer = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the study ends.")] = False,
) -> None:
    """Print what a submitted study has printed."""
    from lowrank_tune.cluster.directory import check_id
    from lowrank_tune.cluster.jobs import Cluster

    if address is None:
        raise InputError("logs: --address is missing; a study that `run` started prints where it was started")
    cluster = Cluster(address)
    job = cluster.latest(check_id(study_id))
    if job is None:
        raise InputError(f"study {study_id}: {cluster.shown} knows no job of it; see `lowrank-tune list`")
    for piece in cluster.follow(job.job_id) if follow else [cluster.logs(job.job_id)]:
        print(piece, end="", flush=True)


@studies_app.command(epilog="Example: lowrank-tune wait quickstart-0d1e2f3a")
def wait(study_id: StudyName, address: JobServer = None, results: Results = None, as_json: Json = False) -> None:
    """Wait until a study is over: exit code 0 finished, 1 failed, 130 stopped."""
    from lowrank_tune.cli.status import print_state
    from lowrank_tune.cluster.studies import EXIT_CODES, wait_study

    found = wait_study(study_id, address=address, results=results)
    print(json.dumps(found, indent=2)) if as_json else print_state(found)
    raise typer.Exit(EXIT_CODES[found["state"]])


@studies_app.command(epilog="Example: lowrank-tune stop quickstart-0d1e2f3a")
def stop(study_id: StudyName, address: JobServer = None, results: Results = None, as_json: Json = False) -> None:
    """Stop a study: its trials keep what they have trained, and `resume` goes on."""
    from lowrank_tune.cli.status import print_state
    from lowrank_tune.cluster.studies import stop_study

    found = stop_study(study_id, address=address, results=results)
    print(json.dumps(found, indent=2)) if as_json else print_state(found)


@studies_app.command(epilog="Example: lowrank-tune resume quickstart-0d1e2f3a")
def resume(study_id: StudyName, address: JobServer = None, results: Results = None, as_json: Json = False) -> None:
    """Go on with a study that was stopped or has failed; what is done is not done again."""
    from lowrank_tune.cli.carrying import carry

    carry("resume", study_id, address, results, as_json)


@studies_app.command(
    epilog="Example: lowrank-tune extend quickstart-0d1e2f3a --trials 20 --set search.space.lr=[1e-4,1e-3]"
)
def extend(
    study_id: StudyName,
    trials: Trials = 0,
    overrides: Overrides = None,
    address: JobServer = None,
    results: Results = None,
    as_json: Json = False,
) -> None:
    """Add trials, or a wider space, to a finished study; the searcher knows the old trials, and all are compared."""
    from lowrank_tune.cli.carrying import carry

    carry("extend", study_id, address, results, as_json, trials=trials, overrides=overrides or ())


@studies_app.command(epilog="Example: lowrank-tune clone quickstart-0d1e2f3a --set training.epochs=40")
def clone(
    study_id: StudyName,
    overrides: Overrides = None,
    address: JobServer = None,
    results: Results = None,
    as_json: Json = False,
    new_id: NewId = "",
) -> None:
    """Run a new study from another one's file; it records its parent and the difference."""
    from lowrank_tune.cli.carrying import carry

    carry("clone", study_id, address, results, as_json, overrides=overrides or (), new_id=new_id)
