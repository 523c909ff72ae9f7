"""What CompBench-mini's instructions say, which is all that the embedded editor reads.

Where it fits: `rcgrpo edit` and the app ask here before the embedded editor draws. Why: it turns words that it never
saw into letters, and answers with a blur that looks like a fault.
"""

import difflib
import re

from .mini import KINDS, OBJECTS
from .scenes import PLACES

THINGS = tuple(sorted(thing.name for thing in OBJECTS))

WORDINGS = {
    "add a THING in the PLACE": "add an apple in the top left",
    "remove the THING": "remove the apple",
    "replace the THING with a THING": "replace the apple with a banana",
    "remove the KIND": "remove the fruit",
}
"""Each task's wording, and an example of it. Two things are added or removed if joined by "and"."""

_THING, _PLACE, _KIND = ("|".join(sorted(names, key=len, reverse=True)) for names in (THINGS, PLACES, KINDS))
_NEW = rf"an? (?:{_THING})"
_ADDED = rf"{_NEW} in the (?:{_PLACE})"
_READ = re.compile(
    rf"add {_ADDED}(?: and {_ADDED})?"
    rf"|remove the (?:{_THING})(?: and the (?:{_THING}))?"
    rf"|replace the (?:{_THING}) with {_NEW}"
    rf"|remove the (?:{_KIND})"
)
_WORDS = sorted(
    {
        word
        for text in (_THING, _PLACE, _KIND, "a an add and in remove replace the with")
        for word in re.findall(r"\w+", text)
    }
)


def plain(instruction: str) -> str:
    """As the data set writes: small letters, one space between words, no full stop."""
    return " ".join(instruction.lower().split()).strip(" .!")


def known(instruction: str) -> bool:
    """Whether an instruction, in plain writing, is one of the data set's."""
    return _READ.fullmatch(instruction) is not None


def unknown(instruction: str) -> str:
    """What to answer to an instruction that is none of them: which there are, and the nearest one."""
    nearest = [next(iter(difflib.get_close_matches(word, _WORDS, 1, 0.75)), word) for word in instruction.split()]
    guess = " ".join(nearest)
    hint = f" Did you mean {guess!r}?" if known(guess) else ""
    wordings = ", ".join(map(repr, WORDINGS))
    return (
        f"instruction: got {instruction!r}, expected one that the embedded editor knows: {wordings}; "
        f'two things are joined by "and".{hint} '
        f"THING: {', '.join(THINGS)}. PLACE: {', '.join(PLACES)}. KIND: {', '.join(KINDS)}. "
        "Another --model knows more."
    )


def read_instruction(instruction: str) -> str:
    """An instruction as the embedded editor reads it.

    Raises:
        ValueError: it is none of the data set's; with the wordings and the objects that are.
    """
    text = plain(instruction)
    if not known(text):
        raise ValueError(
            unknown(text) if text else "instruction: got nothing, expected what to do, such as 'remove the apple'"
        )
    return text
