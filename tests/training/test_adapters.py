"""`adapters.py`: what comes wrapped, or with an adapter, is trained on as it is, and saved as anyone opens it."""

import json
import logging

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors import safe_open

from rcgrpo import compbench_mini
from rcgrpo.editors import RegionDecoupledFluxKontextPipeline
from rcgrpo.training.adapters import StartingPoint, adapters_of, describe, unwrap
from rcgrpo.training.hub import save_lora
from tiny_kontext import build_tiny_kontext
from tiny_loras import draw, trained
from tiny_training import by_number, last, make, weights

pytestmark = pytest.mark.filterwarnings("ignore")
ODD = {"rank_pattern": {"proj_mlp": 3}, "alpha_pattern": {"attn.to_q": 1}}
LAST = {
    "target_modules": ["proj_out", "attn.to_q"],
    "alpha_pattern": {"^proj_out": 3},
    "rank_pattern": {"^proj_out": 1},
}


@pytest.fixture(scope="module")
def data():
    return compbench_mini("train", 12, 32)


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA file of r 2 and alpha 6 that changes what is drawn."""
    return save_lora(*trained(), tmp_path_factory.mktemp("lora")).parent


@pytest.fixture
def untraced():
    """Compiled modules run as they are written: what they are called is looked at, and tracing them takes long."""
    with torch.compiler.set_stance("force_eager"):
        yield


def loaded(folder, **options):
    pipe = build_tiny_kontext()
    pipe.load_lora_weights(folder, **options)
    return pipe


def wrapped(name="default", **options):
    """The pipeline whose transformer is a `PeftModel`, as TRL's users go on with an adapter."""
    pipe, model = trained(**options)
    if name != "default":
        config, state = model.peft_config["default"], model.state_dict()
        pipe = build_tiny_kontext()
        model = get_peft_model(pipe.transformer, config, adapter_name=name)
        model.load_state_dict({key.replace(".default.", f".{name}."): weight for key, weight in state.items()})
    pipe.transformer = model
    return pipe


def near(images, others):
    return float((images - others).abs().max()) < 1e-5


def stock(folder):
    """What anybody draws with what a run saved."""
    pipe = build_tiny_kontext()
    if (folder / "transformer").exists():
        pipe.transformer = FluxTransformer2DModel.from_pretrained(folder / "transformer")
    else:
        pipe.load_lora_weights(folder)
    return draw(pipe)


def saved_as_trained(trainer, folder, before):
    trainer.train()
    trainer.save_model()
    after = draw(trainer.pipeline)
    assert not near(after, before), "nothing was trained"
    assert near(stock(folder), after)
    return after


# Going on ---------------------------------------------------------------------------------------------------------


def from_checkpoint(lora, tmp_path):
    pipe, model = trained()
    model.save_pretrained(tmp_path / "peft")
    pipe = build_tiny_kontext()
    pipe.transformer = PeftModel.from_pretrained(pipe.transformer, tmp_path / "peft")  # frozen, as for inference
    return pipe


def compiled_peft(lora, tmp_path):
    pipe = wrapped()
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    return pipe


def compiled_then(bring):
    def make(lora, tmp_path):
        pipe = build_tiny_kontext()
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
        bring(pipe, lora)
        return pipe

    return make


def with_peft(pipe, lora):
    config, state = (model := wrapped().transformer).peft_config["default"], model.state_dict()
    pipe.transformer = get_peft_model(pipe.transformer, config)
    own = pipe.transformer.state_dict()
    pipe.transformer.load_state_dict({key: state[key.replace("._orig_mod", "")] for key in own})


