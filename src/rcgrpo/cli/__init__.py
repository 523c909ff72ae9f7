"""The command line. Each command is a module here with `run(arguments)`; it is imported when it is called."""

import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__
from .failing import told_in_one_line

COMMANDS = {
    "train": "train, then report before and after on held-out edits",
    "plan": "say what a run will take: memory by phase, FLOP, time, and what to lower",
    "evaluate": "compare a model with and without LoRAs on a data set, with CompBench's metrics",
    "diagnose": "say where candidates differ, where their rewards come from, and whether a LoRA cheats",
    "explain": "draw one update: noise, candidates, rewards, advantages, and what it moves",
    "edit": "edit one picture",
    "app": "edit in the browser, base and LoRA side by side",
    "data": "look at a data set, make masks, build one (inspect, masks, build-tux)",
    "cache": "encode what a run will ask for beforehand, so that training does without the text encoders",
    "rewards": "list the registered rewards and the columns that they read; serve them over HTTP (serve)",
}

USAGE = "\n".join(
    [
        "usage: rcgrpo COMMAND [--flag value ...]\n\nRegion-constrained GRPO for instruction-guided image editors.\n",
        *(f"  {name:10}{text}" for name, text in COMMANDS.items()),
        "\n`rcgrpo COMMAND --help` lists a command's flags; `rcgrpo --version` the version.",
    ]
)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `rcgrpo` command."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["--version"]:
        print(__version__)
    elif given[:1] and given[0] in ("-h", "--help"):
        print(USAGE)
    elif given and given[0] in COMMANDS:
        if os.getcwd() not in sys.path:  # so that dotted paths find what lies here, as under `python -m`
            sys.path.append(os.getcwd())
        with told_in_one_line(f"rcgrpo {given[0]}"):
            import_module(f"{__name__}.{given[0]}").run(given[1:])
    else:
        nearest = difflib.get_close_matches(given[0] if given else "", COMMANDS, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else "see `rcgrpo --help`"
        got = repr(given[0]) if given else "no command"
        sys.exit(f"rcgrpo: got {got}, expected one of {', '.join(COMMANDS)}; {hint}")
