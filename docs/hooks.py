"""What the documentation's site takes from the code: reference pages, and files that lie outside `docs/`.

MkDocs calls the functions whose names begin with `on_`. Nothing here needs MkDocs to be imported, so tests can ask what
exists.
"""

import argparse
import contextlib
import inspect
import io
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
COPIED = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
API = {
    "training": ("Training", ["rcgrpo.training.trainer.RCGRPOTrainer"]),
    "editors": (
        "Editors and pipelines",
        [
            "rcgrpo.editors.opening",
            "rcgrpo.editors.flux_kontext",
            "rcgrpo.editors.flux2_klein",
            "rcgrpo.editors.qwen_image_edit_plus",
            "rcgrpo.editors.region_decoupled",
            "rcgrpo.editors.base",
            "rcgrpo.editors.attention",
            "rcgrpo.editors.lora",
        ],
    ),
    "data": (
        "Data",
        [
            "rcgrpo.data.loading",
            "rcgrpo.data.presets",
            "rcgrpo.data.edits",
            "rcgrpo.data.mini",
            "rcgrpo.data.corruption",
            "rcgrpo.data.tux",
        ],
    ),
    "rewards": (
        "Rewards",
        [
            "rcgrpo.rewards.registry",
            "rcgrpo.rewards.builtin",
            "rcgrpo.rewards.preservation",
            "rcgrpo.rewards.clip",
            "rcgrpo.rewards.region_margin",
            "rcgrpo.rewards.judges",
            "rcgrpo.rewards.local_judge",
            "rcgrpo.rewards.judge_rewards",
            "rcgrpo.rewards.remote",
            "rcgrpo.rewards.scoring_queue",
        ],
    ),
    "maths": (
        "Maths",
        [
            "rcgrpo.maths.noise",
            "rcgrpo.maths.regions",
            "rcgrpo.maths.labels",
            "rcgrpo.maths.objective",
            "rcgrpo.maths.metrics",
        ],
    ),
    "groups": (
        "Groups",
        [
            "rcgrpo.groups.rollout",
            "rcgrpo.groups.turns",
            "rcgrpo.groups.scoring",
            "rcgrpo.groups.transitions",
            "rcgrpo.groups.policies",
            "rcgrpo.groups.diagnostics",
        ],
    ),
    "evaluation": (
        "Evaluation",
        [
            "rcgrpo.evaluation.benchmark",
            "rcgrpo.evaluation.held_out",
            "rcgrpo.evaluation.results",
            "rcgrpo.evaluation.survey",
            "rcgrpo.evaluation.one_update",
            "rcgrpo.evaluation.one_update_picture",
            "rcgrpo.reporting.statistics",
            "rcgrpo.app.comparing",
        ],
    ),
}
"""The pages of the Python reference: title, and what mkdocstrings shows there."""

VERBS = {"data": ["inspect", "masks", "build-tux"], "rewards": ["serve"]}
"""Commands that have commands."""

RUNS = ("train", "plan", "explain")
"""Commands that take the configuration."""

FROM_THE_WEB = re.compile(
    r"<(?:script|img|iframe)[^>]* src=\"?(https?:[^\" >]+)|<link[^>]*stylesheet[^>]* href=\"?(https?:[^\" >]+)"
)


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to what MkDocs found in `docs/`."""
    from mkdocs.structure.files import File

    for name, text in generated().items():
        files.append(File.generated(config, name, content=text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links that leave `docs/` lead to the repository, or are plain text where its address is not known."""
    return outward(markdown, page.file.src_uri, config.get("repo_url") or "")


def on_post_page(output: str, page: Any, config: Any) -> str:
    """The page asks no other host for scripts, so that it works offline."""
    return at_home(output, "../" * page.file.dest_uri.count("/"))


def on_post_template(output: str, template_name: str, config: Any) -> str:
    """The same of the page for what is not found."""
    return at_home(output, "")


def at_home(html: str, root: str) -> str:
    """A page with the theme's shim from beside it instead of from the web.

    Raises:
        ValueError: the page loads something else from the web, where it could not be read offline.
    """
    html = html.replace("https://unpkg.com/iframe-worker/shim", f"{root}assets/iframe-worker.js")
    if found := FROM_THE_WEB.search(html):
        url = found[1] or found[2]
        raise ValueError(f"a page loads {url}, expected nothing from the web; put the file into docs/")
    return html