WAYS = {
    "loaded": lambda lora, tmp_path: loaded(lora),
    "loaded under a name": lambda lora, tmp_path: loaded(lora, adapter_name="mine"),
    "a region pipeline": lambda lora, tmp_path: RegionDecoupledFluxKontextPipeline(**loaded(lora).components),
    "PEFT": lambda lora, tmp_path: wrapped(),
    "PEFT under a name": lambda lora, tmp_path: wrapped("mine"),
    "a PEFT checkpoint": from_checkpoint,
    "injected by diffusers": lambda lora, tmp_path: trained()[0],
    "PEFT, compiled": compiled_peft,
    "compiled, PEFT": compiled_then(with_peft),
    "compiled, loaded": compiled_then(lambda pipe, lora: pipe.load_lora_weights(lora)),
}


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("way", WAYS)
def test_the_one_lora_goes_on_whatever_brought_it(way, lora, data, tmp_path):
    pipe = WAYS[way](lora, tmp_path)
    before = draw(pipe)
    assert not near(before, draw(build_tiny_kontext()))
    trainer = make(tmp_path / "out", data, pipe=pipe, peft=None, learning_rate=3.0)
    assert torch.equal(draw(trainer.pipeline), before)
    config = trainer.model.peft_config["default"]
    assert (config.r, config.lora_alpha) == (2, 6) and len(weights(trainer)) == 2 * 10
    assert all(".lora_" in name for name in weights(trainer))
    saved_as_trained(trainer, tmp_path / "out", before)
    stored = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (stored["r"], stored["lora_alpha"], stored["lora_dropout"]) == (2, 6, 0)
    assert describe(trainer.pipeline.transformer, [])["lora_r"] == 2


@pytest.mark.parametrize(
    "options", [ODD, LAST, {"use_rslora": True, "r": 3}, {"use_dora": True}], ids=["patterns", "last", "rslora", "dora"]
)
@pytest.mark.parametrize("by", ["file", "PEFT"])
def test_scales_of_any_kind_are_kept_in_both_files(by, options, data, tmp_path):
    pipe = wrapped(**options)
    if by == "file":
        save_lora(pipe, pipe.transformer, tmp_path / "first")
        pipe = loaded(tmp_path / "first")
    before = draw(pipe)
    trainer = make(tmp_path / "out", data, pipe=pipe, peft=None, learning_rate=1.0)
    assert near(draw(trainer.pipeline), before)
    after = saved_as_trained(trainer, tmp_path / "out", before)
    other = build_tiny_kontext()
    other.transformer = PeftModel.from_pretrained(other.transformer, tmp_path / "out")
    assert near(draw(other), after)


def test_a_second_trainer_goes_on_where_the_first_one_ended(data, tmp_path):
    first = make(tmp_path / "1", data)
    base = draw(first.pipeline)
    between = saved_as_trained(first, tmp_path / "1", base)
    second = make(tmp_path / "2", data, pipe=first.pipeline, peft=None)
    assert torch.equal(draw(second.pipeline), between)
    saved_as_trained(second, tmp_path / "2", between)


