"""Hyperparameter studies of low-rank decomposition networks for visual tokens.

    from lowrank_tune import load_study, open_features, run_study

The names are loaded on first use: importing the package costs neither torch nor ray.
"""

from __future__ import annotations

import importlib
import logging
import os
import pwd
from typing import Any

__all__ = [
    "apply_decomposer",
    "attach",
    "clone_study",
    "export_study",
    "extend_study",
    "load_decomposer",
    "load_study",
    "open_features",
    "resume_study",
    "run_study",
]

_HOMES = {
    "apply_decomposer": "lowrank_tune.features.decompose",
    "attach": "lowrank_tune.fidelity.attach",
    "export_study": "lowrank_tune.export",
    "load_decomposer": "lowrank_tune.lowrank.pretrained",
    "clone_study": "lowrank_tune.study",
    "extend_study": "lowrank_tune.study",
    "resume_study": "lowrank_tune.study",
    "load_study": "lowrank_tune.config.loading",
    "open_features": "lowrank_tune.features.given",
    "run_study": "lowrank_tune.study",
}

# These libraries report their use to their makers by default, and read these variables when imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

# torch asks the system for large pages with it, where Linux leaves that to the program: a fresh batch of 32 images then
# costs a fourth, most of which is the handing out of pages.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# A proxy to the world outside knows nothing of the servers on this machine.
if any(os.environ.get(name) or os.environ.get(name.upper()) for name in ("http_proxy", "https_proxy", "all_proxy")):
    _beside = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    os.environ["no_proxy"] = ",".join(filter(None, (_beside, "localhost,127.0.0.1,::1")))

# In a container a user may have a number and nothing else; MLflow, Ray and torch then fail when imported.
try:
    pwd.getpwuid(os.getuid())
except KeyError:
    os.environ.setdefault("HOME", "/")
    os.environ.setdefault("USER", str(os.getuid()))

# transformers imports torchao, which makes torch say something to torchao's authors on the user's terminal.
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
