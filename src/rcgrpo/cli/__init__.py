"""The command line. Each command is a module here with `run(arguments)`; it is imported when it is called."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__
from .parsing import UsageError

COMMANDS = {
    "train": "train, then report before and after on held-out edits",
    "evaluate": "compare a model with and without LoRAs on a data set, with CompBench's metrics",
    "diagnose": "say where candidates differ, where their rewards come from, and whether a LoRA cheats",
    "edit": "edit one picture",
    "app": "edit in the browser, base and LoRA side by side",
    "data": "look at a data set, make masks, build one (inspect, masks, build-tux)",
    "rewards": "list the registered rewards and the columns that they read; serve them over HTTP (serve)",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `rcgrpo` command."""
    parser = argparse.ArgumentParser(
        prog="rcgrpo", description="Region-constrained GRPO for instruction-guided image editors."
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument(
        "command", choices=COMMANDS, help="; ".join(f"{name}: {text}" for name, text in COMMANDS.items())
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="see `rcgrpo COMMAND --help`")
    given = parser.parse_args(argv)
    if os.getcwd() not in sys.path:  # so that dotted paths find what lies here, as under `python -m`
        sys.path.append(os.getcwd())
    try:
        import_module(f"{__name__}.{given.command}").run(given.arguments)
    except (UsageError, ValueError, TypeError, FileNotFoundError) as error:
        if os.environ.get("RCGRPO_TRACEBACK"):
            raise
        # What the user typed needs no trace; anything else may have come from deeper down.
        hint = "" if isinstance(error, UsageError) else "\n(RCGRPO_TRACEBACK=1 shows where this comes from)"
        sys.exit(f"rcgrpo {given.command}: {error}{hint}")
