"""`data/wordings.py`: all of the data set's instructions are known, and nothing else."""

import pytest

from rcgrpo.data import compbench_mini
from rcgrpo.data.mini import render
from rcgrpo.data.wordings import THINGS, WORDINGS, known, read_instruction


def test_every_instruction_of_the_data_set_is_known():
    for split in ("train", "test"):
        for index in range(60):
            instruction = render(split, index, 32)["instruction"]
            assert read_instruction(instruction) == instruction
    assert all(map(known, WORDINGS.values()))
    assert compbench_mini("test", 1, 32)[0]["instruction"] == read_instruction(
        f"  {compbench_mini('test', 1, 32)[0]['instruction'].upper()}. "
    )


@pytest.mark.parametrize(
    ("instruction", "said"),
    [
        ("make it red", "got 'make it red', expected one that the embedded editor knows"),
        ("Remove the aple", "Did you mean 'remove the apple'?"),
        ("add a banana", "'add a THING in the PLACE'"),
        ("remove the apple now", "THING: apple, "),
        ("  ", "instruction: got nothing"),
    ],
)
def test_what_is_not_known_is_answered_with_what_is(instruction, said):
    with pytest.raises(ValueError) as raised:
        read_instruction(instruction)
    assert said in str(raised.value)
    assert not instruction.strip() or all(thing in str(raised.value) for thing in THINGS)
