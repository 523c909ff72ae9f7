"""`rcgrpo app`: paint a region, edit it with and without a LoRA, see where the editor looked and what it spoiled.

`comparing` makes the pictures and the numbers and knows no page; `drawing` turns them into what is shown; `painting`
and `loras` read what a visitor hands in; `page` puts them on a page and serves it.
"""

from .comparing import Comparison, Outcome, changes_outside, compare
from .drawing import CHANGE_FULL_COLOUR, SHOWN_SIDE, Captioned, Drawing, draw, table
from .loras import LoraSlot
from .page import CSS, EXAMPLE_SIDE, MAX_CANDIDATES, NUM_EXAMPLES, create_app, serve
from .painting import PAINT, PAINT_OPACITY, painting_of, read_painting

__all__ = [
    "CHANGE_FULL_COLOUR",
    "CSS",
    "EXAMPLE_SIDE",
    "MAX_CANDIDATES",
    "NUM_EXAMPLES",
    "PAINT",
    "PAINT_OPACITY",
    "SHOWN_SIDE",
    "Captioned",
    "Comparison",
    "Drawing",
    "LoraSlot",
    "Outcome",
    "changes_outside",
    "compare",
    "create_app",
    "draw",
    "painting_of",
    "read_painting",
    "serve",
    "table",
]
