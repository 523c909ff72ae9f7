"""Region-constrained GRPO for instruction-guided image editors.

Heavy rooms load on first use, so `import rcgrpo` and the command line's help stay quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import _moved

__version__ = "0.1.0"
_moved.install()

_HOMES = {
    "RCGRPOConfig": "training.config",
    "RCGRPOTrainer": "training.trainer",
    "RegionDecoupledFlux2KleinPipeline": "editors.flux2_klein",
    "RegionDecoupledFluxKontextPipeline": "editors.flux_kontext",
    "RegionDecoupledPipeline": "editors.opening",
    "RegionDecoupledQwenImageEditPlusPipeline": "editors.qwen_image_edit_plus",
    "compbench_mini": "data",
    "load_edit_dataset": "data",
    "open_editor": "editors.opening",
    "register_reward": "rewards",
}
__all__ = [
    "RCGRPOConfig",
    "RCGRPOTrainer",
    "RegionDecoupledFlux2KleinPipeline",
    "RegionDecoupledFluxKontextPipeline",
    "RegionDecoupledPipeline",
    "RegionDecoupledQwenImageEditPlusPipeline",
    "compbench_mini",
    "load_edit_dataset",
    "open_editor",
    "register_reward",
]

if TYPE_CHECKING:
    from .data import compbench_mini, load_edit_dataset
    from .editors.flux2_klein import RegionDecoupledFlux2KleinPipeline
    from .editors.flux_kontext import RegionDecoupledFluxKontextPipeline
    from .editors.opening import RegionDecoupledPipeline, open_editor
    from .editors.qwen_image_edit_plus import RegionDecoupledQwenImageEditPlusPipeline
    from .rewards import register_reward
    from .training.config import RCGRPOConfig
    from .training.trainer import RCGRPOTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
