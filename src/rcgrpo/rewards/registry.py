"""Rewards by name: the callable interface, the decorator, and how `reward_funcs` becomes a list of `Reward`.

Where it fits: users hand the trainer callables, registered names or dotted paths; `resolve_rewards` turns them into
`Reward` records, which `scoring.score` calls. Why it exists: names appear in logs, weights and configuration files, so
they are settled once, before the first step, and a typo is answered with the nearest known name.

A reward is any callable, plain or `async def`, over lists with one entry per candidate:

    f(prompts, images, source_images, masks, **columns) -> list[float | None]

`prompts` are strings, `images` (the candidates) and `source_images` PIL RGB, `masks` PIL "L" with 255 = edit. `columns`
hold every other column of the data set as a list (`caption`, `task`, `edited_image`, …) and besides: `completions` (the
same list as `images`), `completion_ids` (None: pictures have no tokens), `trainer_state`, `log_extra(column, values)`,
`log_metric(name, value)`, `log_failure(index, reason)`, and, when attention is recorded, the lists of floats
`attention_mass`, `attention_density`, `attention_contrast`; columns of these names are refused. Pictures are the
reward's own copies, on which it may draw. `None` means that the reward does not apply to that candidate; it is neither
a zero nor a failure, unless `log_failure` was called for it: then it is a failure with that reason.

Gotchas: everything is passed by keyword, so a reward names what it needs and swallows the rest with `**columns`. Raise
`RewardError` for a mistake that no other candidate could cure: it stops the run; any other exception counts against the
candidates it happened on. A registered class is a factory, called without arguments when its name is resolved.
"""

import difflib
import functools
import importlib
import inspect
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..inputs.ranges import naming

logger = logging.getLogger(__name__)

RewardFunction = Callable[..., Any]
"""`(prompts, images, source_images, masks, **columns) -> list[float | None]`, or a coroutine function of the same."""

Registrable = TypeVar("Registrable", bound=RewardFunction)

RESERVED = (
    *("prompts", "images", "completions", "completion_ids", "source_images", "masks"),
    *("trainer_state", "log_extra", "log_metric", "log_failure", "generators"),
    *("attention_mass", "attention_density", "attention_contrast"),
)
"""What rewards get from the trainer by keyword, hence no names for columns of a data set."""

_REGISTRY: dict[str, RewardFunction] = {}


class RewardError(ValueError):
    """A reward is used or written wrongly. Always raised, never counted as one candidate's bad luck."""


@dataclass(frozen=True)
class Reward:
    """A resolved reward.

    Args:
        name: how logs, weights and errors call it; unique within a run.
        function: the callable itself.
        columns: data set columns that it cannot do without.
        required: whether a run must stop when it fails persistently (see `FailureWatch`).
        value_range: least and greatest score that it gives, for readers and servers; not enforced. `None`: unknown.
        differentiable: the same on tensors, for `reward_gradient_weight`:
            `f(pictures, prompts, source_images, masks, **columns) -> scores`, where `pictures` `[n, 3, height, width]`
            are in [0, 1], everything else is as above, and `scores` `[n]` have a gradient, NaN for `None`. Besides it
            gets `generators`, one `torch.Generator` on the CPU for each picture, or None: what it draws from them, a
            view of the picture for example, is the same after a resume and on any number of processes.
    """

    name: str
    function: RewardFunction
    columns: tuple[str, ...] = ()
    required: bool = False
    value_range: tuple[float, float] | None = None
    differentiable: RewardFunction | None = None

    @property
    def is_async(self) -> bool:
        """Whether calling it gives a coroutine; true as well for an object with `async def __call__`."""
        innermost = list(_unwrap(self.function))[-1]
        return inspect.iscoroutinefunction(innermost) or inspect.iscoroutinefunction(type(innermost).__call__)


def refuse_columns(columns: Iterable[str], where: str, reserved: Collection[str] = RESERVED) -> None:
    """Refuse columns that would replace what rewards get under the same name.

    Raises:
        ValueError: naming `where` and the column.
    """
    for column in columns:
        if column in reserved:
            raise ValueError(
                f"{where}: got a column {column!r}, expected another name, as rewards get the trainer's own "
                f"{column} under it; rename the column, to 'data_{column}' for example, or name it in image_column, "
                "prompt_column or mask_column if it is one of these"
            )


