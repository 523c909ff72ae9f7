"""The documentation holds together: pages, links and anchors exist, code blocks are code, those that can run here do.

Nothing here needs MkDocs; `bash quickstart.sh docs` builds the site with it.
"""

import ast
import importlib
import json
import re
import runpy
import shlex
import tomllib
import unicodedata
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from rcgrpo.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="the documentation is not beside the tests")

PAGES = [*sorted(DOCS.rglob("*.md")), *sorted(ROOT.glob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
PAGES += sorted((ROOT / "benchmarks").rglob("README.md"))
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
NOT_RUN = {
    "add-an-editor.md": {0: "a sketch of FLUX.1-Kontext's own file"},
    "app.md": {0: "weights of 12 B"},
    "data.md": {0: "a pack that is built from what a network brings"},
    "datasets.md": {0: "the Hub", 1: "a data set of yours", 2: "the Hub"},
    "editors.md": {0: "weights of 4 B"},
    "evaluation.md": {0: "weights of 12 B"},
    "judges.md": {2: "an excerpt of a loop"},
    "long-runs.md": {0: "a run of yours"},
    "regions.md": {0: "pictures of yours"},
    "rewards.md": {2: "CLIP, from the Hub"},
}
"""Blocks of Python, by page and number, that cannot run here, and what they would take. All others do."""

TESTED = {"tutorial.md"}
"""Pages with a test of their own."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def hooks() -> dict:
    return runpy.run_path(str(DOCS / "hooks.py"))


def blocks(path: Path, language: str) -> list[str]:
    return [code for _, found, code in FENCE.findall(path.read_text()) if found == language]


def anchors(path: Path) -> set[str]:
    """What a link may lead to: headings whose anchor is the same on the site and on GitHub."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text()), flags=re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
        site = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())
        github = re.sub(r"[^\w\s-]", "", text).strip().lower().replace(" ", "-")
        found |= {site} & {github}
    return found


def nav(entries: list) -> list[str]:
    pages = []
    for entry in entries:
        content = next(iter(entry.values())) if isinstance(entry, dict) else entry
        pages += nav(content) if isinstance(content, list) else [content]
    return pages


class Loader(yaml.SafeLoader):
    """Reads `!ENV` as text."""


Loader.add_constructor("!ENV", lambda loader, node: loader.construct_sequence(node))


def test_every_page_has_one_place_in_the_navigation() -> None:
    listed = nav(yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"])
    written = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert sorted(listed) == sorted({*written, *hooks()["generated"]()})


def test_the_reference_says_what_names_of_others_are_called() -> None:
    page = hooks()["other_names"]()
    assert "| `clip_range` | `epsilon` |" in page and "| `top_p` | – | there are no generated tokens here" in page


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    generated, lost = hooks()["generated"](), []
    for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", FENCE.sub("", path.read_text())):
        where, _, anchor = link.partition("#")
        target = (path.parent / where).resolve() if where else path
        inside = target.relative_to(DOCS).as_posix() if target.is_relative_to(DOCS) else ""
        if target.exists():
            found = not anchor or (target.suffix == ".md" and anchor in anchors(target))
        else:
            found = inside in generated and not anchor
        lost += [] if found else [link]
    assert lost == []


def test_the_contributors_tree_has_every_wing() -> None:
    tree = FENCE.search((ROOT / "CONTRIBUTING.md").read_text().partition("## The tree")[2])[3]
    wings = [path.parent.name for path in (ROOT / "src" / "rcgrpo").glob("*/__init__.py")]
    shown = re.findall(r"^[├└]── (\w+)/", tree, flags=re.MULTILINE)
    assert set(wings) <= set(shown)


def test_the_code_names_pages_that_exist() -> None:
    sources = [path for wing in ("src", "benchmarks", "examples") for path in (ROOT / wing).rglob("*.*")]
    texts = {name_of(path): path.read_text() for path in sources if path.suffix in (".py", ".yaml", ".md")}
    named = {(name, page) for name, text in texts.items() for page in re.findall(r"\bdocs/[\w/-]+\.md", text)}
    assert named and {(name, page) for name, page in named if not (ROOT / page).exists()} == set()


@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path, "python")], ids=name_of)
def test_code_blocks_are_code_and_import_what_there_is(path: Path) -> None:
    for code in blocks(path, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rcgrpo":
                module = importlib.import_module(str(node.module))
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert missing == [], f"{node.module} has no {missing}"


def follow(text: str) -> None:
    """Do what a page says: its Python, and the lines that begin with `rcgrpo`, one after another, here."""
    names: dict = {"__name__": "page"}
    for _, language, code in FENCE.findall(text):
        if language == "python":
            exec(compile(code, "page", "exec"), names)
        for line in code.splitlines() if language == "bash" else []:
            if line.startswith("rcgrpo "):
                main(shlex.split(line, comments=True)[1:])


@pytest.mark.parametrize("name", sorted({path.name for path in DOCS.glob("*.md") if blocks(path, "python")} - TESTED))
def test_python_of_a_page_runs_block_after_block(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written, left_out = blocks(DOCS / name, "python"), NOT_RUN.get(name, {})
    assert set(left_out) <= set(range(len(written)))
    code = "\n".join(f"```python\n{text}```" for i, text in enumerate(written) if i not in left_out)
    follow(code.replace('compbench_mini("test", 12)', 'compbench_mini("test", 2)').replace("_steps=8", "_steps=1"))


def commands(path: Path) -> list[list[str]]:
    """What a page's shell lines hand to `rcgrpo`, also behind a launcher or variables."""
    code = "\n".join(blocks(path, "bash")).replace("\\\n", " ")
    found = re.findall(r"^(?:[^#\n]* )?rcgrpo(?:\.cli)? (.*)$", code, flags=re.MULTILINE)
    words = [shlex.split(line, comments=True) for line in found]
    return [given for given in words if given and given[0] in COMMANDS]


@pytest.mark.parametrize("path", [path for path in PAGES if commands(path)], ids=name_of)
def test_commands_have_the_flags_that_a_page_gives_them(path: Path) -> None:
    parser_of = hooks()["parser_of"]
    for words in commands(path):
        flags = {word.partition("=")[0] for word in words if word.startswith("--")}
        command = words[:2] if words[0] in ("data", "rewards") else [words[0], *({"--gradient"} & flags)]
        known = parser_of(command)._option_string_actions.keys() | {"--config", "--gradient"}
        assert flags <= known, " ".join(words)


SMALLER = {
    'compbench_mini("train", 96)': 'compbench_mini("train", 8)',
    "per_device_train_batch_size=4": "per_device_train_batch_size=1",
    "num_generations=12": "num_generations=4",
    "logging_steps=5": "logging_steps=1",
    'compbench_mini("test", 6)': 'compbench_mini("test", 2)',
    "--num_samples 24": "--num_samples 2",
    "--num_samples 4 ": "--num_samples 2 ",
}


def test_the_tutorial_works_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = re.sub(r"max_steps=\d+", "max_steps=1", (DOCS / "tutorial.md").read_text())
    for large, small in SMALLER.items():
        assert text.count(large) == 1
        text = text.replace(large, small)
    monkeypatch.chdir(tmp_path)
    follow(text)
    assert len(list(Path("my-edits").iterdir())) == 3 * 8 + 1 and Path("sheet.png").exists()
    assert list(Path("runs/warm/completions").glob("*.jpg")) and Path("before_after.png").exists()
    results = json.loads(Path("runs/warm-evaluation/results.json").read_text())
    assert results["contenders"] == ["base", "warm"]


def test_the_reference_has_every_field_of_the_configuration() -> None:
    from rcgrpo.training.config import RCGRPOConfig
    from rcgrpo.training.objective_config import ObjectiveConfig

    rows = re.findall(r"^\| `(\w+)` \|", hooks()["configuration"](), flags=re.MULTILINE)
    named = RCGRPOConfig.__annotations__ | ObjectiveConfig.__annotations__
    own = {name for name in named if not name.startswith("_")}
    assert set(rows) == own <= {field.name for field in fields(RCGRPOConfig)} and len(rows) == len(own)


def test_the_reference_has_a_commands_flags_with_their_defaults() -> None:
    table = hooks()["flags"](hooks()["parser_of"](["edit"]))
    assert "| `--image` |  | The picture to edit; kontext-tiny" in table and "| `--edit_strength` | `0.5` |" in table
    assert "| `--dataset`, `--name` | needed |" in hooks()["flags"](hooks()["parser_of"](["data", "inspect"]))
    assert "--help" not in table


def test_the_licence_of_every_package_that_is_asked_for_is_stated_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(need for extra in project["optional-dependencies"].values() for need in extra)]
    needed = {re.match(r"[\w.-]+", need)[0] for need in asked} - {"rcgrpo"}
    table = (DOCS / "licences.md").read_text().partition("## Packages that rcgrpo asks for")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]+) \| [^|]+ \| [^|]+ \|$", table, flags=re.MULTILINE)
    stated = [name for names in rows for name in re.findall(r"`([^`]+)`", names)]
    assert sorted(stated) == sorted(needed)


