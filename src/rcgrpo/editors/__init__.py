"""The seam to a model: `encode · schedule · velocity · decode · layout`. The next editor is one more file here."""

from .cache import ConditionCache
from .flux_kontext import Conditions, FluxKontextEditor, Schedule

__all__ = ["ConditionCache", "Conditions", "FluxKontextEditor", "Schedule"]
