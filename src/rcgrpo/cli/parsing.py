"""What every command shares: strict flags and YAML, and the names of what is embedded.

Flags and YAML come from dataclasses through TRL's parser. A key that nobody knows is an error, never a default.
"""

import difflib
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

TINY = "kontext-tiny"
MINI = "compbench-mini"


class UsageError(Exception):
    """Something that the user typed; printed without a traceback."""


ALIASES = {
    "prompt": ("instruction",),
    "mask_image": ("mask",),
    "num_images_per_prompt": ("num_candidates", "num_generations"),
}
"""What users of diffusers type, and what it is called here."""


def parse(
    classes: Sequence[type], arguments: Sequence[str], default_config: str | None, program: str
) -> tuple[Any, ...]:
    """Dataclasses from flags and `--config file.yaml`, strictly.

    Raises:
        UsageError: an unknown key or flag, with the nearest known one; a value of another type; a config file that
            cannot be read.
    """
    from trl import TrlParser

    known = {f.name for cls in classes for f in fields(cls) if f.init}
    config, flags = _read_config(arguments, default_config)
    where = _config_path(arguments, default_config)
    for key in config.keys() - known - {"env"}:
        raise UsageError(_unknown(f"{where}: unknown key {key!r}", str(key), known, program))
    for flag in flags:
        name = _name(flag)
        if flag.startswith("--") and name not in {*known, "help"} and name.removeprefix("no_") not in known:
            raise UsageError(_unknown(f"unknown flag {flag.split('=')[0]!r}", name, known, program, "--"))
    for cls in classes:
        hints = get_type_hints(cls)
        for f in fields(cls):
            if f.init and f.name in config:
                value = config[f.name]
                config[f.name] = value if value is None and f.default is None else fit(f.name, value, hints[f.name])
    for variable, value in _environment(config.pop("env", {}), where).items():
        os.environ[variable] = value
    parser = TrlParser(classes, prog=program, allow_abbrev=False)

    def refuse(message: str) -> NoReturn:
        wrong = re.fullmatch(r"argument (--\w+).*: invalid (\w+) value: (.*)", message)
        if wrong is not None:
            expected = {"int": "a whole number", "float": "a number"}.get(wrong[2], wrong[2])
            raise UsageError(f"{wrong[1]}: got {wrong[3]}, expected {expected}")
        raise UsageError(f"{message.removeprefix('argument ')}; see `{program} --help`")

    parser.error = refuse  # type: ignore[method-assign]  # argparse would print hundreds of flags first
    parser.set_defaults_with_config(**config)
    return tuple(parser.parse_args_into_dataclasses(args=flags))


def given(arguments: Sequence[str], default_config: str | None = None) -> set[str]:
    """The names that flags or the config file set; the others have their defaults."""
    config, flags = _read_config(arguments, default_config)
    return {*map(str, config), *(_name(flag).removeprefix("no_") for flag in flags if flag.startswith("--"))}


def _name(flag: str) -> str:
    return flag.split("=", 1)[0].removeprefix("--").replace("-", "_")


def _config_path(arguments: Sequence[str], default: str | None) -> str | None:
    """The last `--config`, or the default.

    Raises:
        UsageError: `--config` without a file.
    """
    path = default
    for argument, following in zip(arguments, [*arguments[1:], None], strict=False):
        if argument == "--config":
            if following is None:
                raise UsageError("--config: got nothing, expected a YAML file")
            path = following
        elif argument.startswith("--config="):
            path = argument.partition("=")[2]
    return path


def _read_config(arguments: Sequence[str], default: str | None) -> tuple[dict[str, Any], list[str]]:
    """What the config file holds, and the arguments without it.

    Raises:
        UsageError: a file that cannot be read, or that is no mapping.
    """
    import yaml

    path = _config_path(arguments, default)
    flags = [
        argument
        for before, argument in zip([None, *arguments], arguments, strict=False)
        if "--config" not in (before, argument) and not argument.startswith("--config=")
    ]
    if path is None:
        return {}, flags
    try:
        config = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--config: got {path!r}, expected a readable YAML file ({error})") from error
    if not isinstance(config, dict):
        raise UsageError(f"--config: {path} holds {type(config).__name__}, expected `key: value` lines")
    return config, flags