def register_reward(
    name: str,
    columns: tuple[str, ...] = (),
    required: bool = False,
    value_range: tuple[float, float] | None = None,
    differentiable: RewardFunction | None = None,
) -> Callable[[Registrable], Registrable]:
    """Decorator that makes a function, or a class as a factory without arguments, known under `name`.

    It sets the plain attributes `reward_name`, `columns`, `required`, `value_range` and, where there is one,
    `differentiable`, and gives the object back unchanged otherwise.

    Args:
        name: the registry name; no dots, which mark import paths.
        columns: data set columns that the reward cannot do without.
        required: whether a run must stop when the reward fails persistently.
        value_range: least and greatest score that it gives.
        differentiable: the same on tensors, as in `Reward`.

    Raises:
        ValueError: `name` has a dot, or belongs to something else. The same definition run again (a notebook cell, a
            reloaded module) replaces the older one.
        TypeError: `columns` is one string instead of a tuple of them.
    """
    if "." in name:
        raise ValueError(f"register_reward: got name {name!r}, expected one without dots, which mark import paths")
    if isinstance(columns, str):
        raise TypeError(f"register_reward({name!r}): got columns {columns!r}, expected a tuple such as ({columns!r},)")

    def register(function: Registrable) -> Registrable:
        taken = _REGISTRY.get(name, function)
        if _origin(taken) != _origin(function):
            raise ValueError(f"register_reward: the name {name!r} belongs to {_origin(taken)}; choose another one")
        _REGISTRY[name] = function
        known = {"reward_name": name, "columns": tuple(columns), "required": required, "value_range": value_range}
        for attribute, value in known.items():
            setattr(function, attribute, value)
        if differentiable is not None:
            setattr(function, "differentiable", differentiable)  # noqa: B010 (a plain function has no such attribute)
        return function

    return register


def available_rewards() -> list[str]:
    """The registered names, sorted."""
    return sorted(_REGISTRY)


def resolve_rewards(reward_funcs: RewardFunction | str | Sequence[RewardFunction | str]) -> list[Reward]:
    """The rewards of a run, in the order given.

    Args:
        reward_funcs: a callable, a registered name, a dotted path `package.module.attribute`, or a list of these.
            Classes, given directly or by name, are called without arguments.

    Returns:
        One `Reward` each. A callable's name is its `reward_name`, else its `__name__`, else that of the function that a
        `functools.partial` wraps, else its class's.

    Raises:
        ValueError: no rewards, an unknown name, or two rewards with one name.
        TypeError: something that cannot be called, or a callable that does not accept `**columns`.
    """
    given = [reward_funcs] if isinstance(reward_funcs, str) or callable(reward_funcs) else list(reward_funcs)
    if not given:
        raise ValueError("reward_funcs: got an empty list, expected at least one reward")
    rewards = [_resolve(item) for item in given]
    names = [reward.name for reward in rewards]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"reward_funcs: {names.count(name)} rewards are called {name!r}; set the attribute `reward_name` of "
                "one of them to something else"
            )
    return rewards


def _resolve(item: RewardFunction | str) -> Reward:
    function = _look_up(item) if isinstance(item, str) else item
    if isinstance(function, type):
        try:
            function = function()
        except TypeError as error:
            raise TypeError(
                f"reward_funcs: got the class {item!r}, expected one that can be called without arguments ({error}); "
                "give an instance, or register a function that makes one"
            ) from error
    if not callable(function):
        raise TypeError(f"reward_funcs: got {item!r}, expected a callable, a registered name or a dotted path")
    name = _attribute(function, "reward_name") or _attribute(function, "__name__")
    reward = Reward(
        name=name or type(function).__name__,
        function=function,
        columns=tuple(_attribute(function, "columns") or ()),
        required=bool(_attribute(function, "required")),
        value_range=_attribute(function, "value_range"),
        differentiable=_attribute(function, "differentiable"),
    )
    _check_signature(reward)
    return reward


def _look_up(name: str) -> RewardFunction:
    if name in _REGISTRY:
        return _REGISTRY[name]
    known = available_rewards()
    path, _, attribute = name.rpartition(".")
    if path:
        try:
            with naming("reward_funcs", name, "a module that can be imported; mend it"):
                module = importlib.import_module(path)
        except ValueError as error:
            absent = getattr(error.__cause__, "name", None)
            if isinstance(error.__cause__, ModuleNotFoundError) and f"{path}.".startswith(f"{absent}."):
                raise ValueError(f"reward_funcs: got {name!r}, but there is no module {absent!r}") from None
            raise
        if hasattr(module, attribute):
            return getattr(module, attribute)
        known = [member for member in vars(module) if not member.startswith("_")]
    nearest = difflib.get_close_matches(attribute, known, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    where = f"the module {path!r} has" if path else "known rewards are"
    raise ValueError(f"reward_funcs: got {name!r}, which is unknown{hint} ({where}: {', '.join(known)})")


def _unwrap(function: RewardFunction) -> Iterator[RewardFunction]:
    """The function and, for a `functools.partial`, what it wraps."""
    yield function
    while isinstance(function, functools.partial):
        function = function.func
        yield function


def _attribute(function: RewardFunction, name: str) -> Any:
    return next((getattr(layer, name) for layer in _unwrap(function) if hasattr(layer, name)), None)


def _origin(function: RewardFunction) -> str:
    return f"{function.__module__}.{_attribute(function, '__qualname__') or repr(function)}"


def _check_signature(reward: Reward) -> None:
    try:
        parameters = inspect.signature(reward.function).parameters.values()
    except ValueError:  # some callables written in C do not tell
        return
    if any(parameter.name == "completion_ids" for parameter in parameters):
        logger.warning(
            "reward %r reads `completion_ids`, which is None here: a candidate is a picture, in `images`, and has no "
            "tokens",
            reward.name,
        )
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        raise TypeError(
            f"reward_funcs: the reward {reward.name!r} does not accept `**columns`; rewards get every column of the "
            "data set by keyword, so add `**columns` to its signature"
        )
