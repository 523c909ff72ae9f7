"""The seam to a model: `encode · schedule · velocity · decode`. The next editor is one more file here."""

from .cache import ConditionCache
from .conditions import Conditions
from .flux_kontext import FluxKontextEditor
from .opening import RegionDecoupledPipeline, open_editor
from .protocols import Editor
from .schedule import Schedule

__all__ = [
    "ConditionCache",
    "Conditions",
    "Editor",
    "FluxKontextEditor",
    "RegionDecoupledPipeline",
    "Schedule",
    "open_editor",
]
