"""What every command shares: strict flags and YAML, and the names of what is embedded.

Flags and YAML come from dataclasses through transformers' parser. A key that nobody knows is an error, never a default.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from ..inputs.hints import hint
from ..inputs.ranges import check_ranges, naming
from ..tiny import LORAS

TINY = "kontext-tiny"
MINI = "compbench-mini"

GUIDANCE = "The pipeline's argument of this name, the model's own by default; Qwen and distilled kleins ignore it."
STEPS = f"Steps of the ODE; the model's own by default, such as 28 for Kontext and 8 for {TINY}."
TRUE_CFG = "True guidance at twice the cost, as the pipeline's argument of this name, the model's own by default."


class UsageError(ValueError):
    """Something that the user typed."""


def parse(
    classes: Sequence[type], arguments: Sequence[str], default_config: str | None, program: str
) -> tuple[Any, ...]:
    """Dataclasses from flags and `--config file.yaml`, strictly.

    A line of the file is the flag of that name, before those on the command line, so that one parser says what a value
    may be, and what is typed wins. `null` leaves the default; so does `none` on the command line, also where the file
    says otherwise, for what is no text and None by default. `env:` sets variables of the environment, as with TRL.

    Raises:
        UsageError: an unknown key or flag, with a hint; a value of another type, or a number that is out of bounds; a
            config file that cannot be read.
        ValueError: what a dataclass itself refuses.
    """
    from transformers import HfArgumentParser

    known = {name for cls in classes for f in fields(cls) if f.init for name in (f.name, *_other_names(f))}
    config, flags, path = _read_config(arguments, default_config)
    variables = config.pop("env", {})
    if not isinstance(variables, dict):
        raise UsageError(f"{path}: env: got {variables!r}, expected `NAME: value` lines")
    for key in config.keys() - known:
        raise UsageError(_unknown(f"{path}: unknown key {key!r}", str(key), known, program))
    for flag in flags:
        name = _name(flag)
        if flag.startswith("--") and name not in {*known, "help"} and name.removeprefix("no_") not in known:
            raise UsageError(_unknown(f"unknown flag {flag.split('=')[0]!r}", name, known, program, "--"))
    several = set().union(*map(_may_be_lists, classes))
    for key, value in config.items():
        if isinstance(value, list) and (key not in several or not value):
            raise UsageError(
                f"{path}: {key}: got {value!r}, expected {'one or more values' if key in several else 'one value'}"
            )
    unset, flags = _take_unset(flags, set().union(*map(_may_be_unset, classes)))
    config = {name: value for name, value in config.items() if name not in unset}
    for name, value in variables.items():
        with naming("env", {name: value}, "variables that an environment can hold"):
            os.environ[str(name)] = str(value)
    one_or_more = set().union(*map(_may_be_several, classes))

    class Parser(HfArgumentParser):
        def add_argument(self, *flags: Any, **options: Any) -> argparse.Action:
            if _name(flags[0]) in one_or_more:  # the parser takes the first type of several
                options |= {"nargs": "+", "action": _OneOrMore}
            return super().add_argument(*flags, **options)

        def error(self, message: str) -> NoReturn:
            """Argparse would print hundreds of flags first."""
            wrong = re.fullmatch(r"argument --(\w+).*: invalid (\w+) value: (.*)", message)
            if wrong is not None:
                expected = {"int": "a whole number", "float": "a number"}.get(wrong[2], wrong[2])
                raise UsageError(f"{wrong[1]}: got {wrong[3]}, expected {expected}")
            raise UsageError(f"{message.removeprefix('argument ')}; see `{program} --help`")

    parser = Parser(classes, prog=program, allow_abbrev=False)
    *parsed, stray = parser.parse_args_into_dataclasses([*_as_flags(config), *flags], True, look_for_args_file=False)
    if stray:
        raise UsageError(f"got {' '.join(stray)}, which belongs to no flag; see `{program} --help`")
    for settings in parsed:
        check_ranges(settings, "--", UsageError)
    return tuple(parsed)


def _other_names(field: Field) -> list[str]:
    """What a flag was called before, or is elsewhere."""
    return [_name(alias) for alias in field.metadata.get("aliases", ())]


def given(arguments: Sequence[str], default_config: str | None = None) -> set[str]:
    """The names that flags or the config file set; the others have their defaults."""
    config, flags, _ = _read_config(arguments, default_config)
    return {*map(str, config), *(_name(flag).removeprefix("no_") for flag in flags if flag.startswith("--"))}


def _name(flag: str) -> str:
    return flag.split("=", 1)[0].removeprefix("--").replace("-", "_")


def _read_config(arguments: Sequence[str], default: str | None) -> tuple[dict[str, Any], list[str], str | None]:
    """What the config file holds, the arguments without it, and its path.

    Raises:
        UsageError: a file that cannot be read, or that is no mapping.
    """
    import yaml

    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config", default=default)
    try:
        found, flags = finder.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UsageError("--config: got nothing, expected a YAML file") from error
    if found.config is None:
        return {}, flags, None
    try:
        config = yaml.safe_load(Path(found.config).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--config: got {found.config!r}, expected a readable YAML file ({error})") from error
    if not isinstance(config, dict):
        raise UsageError(f"--config: {found.config} holds {type(config).__name__}, expected `key: value` lines")
    return config, flags, found.config


def _as_flags(config: Mapping[str, Any]) -> list[str]:
    flags = []
    for name, value in config.items():
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        if len(values) == 1:  # in one word, as a text may begin with a dash
            flags += [f"--{name}={values[0]}"] if values[0] is not None else []
        else:
            flags += [f"--{name}", *map(str, values)]
    return flags


def _may_be_unset(cls: type) -> set[str]:
    """Fields that are None by default, but those of texts, for which "none" could be a value."""
    hints = get_type_hints(cls)  # the parser changes what the fields themselves say
    return {f.name for f in fields(cls) if f.init and f.default is None and str not in get_args(hints[f.name])}


def _may_be_lists(cls: type) -> set[str]:
    """Names of fields that take a list, with or without something else."""
    kinds = {name: (hint, *get_args(hint)) for name, hint in get_type_hints(cls).items()}
    lists = {name for name, found in kinds.items() if any(get_origin(kind) is list for kind in found)}
    return {name for f in fields(cls) if f.name in lists for name in (f.name, *_other_names(f))}


def _may_be_several(cls: type) -> set[str]:
    """Fields that are a text or a list of texts, such as `report_to`."""
    hints = get_type_hints(cls)
    return {f.name for f in fields(cls) if f.init and {str, list[str]} <= {*get_args(hints[f.name])}}


class _OneOrMore(argparse.Action):
    """One word is a text, several are a list."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


