"""`tiny/recipe.py`: what it promises without training anything large."""

import pytest
import torch

from rcgrpo.data.mini import render
from rcgrpo.tiny import CALL, recipe
from rcgrpo.tiny.parts import TEXT_LENGTH, build_tokenizers
from rcgrpo.tiny.recipe import REGION_WEIGHT, as_matrix, fit


def test_every_word_of_the_data_set_is_one_token_also_after_saving(tmp_path):
    instructions = {render(split, i, 32, seed=2)["instruction"] for split in ("train", "test") for i in range(300)}
    for tokenizer, extra in zip(build_tokenizers(), (2, 1), strict=True):  # both ends; the end
        tokenizer.save_pretrained(tmp_path)
        opened = type(tokenizer).from_pretrained(tmp_path)
        for text in instructions:
            ids = opened(text).input_ids
            assert len(ids) == len(text.split()) + extra <= TEXT_LENGTH
            assert opened.decode(ids, skip_special_tokens=True).split() == text.split()
    assert CALL["max_sequence_length"] == TEXT_LENGTH


@pytest.mark.parametrize("memory", [torch.channels_last, torch.contiguous_format])
def test_a_kernel_as_a_matrix_has_one_row_for_an_output_channel(memory):
    kernel = torch.randn(4, 3, 3, 3).to(memory_format=memory)
    matrix = as_matrix(kernel)
    assert matrix.shape == (4, 27)
    torch.testing.assert_close(matrix.norm(dim=1), kernel.flatten(1).norm(dim=1))
    # Muon changes the matrix; only in channels-last memory is it the kernel itself.
    assert (matrix.data_ptr() == kernel.data_ptr()) == (memory == torch.channels_last)


def problem():
    """A small convolution and an embedding with something to learn, and how often its loss was asked for."""
    torch.manual_seed(0)
    modules = torch.nn.ModuleDict({"conv": torch.nn.Conv2d(2, 4, 3), "table": torch.nn.Embedding(5, 4)})
    modules.to(memory_format=torch.channels_last)
    asked = []

    def loss(generator):
        asked.append(generator.initial_seed())
        x = torch.randn(2, 2, 3, 3, generator=generator)
        index = torch.randint(5, (2,), generator=generator)
        return (modules["conv"](x).flatten(1) - modules["table"](index) - x.mean((1, 2, 3))[:, None]).square().mean()

    return modules, loss, asked


def test_a_stopped_training_goes_on_with_the_same_batches_to_the_same_weights(tmp_path):
    def train(modules, loss, folder):
        folder.mkdir(exist_ok=True)
        fit("net", modules, loss, folder, 60, 1e-2, lambda: {"held_out": 1.0}, save_every=20)

    whole, loss, asked = problem()
    train(whole, loss, tmp_path / "whole")
    assert asked == list(range(60))
    _, fresh_loss, _ = problem()
    before, after = (f(torch.Generator().manual_seed(9_000)).item() for f in (fresh_loss, loss))
    assert after < before

    stopped, loss, asked = problem()

    def stop(generator):
        if generator.initial_seed() == 30:
            raise KeyboardInterrupt
        return loss(generator)

    with pytest.raises(KeyboardInterrupt):
        train(stopped, stop, tmp_path / "stopped")
    again, loss, asked = problem()
    train(again, loss, tmp_path / "stopped")
    assert asked == list(range(20, 60))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert len((tmp_path / "stopped" / "net.jsonl").read_text().splitlines()) == 3


def test_the_editor_is_trained_in_all_stages_and_a_finished_run_gives_it_again(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(8, 2, 64, 64, generator=draw).half()
    weights = torch.ones(8, 64, 1)
    weights[:, 20:30] = REGION_WEIGHT
    data = latents, weights, ["remove the apple", "add a bus in the top left"] * 4
    stages = []
    plain = recipe.fit
    monkeypatch.setattr(recipe, "fit", lambda name, *rest: (stages.append(name), plain(name, *rest)))

    parts = recipe.train_editor(tmp_path, 2, 2, 2, data, data, batch=2)

    assert stages == ["quarters", "editor", "guided"]
    before = torch.load(tmp_path / "editor.pt", weights_only=True)["modules"]
    trained = {f"transformer.{name}": value for name, value in parts["transformer"].state_dict().items()}
    assert any(not torch.equal(trained[name], before[name]) for name in trained)
    again = recipe.train_editor(tmp_path, 2, 2, 2, data, data, batch=2)
    for name, value in again["transformer"].state_dict().items():
        assert torch.equal(value, trained[f"transformer.{name}"]), name
