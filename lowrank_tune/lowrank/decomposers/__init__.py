"""Trained decomposers, one file a family."""

from lowrank_tune.lowrank.decomposers.base import Decomposer, Factors
from lowrank_tune.lowrank.decomposers.registry import FAMILIES, load_decomposer, make_decomposer, save_decomposer

__all__ = ["FAMILIES", "Decomposer", "Factors", "load_decomposer", "make_decomposer", "save_decomposer"]
