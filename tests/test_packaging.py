"""What is in the two archives that a release uploads, and the files beside them that other programs read."""

import os
import re
import shlex
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

from rcgrpo.cli.parsing import parse
from rcgrpo.cli.train import ScriptArguments
from rcgrpo.training.config import RCGRPOConfig

ROOT = Path(__file__).parents[1]
MIB = 2**20

pytestmark = pytest.mark.skipif(not find_spec("hatchling"), reason="hatchling, which builds, comes with the extra dev")


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", folder], cwd=ROOT, check=True)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def here(*folders):
    """The files of the working tree that belong to the project, by their path in it."""
    files = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}


def test_the_wheel_is_small_and_holds_the_package_alone(archives):
    wheel, _ = archives
    assert wheel.stat().st_size < 10 * MIB
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {name.removeprefix("src/") for name in here("src/rcgrpo")}
    licences = {"LICENSE", "src/rcgrpo/data/assets/LICENSES.md", "src/rcgrpo/tiny/weights/LICENSE.md"}
    licences |= {"src/rcgrpo/rewards/editscore/LICENSE"}
    inside = {name.partition("/licenses/")[2] for name in zipfile.ZipFile(wheel).namelist() if "/licenses/" in name}
    assert inside == licences


def test_the_sdist_holds_its_tests_and_what_they_read_but_no_records(archives):
    _, sdist = archives
    assert sdist.stat().st_size < 16 * MIB
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = here("src", "tests", "benchmarks", "examples") | {path.name for path in ROOT.glob("*.md")}
    assert wanted | {"pyproject.toml", "quickstart.sh", "LICENSE", ".ci/run", "docs/study.md"} <= names
    assert not [name for name in names if name.startswith("docs/study/") and not name.endswith((".md", ".png"))]


def test_the_sdist_runs_its_own_tests(archives, tmp_path):
    _, sdist = archives
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    environment = {**os.environ, "PYTHONPATH": str(source / "src")}
    own = "import rcgrpo, sys, pytest; print(rcgrpo.__file__); sys.exit(pytest.main(sys.argv[1:]))"
    call = [sys.executable, "-c", own, "-p", "no:cacheprovider", "tests", "-k", "test_regions.py or test_metrics.py"]
    done = subprocess.run(call, cwd=source, env=environment, capture_output=True, text=True)  # all are collected
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.startswith(str(source)) and re.search(r"\d+ passed, .*\d+ deselected", done.stdout)


def steps(text):
    """A Dockerfile's instructions and what they are given."""
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line and not line.startswith("#")]


def test_the_dockerfile_installs_and_runs_what_there_is():
    done = steps((ROOT / "Dockerfile").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = re.fullmatch(r"python:(\d+\.\d+)-slim", dict(done)["FROM"])[1]
    assert python in SpecifierSet(project["requires-python"])
    assert f"Programming Language :: Python :: {python}" in project["classifiers"]
    names = [name for name, _ in done]
    installs = [shlex.split(given) for name, given in done if name == "RUN" and given.startswith("pip install")]
    assert installs[0][-1] == "${TORCH}" and ("ARG", 'TORCH="torch torchvision"') in done
    extras = re.fullmatch(r"\.\[(.+)\]", installs[1][-1])[1].split(",")
    assert set(extras) <= project["optional-dependencies"].keys()
    assert names.index("COPY") < len(names) - 1 - names[::-1].index("RUN") < names.index("USER")
    (entry,), (command, *flags) = yaml.safe_load(dict(done)["ENTRYPOINT"]), yaml.safe_load(dict(done)["CMD"])
    assert entry in project["scripts"] and command == "train"
    script, config = parse((ScriptArguments, RCGRPOConfig), flags, None, "rcgrpo train")
    assert config.output_dir.startswith(dict(done)["WORKDIR"]) and script.model == "kontext-tiny"


def test_what_docker_leaves_out_is_nothing_that_a_build_needs():
    left_out = (ROOT / ".dockerignore").read_text().split()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {"pyproject.toml", project["readme"], *project["license-files"], *here("src/rcgrpo")}
    assert not [name for name in needed for pattern in left_out if Path(name).match(pattern) or name == pattern]
    assert {".git", ".venv"} <= set(left_out)


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_files_for_the_host_are_what_it_reads(path):
    read = yaml.safe_load(path.read_text())
    if path.parent.name == "workflows":
        assert read[True] and read["jobs"]  # YAML 1.1 reads the key `on` as true
        for job in read["jobs"].values():
            assert job["runs-on"] and all(("uses" in step) != ("run" in step) for step in job["steps"])
            commands = [shlex.split(step["run"]) for step in job["steps"] if "run" in step]
            assert commands and all((ROOT / command[1]).is_file() for command in commands)
    elif path.name == "config.yml":
        assert isinstance(read["blank_issues_enabled"], bool)
    else:
        assert read["name"] and read["description"] and read["body"]
        kinds = {"textarea", "input", "dropdown", "checkboxes", "markdown"}
        assert all(field["type"] in kinds and field["attributes"] for field in read["body"])
        ids = [field["id"] for field in read["body"] if field["type"] != "markdown"]
        assert len(set(ids)) == len(ids) and all(field["attributes"].get("label") for field in read["body"])
        options = [option["label"] for field in read["body"] for option in field["attributes"].get("options", ())]
        assert all((ROOT / option).is_file() for option in options)


def test_the_citation_names_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    assert (str(cited["version"]), cited["license"]) == (project["version"], project["license"])
