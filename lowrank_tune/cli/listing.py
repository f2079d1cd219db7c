"""Facts and lists on stdout; needs nothing that is slow to load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


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
