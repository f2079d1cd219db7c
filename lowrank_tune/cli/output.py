"""Results on stdout, for people or as JSON. What is slow to load is imported where a study's figures are printed."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lowrank_tune.errors import redact
from lowrank_tune.measured import Comparison, Fidelity
from lowrank_tune.records import FeatureSet, TrialOutcome

if TYPE_CHECKING:  # these load torch and what talks to a cluster
    from lowrank_tune.cluster.jobs import Job
    from lowrank_tune.cost import Check
    from lowrank_tune.study import StudyResult
    from lowrank_tune.upkeep import Removal


_NOTE_WIDTH = 60


def print_facts(facts: Mapping[str, Any]) -> None:
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        # Not a rich table: a path that wraps cannot be copied.
        for each in value if name == "notes" else (value,):
            print(f"{name.replace('_', ' '):<{width}}  {each}")


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    texts = [[name.replace("_", " ") for name in rows[0]], *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for row in texts:
        print("  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip())


def show(found: Any, as_json: bool, text: Callable[[Any], object] = print_facts) -> None:
    print(json.dumps(found, indent=2, default=_plain)) if as_json else text(found)


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def print_state(status: Mapping[str, Any]) -> None:
    print(f"{status['study_id']}: {status['state']}" + (f" ({status['reason']})" if status["reason"] else ""))


def print_studies(statuses: Sequence[Mapping[str, Any]]) -> None:
    if not statuses:
        print("no studies here yet; `lowrank-tune run STUDY.yaml` makes one")
        return
    noted = any(status["notes"] for status in statuses)
    print_rows(
        [
            {
                "study": status["study_id"],
                "state": status["state"],
                "trials": _trials(status["progress"]),
                "started": _time(status["started"]),
                "ended": _time(status["ended"]),
                "comes from": _lineage(status),
                **({"last note": _shortened(status["notes"][-1]) if status["notes"] else ""} if noted else {}),
            }
            for status in statuses
        ]
    )


def print_status(status: Mapping[str, Any]) -> None:
    progress, running = status["progress"], status["state"] == "running"
    facts = {"study": status["study_id"], "state": status["state"], "reason": status["reason"]}
    facts |= {"started": _time(status["started"]), "ended": _time(status["ended"]), "comes from": _lineage(status)}
    facts |= {"works on": status["stage"] if running else "", "trials": _trials(progress)}
    facts |= {"search": status["stopped_why"]}
    if progress:
        facts["of them"] = ", ".join(f"{progress[name]} {name}" for name in ("running", "finished", "pruned", "failed"))
        if progress["confirmations"]:
            facts["repetitions"] = f"{progress['confirmed']}/{progress['confirmations']}"
        if progress["eta_s"] is not None and running:
            facts["time left"] = f"about {timedelta(seconds=round(progress['eta_s']))}"
    facts["notes"] = status["notes"]
    print_facts({name: value for name, value in facts.items() if value})
    from lowrank_tune.report.text import leading_text

    for rank, best in progress.get("best", {}).items():
        figures = {f"val_{name}": value for name, value in best.items() if name != "trial_id"}
        print(f"rank {rank:>4}  best {leading_text(figures)}  {best['trial_id']}")


def print_removals(removals: Sequence[Removal]) -> None:
    from lowrank_tune.report.text import count, size_text

    for removal in removals:
        runs = f"; {count(removal.runs, 'run')} deleted in MLflow" if removal.runs else ""
        print(f"{removal.study_id}: removed, {size_text(removal.bytes)} are free again{runs}")
        if removal.features:
            print(f"  features {removal.features} stay, for studies share them; see `lowrank-tune features rm`")
        if removal.registered:
            print(f"  registered models stay: {', '.join(removal.registered)}")
        if removal.left:
            others = f" and {count(len(removal.left) - 1, 'other place')}" if removal.left[1:] else ""
            print(f"  files stay at {removal.left[0]}{others}; who runs the MLflow server removes them by `mlflow gc`")
    if not removals:
        print("removed already")


def _shortened(note: str) -> str:
    line = note.replace("\n", " ")
    return line if len(line) <= _NOTE_WIDTH else f"{line[: _NOTE_WIDTH - 1]}…"


def _trials(progress: Mapping[str, Any]) -> str:
    return f"{progress['done']}/{progress['trials']}" if progress else ""


def _time(text: str | None) -> str:
    return text[:19].replace("T", " ") if text else ""


def _lineage(status: Mapping[str, Any]) -> str:
    parts = [f"clone of {status['parent']}"] if status["parent"] else []
    parts += [f"extended {change['trials_before']} → {change['trials']} trials" for change in status["extensions"]]
    return ", ".join(parts)


def show_job(job: Job, address: str, as_json: bool) -> None:
    if as_json:
        show({"study_id": job.study_id, "job": job.job_id, "results": job.results}, as_json)
        return
    begun = "waits for a place on the cluster" if job.status == "PENDING" else "has begun"
    print(f"Study {job.study_id} {begun}; its results: {job.results / 'studies' / job.study_id}")
    print(f"Watch it: lowrank-tune status {job.study_id} --address {redact(address)}")
    print(f"          lowrank-tune logs {job.study_id} -f --address {redact(address)}")


def show_study(result: StudyResult, as_json: bool) -> None:
    if as_json:
        facts = {"study_id": result.study_id, "directory": result.directory, "comparison": result.comparison.rows}
        facts |= {"remarks": result.comparison.remarks, "fidelity": result.fidelity, "trials": result.outcomes}
        show(facts | {"confirmations": result.confirmations, "untracked": result.untracked}, as_json)
        return
    from lowrank_tune.report.tables import summary_table
    from lowrank_tune.report.text import training_sentence

    Console(highlight=False).print(summary_table(result.comparison))
    # The table has said what the summary's sentences on single ranks say.
    seen = (*result.fidelity.words, *result.fidelity.remarks) if result.fidelity else ()
    _print_points([training_sentence(result.outcomes), *result.comparison.remarks, *seen])
    # The command as it can be typed here: by its name when the PATH has it, else where it lies.
    beside = os.path.relpath(Path(sys.executable).parent / "lowrank-tune")
    program = "lowrank-tune" if shutil.which("lowrank-tune") else shlex.quote(beside)
    results = shlex.quote(str(result.directory.parent.parent))
    print(f"\nStudy {result.study_id}: {result.directory}")
    print(f"Report: {result.directory / 'report.html'}")
    print(f"Every method: {program} compare {result.study_id} --results {results}")
    if any(row.trial_id for row in result.comparison.rows):
        print(f"Where on an image: {program} visualize {result.study_id} --results {results} --image 0")
    print(f"Open the MLflow UI: {result.tracked_by or f'{program} ui --results {results}'}")
    if result.untracked:
        print(f"not in MLflow: {'; '.join(result.untracked)}")


def show_comparisons(
    comparisons: Mapping[str, Comparison], rank: int | None, caveats: Sequence[str], as_json: bool
) -> None:
    from lowrank_tune.report.tables import comparison_tables, studies_table
    from lowrank_tune.report.text import at_rank

    shown = {name: at_rank(comparison, rank) for name, comparison in comparisons.items()}
    if as_json:
        studies = {name: {"comparison": found.rows, "remarks": found.remarks} for name, found in shown.items()}
        show({"studies": studies, "caveats": caveats}, as_json)
        return
    alone = len(shown) == 1
    Console(highlight=False).print(comparison_tables(*shown.values()) if alone else studies_table(shown))
    said = [remark if alone else f"{name}: {remark}" for name, found in shown.items() for remark in found.remarks]
    _print_points([*caveats, *said])


def show_fidelity(fidelity: Fidelity, untracked: str, as_json: bool) -> None:
    if as_json:
        show({**asdict(fidelity), "untracked": untracked}, as_json)
        return
    print_rows(
        [
            {
                "rank": row.rank or "",
                "method": row.method,
                "form": row.form,
                "KiB": f"{row.bytes_per_image / 1024:.4g}",
                "KL": f"{row.kl_mean:.3g}",
                "answers kept": _part(1 - row.answer_flips),
                "first tokens kept": _part(1 - row.first_token_flips),
                "accuracy": _part(row.accuracy),
            }
            for row in fidelity.rows
        ]
    )
    _print_points([*fidelity.words, *fidelity.remarks])
    if untracked:
        print(f"not in MLflow: {untracked}")


def _part(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.3g} %"


def _print_points(sentences: Sequence[str]) -> None:
    for sentence in sentences:
        Console(highlight=False).print(f"- {sentence}", markup=False)


def print_trial(outcome: TrialOutcome) -> None:
    facts: dict[str, Any] = {"trial": outcome.config.trial_id, "status": outcome.status}
    facts |= {"stopped by": outcome.stopped_by, "epochs": outcome.epochs, "best epoch": outcome.best_epoch}
    facts |= {name: f"{value:.6g}" for name, value in outcome.best.items()}
    facts |= {"seconds": f"{outcome.seconds:.1f}", "directory": outcome.directory}
    print_facts(facts | ({"reason": outcome.reason} if outcome.reason else {}))


def features_facts(features: FeatureSet) -> dict[str, Any]:
    """What an extraction left."""
    facts: dict[str, Any] = {"cache": features.directory, "encoder": features.encoder, "weights": features.weights}
    facts |= {"images": len(features.rows), "quarantined": features.quarantined}
    return facts | {"shape": [features.tokens, features.dim], "dtype": features.dtype}


def factors_facts(factors: FeatureSet) -> dict[str, Any]:
    """What an application left."""
    from lowrank_tune.features.remote import coded_facts
    from lowrank_tune.lowrank.quantization import factor_bytes

    facts: dict[str, Any] = {"factors": factors.directory, "fingerprint": factors.fingerprint}
    facts |= {"images": len(factors.rows), "quarantined": factors.quarantined, "shape": [factors.tokens, factors.dim]}
    facts |= {"rank": factors.rank, "dtype": factors.dtype}
    if coded := coded_facts(factors):
        return facts | coded
    return facts | {"bytes_per_image": factor_bytes(factors.tokens, factors.dim, factors.rank, factors.dtype)}


def print_plan(facts: Mapping[str, Any]) -> None:
    """What `preview_study` found: each line a thing that a person asks, each figure with its unit."""
    from lowrank_tune.report.text import count, duration_text, size_text

    trials, repeats, images = facts["trials"], facts["confirmations_at_most"], facts["images"]
    epochs, split, (tokens, dim) = facts["epochs_at_most"] // trials, facts["split"], facts["features_shape"]
    points = ", ".join(
        f"{family} ({'has a range' if number is None else count(number, 'combination')})"
        for family, number in facts["combinations"].items()
    )
    about = {
        name: f"about {duration_text(max(0.1, facts[f'{name}seconds']))}" for name in ("", "trial_", "extraction_")
    }
    left = f"{facts['images_to_extract']} to extract, {about['extraction_']}"
    cached = f"{facts['images_cached']} of {count(images, 'image')}, {left if facts['images_to_extract'] else 'all'}"
    unusable = ", ".join(
        f"{count(number, what)}"
        for number, what in (
            (facts["records_unreadable"], "unreadable record"),
            (facts["images_quarantined"], "image in quarantine"),
        )
        if number
    )
    workers, per_gpu = facts["workers_per_trial"], facts["trials_per_gpu"]
    each = f"{workers} workers of {size_text(facts['memory_bytes_per_trial'])} each" if workers > 1 else ""
    said = {
        "study": facts["name"],
        "search": f"{facts['method']}, {count(trials, 'trial')} of {count(epochs, 'epoch')} each at most",
        "search ends": ", or ".join(facts["search_ends"]),
        "families": points,
        "repetitions": f"of the best of each rank, {count(repeats, 'training')} at most" if repeats else "",
        "epochs": f"about {facts['epochs_expected']:,} in all, at most {facts['epochs_at_most'] + repeats * epochs:,}",
        "records": f"{facts['records']:,} with {count(images, 'different image')}",
        "unusable": unusable,
        "split": f"{split['train']} images train, {split['validation']} validate, {split['test']} test",
        "features": f"{tokens} tokens × {dim} numbers an image, of {facts['encoder']} ({facts['weights']} weights)",
        "cached": cached,
        "cache": f"{facts['cache']}, {size_text(facts['cache_bytes'])} when all are in it",
        "device": facts["device"],
        "memory": each or f"{size_text(facts['memory_bytes_per_trial'])} a trial",
        "at once": count(facts["trials_at_once"], "trial") + (f", {per_gpu} fit on a GPU" if per_gpu else ""),
        "a trial": about["trial_"],
        "time": f"{about['']}, {duration_text(facts['seconds_at_most'])} if nothing is stopped early",
        "notes": facts["notes"],
    }
    if asked := facts["fidelity"]:
        said["the model"] = (
            f"asked about {count(asked['images'], 'test image')} in {count(asked['forms'], 'form')} each, "
            f"{asked['teraflop']:,.3g} TFLOP, {size_text(asked['model_bytes'])} of weights on {asked['device']}, "
            f"about {duration_text(max(0.1, asked['seconds']))}"
        )
    print_facts({name: value for name, value in said.items() if value})


def print_checks(checks: Sequence[Check]) -> None:
    console = Console(highlight=False)
    for check in checks:
        mark = "[green]ok[/green]    " if check.passed else "[red]failed[/red]"
        console.print(f"{mark}  {check.name}: ", end="")
        console.print(check.finding, markup=False, soft_wrap=True)
