"""The house: imports run one way, no file grows without a plan, and every old name is still a door."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from rcgrpo._moved import MOVED

SOURCE = Path(importlib.import_module("rcgrpo").__file__).parent

FLOORS = [
    "inputs processes",
    "maths reporting",
    "tiny",
    "data",
    "rewards",
    "editors",
    "groups",
    "training",
    "evaluation planning",
    "app",
    "cli",
]
"""From the ground up: a wing knows those below it and its own rooms, nothing above."""

FLOOR = {wing: number for number, wings in enumerate(FLOORS) for wing in wings.split()}
SCRIPTS = {"tiny/recipe.py", "tiny/parts.py"}
"""What made the embedded editor; nothing else imports it."""

FILES = sorted(path for path in SOURCE.rglob("*.py") if path.parent != SOURCE or path.stem in FLOOR)


def wing_of(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Wings that a file imports when it runs; what only a type checker reads does not count."""
    here = path.relative_to(SOURCE).parts
    found = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = []
            if node.level:
                base = here[: len(here) - node.level]
                modules = [node.module] if node.module else [alias.name for alias in node.names]
                names = [".".join([*base, module]) for module in modules]
            elif (node.module or "").startswith("rcgrpo."):
                names = [(node.module or "").removeprefix("rcgrpo.")]
            found |= {name.split(".")[0] for name in names}
    return found & FLOOR.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_down(path: Path) -> None:
    if path.relative_to(SOURCE).as_posix() in SCRIPTS:
        pytest.skip("a script on top of the house")
    own = FLOOR[wing_of(path.relative_to(SOURCE).parts)]
    assert {wing for wing in imported(path) if FLOOR[wing] > own} == set()


def test_no_library_file_is_longer_than_a_reader_can_hold() -> None:
    lengths = {path.relative_to(SOURCE).as_posix(): len(path.read_text().splitlines()) for path in SOURCE.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


@pytest.mark.parametrize("old", sorted(MOVED))
def test_old_names_are_the_new_modules(old: str) -> None:
    assert importlib.import_module(f"rcgrpo.{old}") is importlib.import_module(f"rcgrpo.{MOVED[old]}")


def test_old_names_work_from_a_fresh_start() -> None:
    lines = "from rcgrpo.regions import grow; import rcgrpo.noise; from rcgrpo import report; rcgrpo.noise.perturb"
    subprocess.run([sys.executable, "-c", lines], check=True)


def test_importing_the_package_loads_nothing_heavy() -> None:
    lines = "import sys, rcgrpo; sys.exit(bool({'torch', 'numpy', 'diffusers', 'trl'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", lines]).returncode == 0
