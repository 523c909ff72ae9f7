"""What every command shares: strict flags and YAML, and the names of what is embedded.

Flags and YAML come from dataclasses through TRL's parser. A key that nobody knows is an error, never a default.
"""

import difflib
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

TINY = "kontext-tiny"
MINI = "compbench-mini"


class UsageError(Exception):
    """Something that the user typed; printed without a traceback."""


def parse(
    classes: Sequence[type], arguments: Sequence[str], default_config: str | None, program: str
) -> tuple[Any, ...]:
    """Dataclasses from flags and `--config file.yaml`, strictly.

    Raises:
        UsageError: an unknown key or flag, with the nearest known one; a config file that cannot be read.
    """
    import yaml
    from trl import TrlParser

    # TRL's parser knows `--config file` alone.
    arguments = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    known = {f.name for cls in classes for f in fields(cls) if f.init}
    if default_config is not None and "--config" not in arguments:
        arguments = ["--config", default_config, *arguments]
    if "--config" in arguments:
        where = arguments.index("--config") + 1
        if where >= len(arguments):
            raise UsageError("--config: got nothing, expected a YAML file")
        path = Path(arguments[where])
        try:
            config = yaml.safe_load(path.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise UsageError(f"--config: got {str(path)!r}, expected a readable YAML file ({error})") from error
        if not isinstance(config, dict):
            raise UsageError(f"--config: {path} holds {type(config).__name__}, expected `key: value` lines")
        for key in config.keys() - known - {"env"}:
            raise UsageError(_unknown(f"{path}: unknown key {key!r}", key, known))
    for argument in arguments:
        flag = argument.split("=", 1)[0]
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name not in {*known, "config", "help"} and name.removeprefix("no_") not in known:
            raise UsageError(_unknown(f"unknown flag {flag!r}", name, known, "--"))
    parser = TrlParser(classes, prog=program, allow_abbrev=False)
    return parser.parse_args_and_config(arguments)


def _unknown(what: str, name: str, known: set[str], prefix: str = "") -> str:
    nearest = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)[0]
    return f"{what}; the nearest known one is {prefix}{nearest!s}"


def use_embedded_model(loras: Sequence[str] = ()) -> None:
    """No network but for a LoRA that is not here, and no warnings about the 20 tokens that the tiny model reads."""
    here = all(Path(lora).exists() for lora in loras)
    os.environ.setdefault("HF_HUB_OFFLINE", "1" if here else "0")
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()


def free_folder(name: str) -> str:
    """`name`, or `name-2`, `name-3`, ... if earlier runs hold it."""
    candidates = (name if i == 1 else f"{name}-{i}" for i in range(1, sys.maxsize))
    return next(folder for folder in candidates if not Path(folder).exists())
