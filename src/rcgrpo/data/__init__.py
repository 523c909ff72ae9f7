"""Datasets of edits: what a row must hold, and CompBench-mini, the set that ships with the package."""

from .corruption import corrupt_dataset
from .edits import Edit, EditRows
from .loading import load_edit_dataset
from .mini import compbench_mini

__all__ = ["Edit", "EditRows", "compbench_mini", "corrupt_dataset", "load_edit_dataset"]
