"""`editors/cache.py`: the same bits with and without it, each thing encoded once, nothing stale or damaged used."""

import logging
import multiprocessing

import numpy as np
import pytest
import torch
from PIL import Image

from rcgrpo.editors import ConditionCache, FluxKontextEditor
from rcgrpo.editors.cache import tensors_digest
from tiny_kontext import build_tiny_kontext


def picture(seed, width=32, height=32):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def counted(pipe):
    """The pipeline, and what its encoders were asked for."""
    calls = {"text": 0, "image": 0}
    pipe.text_encoder_2.register_forward_pre_hook(lambda *_: calls.update(text=calls["text"] + 1))
    pipe.vae.encoder.register_forward_pre_hook(lambda *_: calls.update(image=calls["image"] + 1))
    return pipe, calls


def editor_of(pipe, folder=None, resolution=32, length=48, **options):
    cache = None if folder is None else ConditionCache(folder)
    return FluxKontextEditor(pipe, resolution, 3, max_sequence_length=length, cache=cache, **options)


def parts(conditions):
    return {**conditions.text, "weights": conditions.text_weights, "source": conditions.source}


def same(a, b):
    return all(torch.equal(tensor, parts(b)[name]) for name, tensor in parts(a).items())


def entries(folder, kind=""):
    return sorted(folder.glob(f"{kind}*/*.safetensors"))


# ------------------------------------------------------------------------------------------ the editor


def test_each_instruction_and_each_source_is_encoded_once(tmp_path):
    pipe, calls = counted(build_tiny_kontext())
    images, prompts = [picture(1), picture(2), picture(1)], ["make it red", "make it red", "remove it"]
    expected = editor_of(pipe).encode(images, prompts)
    calls.update(text=0, image=0)
    first = editor_of(pipe, tmp_path).encode(images, prompts)
    assert calls == {"text": 2, "image": 2} and same(first, expected)
    other_run, calls = counted(build_tiny_kontext())
    again = editor_of(other_run, tmp_path).encode(images[::-1], prompts[::-1])
    assert calls == {"text": 0, "image": 0} and same(again, expected[torch.tensor([2, 1, 0])])
    assert len(entries(tmp_path, "text")) == len(entries(tmp_path, "image")) == 2


def test_a_negative_prompt_is_an_instruction_like_others(tmp_path):
    pipe, calls = counted(build_tiny_kontext())
    options = {"true_cfg_scale": 2.0, "negative_prompt": "blurry"}
    expected = editor_of(pipe, **options).encode([picture(1)], ["make it red"])
    editor = editor_of(pipe, tmp_path, **options)
    calls.update(text=0)
    for prompt in ("make it red", "remove it", "make it red"):
        conditions = editor.encode([picture(1)], [prompt])
    assert calls["text"] == 3 and same(conditions, expected)
    assert conditions.negative.keys() == expected.negative.keys() == expected.text.keys()
    assert all(torch.equal(tensor, expected.negative[name]) for name, tensor in conditions.negative.items())


def test_pictures_that_nobody_brings_again_are_not_kept(tmp_path):
    editor = editor_of(build_tiny_kontext(), tmp_path)
    kept = editor.encode([picture(1)], ["make it red"], cache_images=False)
    assert len(entries(tmp_path, "text")) == 1 and not entries(tmp_path, "image")
    assert same(kept, editor.encode([picture(1)], ["make it red"]))


def nudge(module):
    with torch.no_grad():
        next(module.parameters()).flatten()[0] += 1e-3


CHANGES = {
    "nothing": (lambda pipe: None, {}, (0, 0)),
    "a weight of T5": (lambda pipe: nudge(pipe.text_encoder_2), {}, (1, 0)),
    "a weight of CLIP": (lambda pipe: nudge(pipe.text_encoder), {}, (1, 0)),
    "a weight of the VAE": (lambda pipe: nudge(pipe.vae), {}, (0, 1)),
    "a weight of the transformer": (lambda pipe: nudge(pipe.transformer), {}, (0, 0)),
    "the dtype": (lambda pipe: pipe.to(torch.bfloat16), {}, (1, 1)),
    "a tokenizer": (lambda pipe: setattr(pipe.tokenizer, "pad_token", "!"), {}, (1, 0)),
    "slicing": (lambda pipe: pipe.vae.enable_slicing(), {}, (0, 1)),
    "resampling": (lambda pipe: pipe.image_processor.register_to_config(resample="bicubic"), {}, (0, 1)),
    "the scaling factor": (lambda pipe: pipe.vae.register_to_config(scaling_factor=0.5), {}, (0, 1)),
    "max_sequence_length": (lambda pipe: None, {"length": 32}, (1, 0)),
    "resolution": (lambda pipe: None, {"resolution": 16}, (0, 1)),
}


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conditions")
    editor_of(build_tiny_kontext(), folder).encode([picture(1)], ["make it red"])
    return folder


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_the_numbers_depend_on_is_in_the_name(filled, name):
    change, options, misses = CHANGES[name]
    pipe, calls = counted(build_tiny_kontext())
    change(pipe)
    cached = editor_of(pipe, filled, **options).encode([picture(1)], ["make it red"])
    assert (calls["text"], calls["image"]) == misses
    assert same(cached, editor_of(pipe, **options).encode([picture(1)], ["make it red"]))


