"""Write what `rcgrpo plan` says into the headers of the recipes: `python benchmarks/plan_headers.py`.

A header names the command, `#     rcgrpo plan --config NAME.yaml ...`; the comment lines after it, up to an empty one,
are what it printed.
"""

import contextlib
import io
import os
import re
import shlex
from importlib.resources import files
from pathlib import Path

from rcgrpo.cli import main
from rcgrpo.rewards.judges import URL_VARIABLE

COMMAND = re.compile(r"^#     rcgrpo (plan .*)\n#\n((?:#     .*\n)*)", re.MULTILINE)


def planned(path: Path, command: str) -> str:
    """What the command of a recipe's header prints."""
    arguments = [str(path) if word == path.name else word for word in shlex.split(command)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(arguments)
    return printed.getvalue()


if __name__ == "__main__":
    os.environ.pop(URL_VARIABLE, None)  # whether a judge is served is for a recipe to say
    for path in sorted(Path(str(files("rcgrpo") / "recipes")).glob("*.yaml")):
        text = path.read_text()
        if found := COMMAND.search(text):
            said = planned(path, found[1])
            print(f"{path.stem}\n{said}")
            lines = "".join(f"#     {line}\n" for line in said.splitlines())
            path.write_text(text[: found.start(2)] + lines + text[found.end(2) :])