@pytest.mark.parametrize("names", [("default_0", "other"), ("a", "default")])
def test_a_run_that_went_on_is_resumed_bit_by_bit(names, lora, data, tmp_path):
    options = {"peft": None, "save_strategy": "steps", "save_steps": 1, "beta": 0.1}
    whole = make(tmp_path / "whole", data, pipe=loaded(lora, adapter_name=names[0]), **options)
    whole.train()
    again = make(tmp_path / "again", data, pipe=loaded(lora, adapter_name=names[1]), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert all(torch.equal(w, weights(again)[name]) for name, w in weights(whole).items())
    assert last(again, "kl") == last(whole, "kl") and last(again, "kl")[-1] > 0


def test_a_weight_becomes_part_of_alpha_and_dropout_is_off(lora, data, tmp_path, caplog):
    pipe = loaded(lora, adapter_name="mine")
    pipe.set_adapters("mine", 0.5)
    before = draw(pipe)
    trainer = make(tmp_path, data, pipe=pipe, peft=None, learning_rate=3.0)
    assert torch.equal(draw(trainer.pipeline), before)
    assert trainer.model.peft_config["default"].lora_alpha == 3
    saved_as_trained(trainer, tmp_path, before)
    with caplog.at_level(logging.WARNING):
        trainer = make(tmp_path, data, pipe=wrapped(lora_dropout=0.5), peft=None)
    assert "has lora_dropout=0.5, which is switched off" in caplog.text
    assert not any(isinstance(module, torch.nn.Dropout) and module.p for module in trainer.model.modules())


def test_an_adapter_of_low_precision_is_trained_in_fp32(lora, data, tmp_path):
    pipe = build_tiny_kontext()
    pipe.transformer.to(torch.bfloat16)
    pipe.load_lora_weights(lora)
    trainer = make(tmp_path, data, pipe=pipe, peft=None)
    assert {weight.dtype for weight in weights(trainer).values()} == {torch.float32}


def test_the_kl_of_a_run_that_goes_on_is_to_where_it_started(lora, data, tmp_path):
    trainer = make(tmp_path, data, by_number, pipe=loaded(lora), peft=None, beta=0.5, max_steps=2)
    trainer.train()
    kl = [row["kl"] for row in trainer.state.log_history if "kl" in row]
    assert kl[0] == 0 and kl[1] > 0
    inputs = {"hidden_states": torch.randn(2, 8, 16), "encoder_hidden_states": torch.randn(2, 4, 32)}
    inputs |= {"pooled_projections": torch.randn(2, 32), "timestep": torch.full([2], 0.5), "return_dict": False}
    inputs |= {"txt_ids": torch.zeros(4, 3), "img_ids": torch.zeros(8, 3)}
    with torch.no_grad():
        now = trainer.model(**inputs)[0]
        with trainer._reference(trainer.model) as still:
            reference = still(**inputs)[0]
        assert torch.equal(reference, loaded(lora).transformer(**inputs)[0])
        assert torch.equal(now, trainer.model(**inputs)[0]) and not torch.equal(now, reference)


def test_the_starting_point_is_seen_through_wrappers(tmp_path):
    model = torch.nn.Linear(2, 2)
    start, values = StartingPoint(model), torch.ones(1, 2)
    with torch.no_grad():
        before = model(values)
        model.weight += 1.0
        torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            for wrapper in (model, torch.nn.parallel.DistributedDataParallel(model), torch.compile(model)):
                with torch.compiler.set_stance("force_eager"):
                    assert torch.equal(start.of(wrapper)(values), before)
                    assert not torch.equal(wrapper(values), before)
        finally:
            torch.distributed.destroy_process_group()


def test_an_optimizer_of_the_adapters_weights_trains_them_and_another_is_refused(data, tmp_path):
    pipe = wrapped()
    optimizer = torch.optim.SGD([p for p in pipe.transformer.parameters() if p.requires_grad], 1.0)
    before = draw(pipe)
    with_it = {"peft": None, "optimizers": (optimizer, None), "learning_rate": 3.0}
    saved_as_trained(make(tmp_path, data, pipe=pipe, **with_it), tmp_path, before)
    with pytest.raises(ValueError, match="optimizers: got an optimizer of none of the weights that are trained"):
        make(tmp_path, data, optimizers=(optimizer, None))


# Ways out and refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["loaded", "PEFT", "injected by diffusers"])
def test_a_new_lora_beside_one_is_refused_and_on_top_of_a_fused_one_trained(way, lora, data, tmp_path):
    pipe = WAYS[way](lora, tmp_path)
    before = draw(pipe)
    with pytest.raises(ValueError, match=r"peft_config: got one .* peft_config=None; .*fuse_lora.*unload_lora_weights"):
        make(tmp_path, data, pipe=pipe)
    assert torch.equal(draw(pipe), before)
    if way == "PEFT":
        pipe.transformer = pipe.transformer.merge_and_unload()
    else:
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    base = {name: weight.clone() for name, weight in pipe.transformer.state_dict().items()}
    trainer = make(tmp_path, data, pipe=pipe)
    assert near(draw(trainer.pipeline), before) and list(trainer.model.peft_config) == ["default"]
    trainer.train()
    trainer.save_model()
    after = draw(trainer.pipeline)
    again = build_tiny_kontext()
    again.transformer.load_state_dict(base)
    again.load_lora_weights(tmp_path)
    assert near(draw(again), after) and not near(after, before)


def several(lora):
    pipe = loaded(lora, adapter_name="a")
    pipe.load_lora_weights(lora, adapter_name="b")
    return pipe


def changed(lora, *calls):
    pipe = loaded(lora, adapter_name="mine")
    for name, *arguments in calls:
        getattr(pipe, name)(*arguments)
    return pipe


def loha(lora):
    pipe = build_tiny_kontext()
    pipe.transformer = get_peft_model(pipe.transformer, LoHaConfig(target_modules=["attn.to_q"]))
    return pipe


def merged(lora):
    pipe = wrapped()
    pipe.transformer.merge_adapter()
    return pipe


def on_text_encoder(lora):
    pipe = build_tiny_kontext()
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), pipe.text_encoder)
    return pipe


