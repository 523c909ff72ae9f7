"""What a number may be, said once for the configuration and every command, and how a failure names what it failed on.

Below everything else: a setting of one name means the same wherever it stands, so one table, `RANGES`, has its bounds.
A number without a row there is one that nobody has thought about; the tests refuse it.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import Field, dataclass, fields
from math import inf
from numbers import Integral, Real
from typing import Any

LONGEST = 600
"""Characters of an explanation; some libraries quote whole files."""


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may be. NaN, infinity and booleans never are.

    Args:
        low, high: bounds, which belong to it.
        above, below: whether `low` or `high` is just outside instead.
        whole: whole numbers only.
        whole_above: numbers above this one are whole.
        also: values that stand for something else, such as -1 for "off".
        text: what messages expect, where the bounds do not say it all.
    """

    low: float = -inf
    high: float = inf
    above: bool = False
    below: bool = False
    whole: bool = False
    whole_above: float = inf
    also: tuple[float, ...] = ()
    text: str = ""

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            return False
        if value in self.also:
            return True
        number: Any = value
        over = number > self.low if self.above else number >= self.low
        under = number < self.high if self.below else number <= self.high
        return bool(-inf < number < inf and over and under and (number <= self.whole_above or number == int(number)))

    def __str__(self) -> str:
        if self.text:
            return self.text
        if self.high < inf:
            if self.whole:
                return f"{self.low:g} to {self.high:.12g}"
            return f"a number in {'(' if self.above else '['}{self.low:g}, {self.high:g}{')' if self.below else ']'}"
        if self.low == -inf:
            return "a finite number"
        return (
            f"a number above {self.low:g}" if self.above else "0 or more" if not self.low else f"at least {self.low:g}"
        )


COUNT, NATURAL, SEED = Range(1, whole=True), Range(0, whole=True), Range(0, 2**32 - 1, whole=True)
SHARE, FRACTION, AMOUNT, POSITIVE = Range(0, 1), Range(0, 1, below=True), Range(0), Range(0, above=True)
INTERVAL = Range(0, above=True, whole_above=1, text="a whole number of updates, or a share of them below 1")
SIDE = Range(16, 8192, whole=True, text="16 to 8192 pixels")


def _all(kind: Range, names: str) -> dict[str, Range]:
    return dict.fromkeys(names.split(), kind)


RANGES: dict[str, Range] = {
    # What an update sees and how it steps
    **_all(COUNT, "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps"),
    **_all(COUNT, "eval_accumulation_steps torch_empty_cache_steps save_total_limit num_iterations"),
    "reward_gradient_steps": COUNT,
    **_all(COUNT, "dataloader_prefetch_factor ddp_bucket_cap_mb ddp_timeout rollout_batch_size train_micro_batch_size"),
    **_all(COUNT, "lora_r lora_alpha num_anchors num_policy_steps sde_window max_reward_failures"),
    **_all(NATURAL, "dataloader_num_workers check_rows"),
    **_all(AMOUNT, "learning_rate weight_decay warmup_steps max_grad_norm eval_delay neftune_noise_alpha"),
    **_all(AMOUNT, "keep_weight beta beta_keep attention_reward_weight keep_hinge_weight keep_hinge_margin"),
    **_all(AMOUNT, "min_reward_std reward_gradient_weight negative_advantage_clip"),
    **_all(FRACTION, "adam_beta1 adam_beta2 ema_decay"),
    **_all(POSITIVE, "adam_epsilon num_train_epochs temperature epsilon epsilon_high advantage_power"),
    **_all(POSITIVE, "advantage_std_floor sde_noise_level nft_beta nft_advantage_clip reward_timeout"),
    **_all(INTERVAL, "logging_steps eval_steps save_steps"),
    **_all(SHARE, "label_smoothing_factor"),
    "max_steps": Range(1, whole=True, also=(-1,), text="at least 1, or -1 to count num_train_epochs instead"),
    "local_rank": Range(-1, whole=True),
    **_all(SEED, "seed data_seed"),
    # Rows
    **_all(COUNT, "num_train_samples num_eval_samples num_eval_edits num_samples num_pictures num_train num_test"),
    **_all(NATURAL, "num_maps edit"),
    "held_out": FRACTION,
    # Edits
    **_all(COUNT, "num_generations num_generations_eval max_sequence_length batch_size num_draws"),
    **_all(
        Range(1, 1000, whole=True, text="at least 1 and at most 1000"), "num_inference_steps num_inference_steps_eval"
    ),
    **_all(SIDE, "resolution metric_size cell"),
    "size": Range(64, 256, whole=True, text="64, 128 or 256 pixels"),
    **_all(SHARE, "edit_strength keep_strength independent_share mask_growth sigma threshold"),
    **_all(SHARE, "box_threshold text_threshold score_threshold"),
    **_all(AMOUNT, "guidance_scale match_tolerance"),
    "true_cfg_scale": Range(1, text="1 (off) or more"),
    # Plans
    "peak_share": Range(0, 1, above=True),
    "judge_gb": AMOUNT,
    # Servers
    "port": Range(0, 65535, whole=True),
    **_all(COUNT, "max_request_mb max_request_mpixels concurrency"),
    "read_seconds": POSITIVE,
    "max_waiting": NATURAL,
}
"""Every number that a user sets, by name: of `RCGRPOConfig`, what it inherits, and the commands' flags."""


def check_ranges(settings: Any, prefix: str = "", error: type[Exception] = ValueError) -> None:
    """Refuse numbers of a dataclass that lie outside `RANGES`. None is left alone where it is allowed.

    Args:
        settings: an instance of any dataclass.
        prefix: before the names in messages, such as `--`.
        error: what is raised.

    Raises:
        error: naming the field, its value and what was expected.
    """
    for field in fields(settings):
        if (allowed := RANGES.get(field.name)) is None:
            continue
        value, optional = getattr(settings, field.name), may_be_none(field)
        if value in allowed or (value is None and optional):
            continue
        kind = "a whole number, " if allowed.whole and not isinstance(value, Integral) else ""
        raise error(f"{prefix}{field.name}: got {value!r}, expected {kind}{allowed}{', or none' if optional else ''}")


def may_be_none(field: Field) -> bool:
    """Whether a dataclass's field takes None, by its default or its annotation."""
    return field.default is None or "None" in str(field.type)


# Failures of others ---------------------------------------------------------------------------------------------------


def one_line(error: BaseException) -> str:
    """What an exception says, in one line of bounded length; its kind where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


def lacking(error: BaseException) -> str | None:
    """ "memory", "GPU memory" or "disk" if an exception says that there is too little of it, else None."""
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError" or "CUDA out of memory" in text:
        return "GPU memory"
    too_big = ("can't allocate memory", "Cannot allocate memory", "array is too big")
    if isinstance(error, MemoryError) or any(words in text for words in too_big):
        return "memory"
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "disk" if full or "No space left on device" in text or "Disk quota exceeded" in text else None


@contextmanager
def naming(field: str, value: Any, expected: str) -> Iterator[None]:
    """Whatever a library raises inside is told as a wrong value of this field; too little memory or disk is not.

    Raises:
        ValueError: naming field, value, what was expected, and in brackets what the library said.
    """
    try:
        yield
    except Exception as error:
        if lacking(error):
            raise
        said = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"{field}: got {value!r}, expected {expected} ({said})") from error
