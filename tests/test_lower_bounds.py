"""`benchmarks/lower_bounds.py`: what is declared is what was tried."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location(
    "lower_bounds", Path(__file__).parents[1] / "benchmarks" / "lower_bounds.py"
)
lower_bounds = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lower_bounds)


def test_bounds_that_are_declared_are_those_that_passed():
    """Whoever moves one runs the script first, and writes down there what passed."""
    assert lower_bounds.lower_bounds() == lower_bounds.PASSED


def test_bounds_are_read_from_ranges_and_extras(tmp_path):
    project = tmp_path / "pyproject.toml"
    table = '[project]\nname = "x"\ndependencies = ["a>=1.2,<3", "b-c>=0.1"]\n[project.optional-dependencies]\n'
    project.write_text(table + 'serve = ["d>=2"]\ntest = ["x[serve]", "e>=7"]\n')
    assert lower_bounds.lower_bounds(project, ("serve", "test")) == {"a": "1.2", "b-c": "0.1", "d": "2", "e": "7"}
    for wrong in ("a", "a==1.2", "a>=1,>=2"):
        project.write_text(table.replace("a>=1.2,<3", wrong))
        with pytest.raises(ValueError, match=r"a: got .*expected one lower bound"):
            lower_bounds.lower_bounds(project, ())
