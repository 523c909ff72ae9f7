"""The seam to a model: `encode · schedule · velocity · decode`. The next editor is one more file here."""

from .cache import ConditionCache
from .conditions import Conditions
from .flux_kontext import FluxKontextEditor, RegionDecoupledFluxKontextPipeline
from .opening import RegionDecoupledPipeline, open_editor
from .protocols import Editor
from .region_decoupled import RegionDecoupledPipelineOutput
from .schedule import Schedule

__all__ = [
    "ConditionCache",
    "Conditions",
    "Editor",
    "FluxKontextEditor",
    "RegionDecoupledFluxKontextPipeline",
    "RegionDecoupledPipeline",
    "RegionDecoupledPipelineOutput",
    "Schedule",
    "open_editor",
]
