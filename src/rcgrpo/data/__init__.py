"""Datasets of edits: what a row must hold, and CompBench-mini, the set that ships with the package."""

from .edits import Edit, EditRows
from .mini import compbench_mini

__all__ = ["Edit", "EditRows", "compbench_mini"]
