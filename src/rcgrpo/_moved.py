"""Earlier homes of modules, so that `from rcgrpo.regions import grow` goes on working after the house was put in order.

An old name is the module in its new place, no copy of it. `MOVED` has all of them; `rcgrpo/__init__.py` lets them in.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "regions": "maths.regions",
    "labels": "maths.labels",
    "noise": "maths.noise",
    "objective": "maths.objective",
    "metrics": "maths.metrics",
    "report": "reporting.statistics",
    "sheets": "reporting.sheets",
    "gallery": "reporting.gallery",
    "attention": "editors.attention",
    "pipeline": "editors",
    "models": "training.model",
    "data.make_masks": "editors.make_masks",
    "rollout": "groups.rollout",
    "turns": "groups.turns",
    "transitions": "groups.transitions",
    "policies": "groups.policies",
    "diagnostics": "groups.diagnostics",
    "config": "training.config",
    "trainer": "training.trainer",
    "saving": "training.saving",
    "hub": "training.hub",
    "completions": "training.completions",
    "log": "training.log",
    "benchmark": "evaluation.benchmark",
    "results": "evaluation.results",
    "compbench": "evaluation.compbench",
    "survey": "evaluation.survey",
    "diagnosis": "evaluation.diagnosis",
}
_ROOT = __name__.rpartition(".")[0]


class _OldNames(MetaPathFinder, Loader):
    """Finds a module under its old name and puts the one from its new home there."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name.removeprefix(f"{_ROOT}.") in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        sys.modules[name] = import_module(f"{_ROOT}.{MOVED[name.removeprefix(f'{_ROOT}.')]}")


def install() -> None:
    """Let old names be found, after everything that is really there."""
    if not any(isinstance(finder, _OldNames) for finder in sys.meta_path):
        sys.meta_path.append(_OldNames())