def outward(markdown: str, name: str, repository: str) -> str:
    """The text of a page with its links to files outside `docs/` led to the repository's address, if there is one."""

    def lead(found: re.Match[str]) -> str:
        target = (ROOT / "docs" / name).parent.joinpath(found[2].partition("#")[0]).resolve()
        if target.is_relative_to(ROOT / "docs") and target.suffix in (".md", ".png", ".svg", ".jpg"):
            return found[0]
        inside = target.relative_to(ROOT).as_posix() if target.is_relative_to(ROOT) else ""
        return f"[{found[1]}]({repository}/blob/HEAD/{inside})" if repository and inside else found[1]

    return re.sub(r"(?<!!)\[([^][]*)\]\((?!\w+:|#)([^)\s]+)\)", lead, markdown)


def generated() -> dict[str, Callable[[], str]]:
    """Every page that is not a file in `docs/`, by name, and what writes it."""
    pages: dict[str, Callable[[], str]] = {name: lambda path=path: copied(path) for name, path in COPIED.items()}
    pages["reference/cli.md"] = command_line
    pages["reference/config.md"] = configuration
    pages["reference/names.md"] = other_names
    for key in API:
        pages[f"reference/api/{key}.md"] = lambda key=key: python_page(key)
    return pages


def copied(path: str) -> str:
    """A page of the repository's root, with its links as seen from `docs/`."""
    text = (ROOT / path).read_text()
    return re.sub(r"\]\((?!\w+:|#)([^)]+)\)", lambda found: f"]({seen_from_docs(found[1])})", text)


def seen_from_docs(link: str) -> str:
    """A link of a page in the repository's root, for a page in `docs/`."""
    return link if link.startswith("#") else link.removeprefix("docs/") if link.startswith("docs/") else f"../{link}"


def python_page(key: str) -> str:
    title, names = API[key]
    return f"# {title}\n\n" + "\n\n".join(f"::: {name}" for name in names) + "\n"


# The command line -----------------------------------------------------------------------------------------------------


def command_line() -> str:
    """Every command with its flags, as its own parser has them."""
    from rcgrpo.cli import COMMANDS

    parts = [
        "# Command line",
        "Written from the parsers. A flag is a key of `--config FILE.yaml` too; a flag or key that nobody knows is an "
        "error that names the nearest one.",
    ]
    for command, text in COMMANDS.items():
        parts += [f"## rcgrpo {command}", f"{text[0].upper()}{text[1:]}."]
        for verb in VERBS.get(command, []):
            parts += [f"### rcgrpo {command} {verb}", flags(parser_of([command, verb]))]
        if command not in VERBS:
            parts.append(flags(parser_of([command])))
        if command in RUNS:
            parts.append("And every field of [the configuration](config.md), as a flag of its name.")
    return "\n\n".join(parts) + "\n"


def parser_of(words: list[str]) -> argparse.ArgumentParser:
    """The parser that answers `rcgrpo WORDS --help`.

    Raises:
        LookupError: nothing asked a parser for help.
    """
    from rcgrpo.cli import main

    found: list[argparse.ArgumentParser] = []
    with noting(found), contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main([*words, "--help"])
    if not found:
        raise LookupError(f"rcgrpo {' '.join(words)} --help asked no parser")
    return found[-1]


@contextlib.contextmanager
def noting(found: list[argparse.ArgumentParser]) -> Iterator[None]:
    """Parsers that are asked for help are put on the list instead of printing."""
    own = argparse.ArgumentParser.print_help
    argparse.ArgumentParser.print_help = lambda self, file=None: found.append(self)  # type: ignore[assignment]
    try:
        yield
    finally:
        argparse.ArgumentParser.print_help = own  # type: ignore[method-assign]


