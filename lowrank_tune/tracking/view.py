"""A view of an experiment's runs, prepared for comparing trials, as MLflow's pages read it from one of its tags.

It is what "Save as new view" of MLflow 3.17 keeps there: the columns of the table, the order of its rows, and charts.
A page that knows no such view shows the plain list.
"""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

from lowrank_tune.config.axes import FamiliesSpec
from lowrank_tune.records import CONTROLS

VIEW = "lowrank-trials"
TAG = f"mlflow.sharedViewState.{VIEW}"
_NAME = "Trials of lowrank_tune"
_SECTION = "lowrank-charts"
_BEST = "best_val_residual_ratio"
_COLUMNS = ("params.`rank`", "params.`family`", "params.`lr`", f"metrics.`{_BEST}`", "tags.`lowrank.stopped_by`")
_MOST_RUNS = 100


def prepared_view(at: int) -> str:
    """The tag's value, made at this moment in milliseconds since 1970."""
    methods = ("svd", *FamiliesSpec.model_fields, *CONTROLS)
    charts = [
        _chart("PARALLEL", "coordinates", selectedParams=["rank", "family", "lr"], selectedMetrics=[_BEST]),
        _line("epochs", "ρ of the validation images by epoch", ["val_residual_ratio"]),
        *(
            _line(figure, f"{name} of the test images by rank", [f"test.{method}.{figure}" for method in methods])
            for figure, name in (("residual_ratio", "ρ"), ("token_cosine", "Token cosine"))
        ),
    ]
    section = {"uuid": _SECTION, "name": _NAME, "display": True, "isReordered": False, "deleted": False}
    state = {
        # By this order trials stand alone, the best first, and not folded below their study.
        "orderByKey": f"metrics.`{_BEST}`",
        "orderByAsc": True,
        "selectedColumns": _COLUMNS,
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": charts,
        "compareRunSections": [section | {"isGenerated": False}],
        "isAccordionReordered": True,  # or this section would come after those that MLflow makes
    }
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    return json.dumps({"name": _NAME, "createdAt": at, "updatedAt": at, "state": f"deflate;{packed}"})


def _line(name: str, title: str, metrics: list[str]) -> dict[str, Any]:
    points = {"displayPoints": True, "lineSmoothness": 0, "xAxisKey": "step", "scaleType": "linear"}
    shown = {"xAxisScaleType": "linear", "yAxisKey": "metric", "yAxisExpressions": [], "range": {}}
    named = {"displayName": title, "metricKey": metrics[0], "selectedMetricKeys": metrics}
    return _chart("LINE", name, **named, **points, **shown, useGlobalXaxisKey=True, useGlobalLineSmoothing=True)


def _chart(kind: str, name: str, **settings: Any) -> dict[str, Any]:
    place = {"uuid": f"lowrank-{name}", "metricSectionId": _SECTION, "deleted": False, "isGenerated": False}
    return {"type": kind, **place, "runsCountToCompare": _MOST_RUNS, "showAllRuns": False, **settings}