def by_layer(lora):
    pipe = loaded(lora, adapter_name="mine")
    pipe.transformer.transformer_blocks[0].attn.to_q.set_scale("mine", 0.5)
    return pipe


REFUSED = {
    "several": (several, "got the adapters a, b on the transformer, expected one .*delete_adapters"),
    "off": (lambda lora: changed(lora, ["disable_lora"]), "'mine' on the transformer is switched off; .*enable_lora"),
    "weight 0": (
        lambda lora: changed(lora, ["set_adapters", "mine", 0.0]),
        "'mine' on the transformer is switched off",
    ),
    "by layer": (by_layer, "has weights 0.5, 1.0 in different layers"),
    "fused": (lambda lora: changed(lora, ["fuse_lora"]), "'mine' is merged .*unfuse_lora.*unload_lora_weights"),
    "merged": (merged, "'default' is merged .*unmerge_adapter"),
    "LoHa": (loha, "'default' on the transformer cannot be trained on. Got LoHaConfig but expected a LoraConfig"),
    "bias": (lambda lora: wrapped(bias="lora_only"), "cannot be trained on. Got LoraConfig.bias='lora_only'"),
    "more modules": (lambda lora: wrapped(modules_to_save=["x_embedder"]), "cannot be trained on. .*modules_to_save"),
    "text encoder": (on_text_encoder, "got the adapters default on text_encoder, which the trained LoRA would not"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_go_on_is_refused_with_what_to_do(case, lora, data, tmp_path):
    pipe, said = REFUSED[case][0](lora), REFUSED[case][1]
    with pytest.raises(ValueError, match=f"model: .*{said}"):
        make(tmp_path, data, pipe=pipe, peft=None)


# Wrappers -----------------------------------------------------------------------------------------------------------


def compiled_whole(pipe):
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


def compiled_blocks(pipe):
    for blocks in (pipe.transformer.transformer_blocks, pipe.transformer.single_transformer_blocks):
        for i, block in enumerate(blocks):
            blocks[i] = torch.compile(block, backend="eager")


def compiled_in_place(pipe):
    pipe.transformer.compile(backend="eager")


def compiled_repeated(pipe):
    pipe.transformer.compile_repeated_blocks(backend="eager")


def parallel(pipe):
    module = torch.nn.DataParallel(pipe.transformer)
    module.config, module.dtype = pipe.transformer.config, pipe.transformer.dtype  # the pipeline asks for these
    pipe.transformer = module


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("full", [False, True], ids=["LoRA", "full"])
@pytest.mark.parametrize("wrap", [compiled_whole, compiled_blocks, compiled_in_place, compiled_repeated, parallel])
def test_no_wrappers_name_stands_in_what_is_saved(wrap, full, data, tmp_path):
    pipe = build_tiny_kontext()
    before = draw(pipe)
    wrap(pipe)
    options = {"peft": None, "learning_rate": 1e-2} if full else {}
    trainer = make(tmp_path, data, pipe=pipe, save_strategy="steps", save_steps=1, **options)
    after = saved_as_trained(trainer, tmp_path, before)
    assert near(stock(tmp_path / "checkpoint-2"), after)
    assert wrap is parallel or near(draw(pipe), after)  # diffusers' pipelines take no DataParallel
    files = [*tmp_path.rglob("*.safetensors")]
    for file in files:
        with safe_open(file, "pt") as opened:
            assert not [key for key in opened.keys() if "_orig_mod" in key or "module." in key]  # noqa: SIM118
    assert len(files) == (3 if full else 6)


@pytest.mark.usefixtures("untraced")
def test_a_run_that_compiles_saves_plain_names_too(data, tmp_path):
    trainer = make(tmp_path, data, torch_compile=True, torch_compile_backend="eager")
    saved_as_trained(trainer, tmp_path, draw(build_tiny_kontext()))


def test_what_was_compiled_still_is(monkeypatch):
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    torch._dynamo.reset()
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert unwrap(torch.compile(layer, backend=backend)) is layer
    assert np.isfinite(layer(torch.ones(1, 2)).detach().numpy()).all() and len(calls) == 1
    assert list(layer.state_dict()) == ["0.weight", "0.bias"] and adapters_of(layer) == []
