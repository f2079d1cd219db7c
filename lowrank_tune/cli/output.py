"""Facts and lists on stdout; needs nothing that is slow to load."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.table import Table

from lowrank_tune.cluster.jobs import Job
from lowrank_tune.errors import redact


def print_facts(facts: Mapping[str, Any]) -> None:
    """Print names and values in two columns."""
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        # Not a rich table: a path that wraps cannot be copied.
        print(f"{name.replace('_', ' '):<{width}}  {value}")


def print_caches(caches: Sequence[Mapping[str, Any]]) -> None:
    """Print a line a feature cache."""
    if not caches:
        Console(highlight=False).print("no feature caches here yet; `lowrank-tune extract STUDY.yaml` makes one")
        return
    table = Table(box=None, pad_edge=False)
    for name in caches[0]:
        table.add_column(name.replace("_", " "))
    for cache in caches:
        table.add_row(*(str(value) for value in cache.values()))
    Console(highlight=False).print(table)


_COLUMNS = ("study", "state", "trials", "started", "ended", "comes from")


def print_job(job: Job, address: str, as_json: bool) -> None:
    """Print what was submitted, and how to watch it."""
    shown = redact(address)
    if as_json:
        print(json.dumps({"study_id": job.study_id, "job": job.job_id, "results": str(job.results)}, indent=2))
        return
    begun = "waits for a place on the cluster" if job.status == "PENDING" else "has begun"
    print(f"Study {job.study_id} {begun}; its results: {job.results / 'studies' / job.study_id}")
    print(f"Watch it: lowrank-tune status {job.study_id} --address {shown}")
    print(f"          lowrank-tune logs {job.study_id} -f --address {shown}")


def print_state(status: Mapping[str, Any]) -> None:
    """Print a study's state in a line, and its reason where there is one."""
    print(f"{status['study_id']}: {status['state']}" + (f" ({status['reason']})" if status["reason"] else ""))


def print_list(statuses: Sequence[Mapping[str, Any]]) -> None:
    """Print a line a study."""
    if not statuses:
        print("no studies here yet; `lowrank-tune run STUDY.yaml` makes one")
        return
    rows = [_COLUMNS, *(_row(status) for status in statuses)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    for row in rows:
        # Not a rich table: an id that wraps cannot be copied.
        print("  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip())


def print_status(status: Mapping[str, Any]) -> None:
    """Print all of a study's status."""
    progress = status["progress"]
    facts = {"study": status["study_id"], "state": status["state"], "reason": status["reason"]}
    facts |= {"started": _time(status["started"]), "ended": _time(status["ended"]), "comes from": _lineage(status)}
    facts |= {"works on": status["stage"] if status["state"] == "running" else "", "trials": _trials(progress)}
    if progress:
        counts = [f"{progress[name]} {name}" for name in ("running", "finished", "pruned", "failed")]
        facts["of them"] = ", ".join(counts)
        if progress["confirmations"]:
            facts["repetitions"] = f"{progress['confirmed']}/{progress['confirmations']}"
        if progress["eta_s"] is not None and status["state"] == "running":
            facts["time left"] = f"about {timedelta(seconds=round(progress['eta_s']))}"
    facts = {name: value for name, value in facts.items() if value}
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")
    for rank, best in progress.get("best", {}).items():
        print(f"rank {rank:>4}  best ρ {best['residual_ratio']:.4f}  {best['trial_id']}")


def _row(status: Mapping[str, Any]) -> tuple[str, ...]:
    times = _time(status["started"]), _time(status["ended"])
    return status["study_id"], status["state"], _trials(status["progress"]), *times, _lineage(status)


def _trials(progress: Mapping[str, Any]) -> str:
    return f"{progress['done']}/{progress['trials']}" if progress else ""


def _time(text: str | None) -> str:
    return text[:19].replace("T", " ") if text else ""


def _lineage(status: Mapping[str, Any]) -> str:
    parts = [f"clone of {status['parent']}"] if status["parent"] else []
    parts += [
        f"extended {extension['trials_before']} → {extension['trials']} trials" for extension in status["extensions"]
    ]
    return ", ".join(parts)
