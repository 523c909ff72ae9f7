"""`Conditions`: a batch of edits is indexed, repeated and joined as one, whatever lies in it."""

import torch

from rcgrpo.editors import Conditions


def conditions_of(values, length=1, negative=False, reference=False):
    """One number for each edit, everywhere; texts of `length` tokens."""
    values = torch.tensor(values, dtype=torch.float32)
    text = {"prompt_embeds": values.view(-1, 1, 1).repeat(1, length, 2), "pooled_prompt_embeds": values.view(-1, 1)}
    return Conditions(
        text,
        values.view(-1, 1).repeat(1, length),
        values.view(-1, 1, 1).repeat(1, 4, 1),
        32,
        16,
        {name: -tensor for name, tensor in text.items()} if negative else {},
        values.view(-1, 1, 1).repeat(1, 6, 1) if reference else None,
        (2, 3) if reference else None,
    )


def firsts(conditions):
    """The number of each edit, once all tensors are seen to agree on it."""
    tensors = [*conditions.text.values(), conditions.text_weights, conditions.source, conditions.reference_tokens]
    tensors += [-tensor for tensor in conditions.negative.values()]
    lists = [tensor.flatten(1)[:, 0].tolist() for tensor in tensors]
    assert lists.count(lists[0]) == len(lists)
    assert (conditions.height, conditions.width) == (32, 16)
    return lists[0]


def test_all_parts_go_together():
    for options in ({}, {"negative": True}, {"reference": True}, {"negative": True, "reference": True}):
        conditions = conditions_of([1, 2, 3], **options)
        assert len(conditions) == 3
        assert firsts(conditions.repeat(2)) == [1, 1, 2, 2, 3, 3]
        assert firsts(conditions[1:]) == [2, 3]
        assert firsts(conditions[torch.tensor([2, 0, 2])]) == [3, 1, 3]
        joined = Conditions.concatenate([conditions[2:], conditions_of([7], **options)])
        assert firsts(joined) == [3, 7]
        assert (
            joined.reference_grid == conditions.reference_grid and joined.negative.keys() == conditions.negative.keys()
        )


def test_texts_of_different_lengths_are_padded_at_their_ends():
    joined = Conditions.concatenate(
        [conditions_of([1], 2, True), conditions_of([2], 4, True), conditions_of([3], 3, True)]
    )
    assert firsts(joined) == [1, 2, 3]
    assert joined.text_weights.tolist() == [[1, 1, 0, 0], [2, 2, 2, 2], [3, 3, 3, 0]]
    assert joined.text["prompt_embeds"][..., 1].tolist() == joined.text_weights.tolist()
    assert (-joined.negative["prompt_embeds"][..., 0]).tolist() == joined.text_weights.tolist()


def test_the_second_half_reads_the_negative_text():
    conditions = conditions_of([1, 2], negative=True)
    first, second = conditions.halves()
    assert first.text == conditions.text and second.text == conditions.negative
    assert not first.negative and not second.negative and first.source is second.source is conditions.source
