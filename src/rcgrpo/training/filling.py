"""Encode all edits of a run beforehand, into the condition cache."""

from collections.abc import Sequence

from PIL import Image
from tqdm.auto import tqdm

from ..data.edits import EditRows
from ..editors.base import FlowEditor
from .config import RCGRPOConfig
from .rows import following_turn


def fill(editor: FlowEditor, sets: Sequence[EditRows], args: RCGRPOConfig, process: int = 0, processes: int = 1) -> int:
    """Encode this process's share of the edits, each by itself, as training would: the same bits.

    Further turns are drawn from pictures that do not exist yet, so only their instructions are encoded, where the text
    encoder reads nothing else.

    Args:
        editor: with a cache, its encoders where they work.
        process, processes: which share, of how many.

    Returns:
        How many edits it encoded.
    """
    todo = [(rows, index) for rows in sets for index in range(len(rows))][process::processes]
    for rows, index in tqdm(todo, desc="conditions", unit=" edits", disable=process > 0):
        edit = rows.edit(index)
        editor.encode([edit.source], [edit.prompt])
        height, width = editor.size_for(edit.source)
        turn = None if editor.sees_pictures else following_turn(edit, Image.new("RGB", (width, height)), 2, args)
        number = 3
        while turn is not None:
            editor.encode([turn.source], [turn.prompt], cache_images=False)
            turn, number = following_turn(turn, turn.source, number, args), number + 1
    return len(todo)