def _take_unset(flags: Sequence[str], names: set[str]) -> tuple[set[str], list[str]]:
    """Which of these names the flags set to `none`, and the flags without those."""
    unset, left = set(), list(flags)
    for i in reversed(range(len(left))):
        name, _, value = left[i].partition("=")
        two = not value and left[i + 1 : i + 2] and (len(left) == i + 2 or left[i + 2].startswith("--"))
        if name.startswith("--") and _name(name) in names and (left[i + 1] if two else value).lower() == "none":
            unset.add(_name(name))
            del left[i : i + (2 if two else 1)]
    return unset, left


def _unknown(what: str, name: str, known: set[str], program: str, prefix: str = "") -> str:
    return f"{what}; {hint(name, known, prefix) or f'see `{program} --help`'}"


# Checks ---------------------------------------------------------------------------------------------------------------


def one_of(args: Any, name: str, choices: Sequence[str]) -> None:
    """Refuse a flag that is none of the choices; `None` is left alone.

    Raises:
        UsageError: naming the flag.
    """
    value = getattr(args, name)
    if value is not None and value not in choices:
        raise UsageError(f"--{name}: got {value!r}, expected one of {', '.join(choices)}")


def check_folder(flag: str, folder: str | Path) -> None:
    """Refuse a folder that cannot be made or written to, before the work rather than after it.

    Raises:
        UsageError: naming the flag.
    """
    there = Path(folder).absolute()
    try:
        while not there.exists() and not there.is_symlink():
            there = there.parent
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        expected = f"expected a folder that can be written to ({there}: {error.strerror})"
        raise UsageError(f"--{flag}: got {str(folder)!r}, {expected}") from error


def check_picture(flag: str, path: str) -> None:
    """Refuse a name that no picture can be written under.

    Raises:
        UsageError: naming the flag.
    """
    from PIL import Image

    if Image.registered_extensions().get(Path(path).suffix.lower()) not in Image.SAVE or Path(path).is_dir():
        raise UsageError(f"--{flag}: got {path!r}, expected a picture's name, such as picture.png")
    check_folder(flag, Path(path).parent)


# Helpers --------------------------------------------------------------------------------------------------------------


def use_embedded_model(loras: Sequence[str] = ()) -> None:
    """No network but for a LoRA that is not here, and no warnings about the 20 tokens that the tiny model reads."""
    here = all(Path(lora).exists() or lora in LORAS for lora in loras)
    os.environ.setdefault("HF_HUB_OFFLINE", "1" if here else "0")
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()


def free_folder(name: str) -> str:
    """`name`, or `name-2`, `name-3`, ... if earlier runs hold it."""
    candidates = (name if i == 1 else f"{name}-{i}" for i in range(1, sys.maxsize))
    return next(folder for folder in candidates if not Path(folder).exists())