def test_links_out_of_the_docs_lead_to_the_repository_or_are_plain_text() -> None:
    outward = hooks()["outward"]
    text = "[a](../src/x.py) [b](masks.md#c) ![p](images/p.png) [w](https://w.org) [h](#h)"
    kept = "[b](masks.md#c) ![p](images/p.png) [w](https://w.org) [h](#h)"
    assert outward(text, "masks.md", "") == f"a {kept}"
    assert outward(text, "masks.md", "https://host/me") == f"[a](https://host/me/blob/HEAD/src/x.py) {kept}"


def test_pages_of_the_root_keep_their_links() -> None:
    seen = hooks()["seen_from_docs"]
    assert [seen(link) for link in ("docs/masks.md#a", "src/rcgrpo", "#a")] == ["masks.md#a", "../src/rcgrpo", "#a"]


def test_a_page_loads_nothing_from_the_web() -> None:
    at_home = hooks()["at_home"]
    page = '<script src="https://unpkg.com/iframe-worker/shim"></script><a href="https://w.org">w</a>'
    assert '<script src="../assets/iframe-worker.js">' in at_home(page, "../")
    for tag in ('<script async src="https://w.org/x.js">', '<link rel="stylesheet" href="https://w.org/x.css">'):
        with pytest.raises(ValueError, match=r"loads https://w\.org/x"):
            at_home(tag, "")