def _environment(value: Any, where: str | None) -> dict[str, str]:
    if not isinstance(value, dict):
        raise UsageError(f"{where}: env: got {value!r}, expected `NAME: value` lines")
    return {str(name): str(setting) for name, setting in value.items()}


def fit(key: str, value: Any, hint: Any) -> Any:
    """A value of a YAML file as the field's type: one value where a list is expected becomes a list.

    Raises:
        UsageError: it has another type.
    """
    expected = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for kind in expected:
        for candidate in (value, [value]):
            fitted = _as(candidate, kind)
            if fitted is not MISFIT:
                return fitted
    words = " or ".join(_in_words(kind) for kind in expected)
    raise UsageError(f"{key}: got {value!r}, expected {words}")


MISFIT = object()


def _as(value: Any, kind: Any) -> Any:
    """The value as this one type, or `MISFIT`. YAML reads `1e-4` as text, and flags are text too."""
    if get_origin(kind) is list:
        items = [_as(item, (get_args(kind) or (Any,))[0]) for item in value] if isinstance(value, list) else [MISFIT]
        return MISFIT if any(item is MISFIT for item in items) else items
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            return MISFIT
        try:
            number = float(value)
        except ValueError:
            return MISFIT
        if kind is float:
            return number if isinstance(value, str) else value
        return int(number) if number.is_integer() else MISFIT
    if kind is str:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        return value if isinstance(value, str | bool) else MISFIT  # `no` and `true` are booleans to YAML
    if kind is bool:
        return value if isinstance(value, bool | str) else MISFIT
    if kind in (None, NoneType):
        return None if value is None else MISFIT
    if (get_origin(kind) or kind) is dict:
        return value if isinstance(value, dict) else MISFIT
    return MISFIT if isinstance(value, list | dict) or value is None else value


def _in_words(kind: Any) -> str:
    named = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", NoneType: "null"}
    if get_origin(kind) is list:
        return "a list"
    return named.get(kind, getattr(get_origin(kind) or kind, "__name__", str(kind)))


def _unknown(what: str, name: str, known: set[str], program: str, prefix: str = "") -> str:
    alias = next((other for other in ALIASES.get(name, ()) if other in known), None)
    nearest = [alias] if alias else difflib.get_close_matches(name, sorted(known), n=1)
    hint = f"the nearest known one is {prefix}{nearest[0]}" if nearest else f"see `{program} --help`"
    return f"{what}; {hint}"


# Checks ---------------------------------------------------------------------------------------------------------------


def at_least(args: Any, least: float, *names: str) -> None:
    """Refuse flags below a number; `None` is left alone.

    Raises:
        UsageError: naming the flag.
    """
    for name in names:
        value = getattr(args, name)
        if value is not None and not value >= least:
            raise UsageError(f"--{name}: got {value}, expected at least {least:g}")


def in_unit(args: Any, *names: str) -> None:
    """Refuse flags outside [0, 1]; `None` is left alone.

    Raises:
        UsageError: naming the flag.
    """
    for name in names:
        value = getattr(args, name)
        if value is not None and not 0 <= value <= 1:
            raise UsageError(f"--{name}: got {value}, expected a number in [0, 1]")


def one_of(args: Any, name: str, choices: Sequence[str]) -> None:
    """Refuse a flag that is none of the choices; `None` is left alone.

    Raises:
        UsageError: naming the flag.
    """
    value = getattr(args, name)
    if value is not None and value not in choices:
        raise UsageError(f"--{name}: got {value!r}, expected one of {', '.join(choices)}")


def check_port(port: int) -> None:
    """Refuse a number that no port has.

    Raises:
        UsageError: it is outside 0 to 65535.
    """
    if not 0 <= port <= 65535:
        raise UsageError(f"--port: got {port}, expected 0 to 65535")


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