def test_text_encoders_are_on_the_device_only_while_something_new_is_encoded(tmp_path, monkeypatch):
    """`cpu:0` is no other place than `cpu`, but it has another name."""
    pipe, moves = build_tiny_kontext(), []
    for name in ("text_encoder", "text_encoder_2"):
        part = getattr(pipe, name)
        monkeypatch.setattr(part, "to", lambda device, part=part, name=name: moves.append((name, str(device))) or part)
    editor = editor_of(pipe, tmp_path)
    editor.place(torch.device("cpu:0"))
    assert moves == [("text_encoder", "cpu"), ("text_encoder_2", "cpu")]
    assert editor.device == torch.device("cpu:0")
    moves.clear()
    editor.encode([picture(1)], ["make it red"])
    assert moves[:2] == [("text_encoder", "cpu:0"), ("text_encoder_2", "cpu:0")]
    assert moves[2:] == [("text_encoder", "cpu"), ("text_encoder_2", "cpu")]
    moves.clear()
    editor.encode([picture(2)], ["make it red"])
    assert {device for _, device in moves} <= {"cpu"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_text_encoders_leave_the_gpu(tmp_path):
    pipe = build_tiny_kontext()
    editor = editor_of(pipe, tmp_path)
    editor.place(torch.device("cuda:0"))
    found = [editor.encode([picture(1)], ["make it red"]) for _ in range(2)]
    assert same(*found)
    assert {tensor.device.type for name, tensor in parts(found[1]).items() if name != "weights"} == {"cuda"}
    assert pipe.text_encoder.device.type == pipe.text_encoder_2.device.type == "cpu"
    assert pipe.transformer.device.type == pipe.vae.device.type == "cuda"


# ------------------------------------------------------------------------------------------ the files


def some_tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(2, 3, generator=generator).bfloat16(), "b": torch.arange(5)}


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


DAMAGES = {
    "cut": cut,
    "one bit": flip_a_bit,
    "empty": lambda path: path.write_bytes(b""),
    "no safetensors": lambda path: path.write_bytes(b"\x00" * 64),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_entry_is_made_again(tmp_path, caplog, name):
    cache, made = ConditionCache(tmp_path), []

    def make():
        made.append(1)
        return some_tensors()

    for _ in range(2):
        cache.get("kind", ["key"], make)
    assert len(made) == 1 and not caplog.records
    (path,) = entries(tmp_path)
    DAMAGES[name](path)
    with caplog.at_level(logging.WARNING):
        found = [cache.get("kind", ["key"], make) for _ in range(2)]
    assert len(made) == 2 and len(caplog.records) == 1 and f"{path}: damaged" in caplog.text
    for tensors in found:
        assert tensors_digest(tensors) == tensors_digest(some_tensors())


def test_a_folder_that_cannot_be_written_to_stops_nothing(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    cache = ConditionCache(tmp_path / "file")
    with caplog.at_level(logging.WARNING):
        found = [cache.get("kind", key, some_tensors) for key in (1, 2, 3)]
    assert all(tensors_digest(tensors) == tensors_digest(some_tensors()) for tensors in found)
    assert sum("cannot be written" in record.getMessage() for record in caplog.records) == 1


def test_the_digest_sees_names_dtypes_shapes_and_bits():
    base = {"a": torch.zeros(4)}
    others = [{"b": torch.zeros(4)}, {"a": torch.zeros(4).int()}, {"a": torch.zeros(2, 2)}, {"a": -torch.zeros(4)}]
    assert len({tensors_digest(tensors) for tensors in (base, *others)}) == 5
    assert tensors_digest(base) == tensors_digest({"a": torch.zeros(8)[::2]})


def fill(folder, number, answers):
    cache = ConditionCache(folder)
    digests = [tensors_digest(cache.get("kind", key, lambda key=key: some_tensors(key))) for key in range(25)]
    answers.put((number, digests, cache.writable))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="starting four interpreters is slow")
def test_processes_may_write_the_same_entries_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [context.Process(target=fill, args=(tmp_path, number, answers)) for number in range(4)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    expected = [tensors_digest(some_tensors(key)) for key in range(25)]
    assert sorted(number for number, *_ in found) == [0, 1, 2, 3]
    assert all(digests == expected and writable for _, digests, writable in found)
    assert len(entries(tmp_path)) == len(list((tmp_path / "kind").iterdir())) == 25