def flags(parser: argparse.ArgumentParser) -> str:
    """A table of a parser's flags without those of the configuration, which has a page."""
    from rcgrpo.training.config import RCGRPOConfig

    a_run = parser.prog.split()[-1] in RUNS
    settings = {field.name for field in fields(RCGRPOConfig)} if a_run else set()
    rows = []
    for action in parser._actions:
        names = [name for name in action.option_strings if "-" not in name[2:]] or action.option_strings
        if action.dest not in {"help", *settings} and not names[0].startswith("--no_"):
            default = shown(action.default, action.required)
            rows.append(f"| `{'`, `'.join(names)}` | {default} | {cell(action.help or '')} |")
    return "\n".join(["| flag | default | |", "|---|---|---|", *rows])


def shown(value: Any, required: bool = False) -> str:
    if required:
        return "needed"
    return "" if value is None or value is argparse.SUPPRESS else f"`{value}`"


def cell(text: str) -> str:
    """Words as a table's cell holds them."""
    return " ".join(text.replace("%%", "%").split()).replace("|", "\\|").replace("<", "&lt;")


# The configuration ----------------------------------------------------------------------------------------------------


def configuration() -> str:
    """The fields of `RCGRPOConfig` by group, with what each may be."""
    from rcgrpo.training.config import RCGRPOConfig

    own = {field.name: field for field in fields(RCGRPOConfig)}
    from rcgrpo.training.objective_config import ObjectiveConfig

    before, logging, after = inspect.getsource(RCGRPOConfig).partition("    # Parameters that control the logging\n")
    source = before + inspect.getsource(ObjectiveConfig) + logging + after
    parts = [
        "# Configuration",
        "Written from `RCGRPOConfig`. It has all of `transformers.TrainingArguments` besides, such as `max_steps`, "
        "`seed`, `save_steps`, `report_to`, `bf16`. What the settings do and why: [algorithm](../algorithm.md); which "
        "to choose: [settings](../training.md).",
    ]
    for title, names in groups_of(source):
        rows = [config_row(own[name]) for name in names if name in own]
        parts += [f"## {title}", "\n".join(["| field | default | may be | |", "|---|---|---|---|", *rows])]
    return "\n\n".join(parts) + "\n"


def other_names() -> str:
    """What names of other libraries are called here, as error messages say it."""
    from rcgrpo.inputs.hints import HINTS, Here

    rows = []
    for name, said in sorted(HINTS.items()):
        names = ", ".join(f"`{other}`" for other in said.names) if isinstance(said, Here) else ""
        note = (said.note or said.otherwise) if isinstance(said, Here) else said
        rows.append(f"| `{name}` | {names or '–'} | {cell(note)} |")
    parts = [
        "# Names of other libraries",
        "Written from what error messages say: names of TRL, transformers, PEFT, diffusers and its training scripts, "
        "and what they are called here. Where several names stand, the command has the first that it knows. The same "
        "by library: [coming from](../coming-from.md).",
        "\n".join(["| you type | here | |", "|---|---|---|", *rows]),
    ]
    return "\n\n".join(parts) + "\n"


def groups_of(source: str) -> Iterator[tuple[str, list[str]]]:
    """Headings of the class's comments, and the fields below each."""
    titles = r"^    # (?:Parameters that control (?:the )?)?(.+)$"
    _, *pieces = re.split(titles, source, flags=re.MULTILINE)
    for title, text in zip(pieces[::2], pieces[1::2], strict=True):
        names = re.findall(r"^    (\w+): [^=\n]+ = field\(", text, flags=re.MULTILINE)
        if names:
            yield title[0].upper() + title[1:], names


def config_row(field: Field) -> str:
    from rcgrpo.inputs.ranges import RANGES

    value = field.default if field.default is not MISSING else field.default_factory()  # type: ignore[misc]
    allowed = str(RANGES[field.name]) if field.name in RANGES else kind_of(field)
    return f"| `{field.name}` | {shown(value) or 'none'} | {cell(allowed)} | {cell(field.metadata.get('help', ''))} |"


def kind_of(field: Field) -> str:
    kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
    words = {"bool": "true, false", "str": "text", "list": "a list"}
    text = re.sub(r"typing\.| ?\| None|Optional\[|NoneType", "", kind)
    return words.get(text, text)


if __name__ == "__main__":
    for page in sys.argv[1:]:
        print(generated()[page]())
