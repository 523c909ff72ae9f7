"""What is in the two archives that a release uploads."""

import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

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
