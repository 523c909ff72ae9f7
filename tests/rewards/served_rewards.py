"""Rewards that a server of `test_server.py` loads by their dotted path."""

import time

from rcgrpo.rewards import register_reward


@register_reward("picky", columns=("number", "edited_image"), value_range=(0.0, 9.0))
def picky(images, masks, number, edited_image, log_metric, log_extra, **columns):
    """The number, if the pictures are what they were before the journey."""
    log_metric("unread", 1.0)
    if "fail" in number:
        raise KeyError("fail")
    for image, mask, target in zip(images, masks, edited_image, strict=True):
        assert (image.mode, mask.mode) == ("RGB", "L") and image.getpixel((0, 0)) == (1, 2, 3)
        assert target is None or target.getpixel((0, 0)) == (4, 5, 6)
    return number


def slow(images, **columns):
    time.sleep(0.6)
    return [1.0] * len(images)


def busy(images, **columns):
    """Never lets go of the interpreter by itself, as a reward in pure Python does."""
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        sum(range(1000))
    return [1.0] * len(images)


async def strict(images, **columns):
    if len(images) > 1:
        from rcgrpo.rewards import RewardError

        raise RewardError("one at a time")
    return [0.5]
