"""`hints.py`: a word on every name that people bring from TRL, PEFT, diffusers and their scripts."""

import inspect
from dataclasses import fields

import pytest
from diffusers import FluxKontextInpaintPipeline
from trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments

from rcgrpo import RCGRPOConfig, RCGRPOTrainer, cli
from rcgrpo.cli import app, data, data_tux, diagnose, edit, evaluate, rewards, train
from rcgrpo.inputs.hints import HINTS, Here, hint, hinted


def names(*classes):
    return {name for cls in classes for f in fields(cls) for name in (f.name, *_aliases(f))}


def _aliases(field):
    return [alias.removeprefix("--") for alias in field.metadata.get("aliases", ())]


TRAIN = names(train.ScriptArguments, RCGRPOConfig)
EDIT = names(edit.EditArguments)
TRAINER = set(inspect.signature(RCGRPOTrainer).parameters)
OTHERS = (evaluate.EvaluateArguments, diagnose.DiagnoseArguments, app.AppArguments, data.InspectArguments)
OTHERS += (data.MaskArguments, data_tux.BuildTuxArguments, rewards.ServeArguments)


@pytest.mark.parametrize(
    ("typed", "here"),
    {
        "lora_rank": "lora_r",
        "rank": "lora_r",
        "batch_size": "per_device_train_batch_size",
        "train_batch_size": "per_device_train_batch_size",
        "model_name_or_path": "model",
        "pretrained_model_name_or_path": "model",
        "lr": "learning_rate",
        "bnb_4bit_quant_type": "model_init_kwargs",
        "quantization_config": "model_init_kwargs",
        "dataset_name": "dataset",
        "dataset_test_split": "eval_split",
        "dataset_train_split": "train_split",
        "loss_type": "policy",
        "strength": "edit_strength",
        "true_cfg": "true_cfg_scale",
        "generator": "seed",
        "max_train_steps": "max_steps",
        "checkpointing_steps": "save_steps",
        "num_images_per_prompt": "num_generations",
        "height": "resolution",
        "num_samples": "num_train_samples",
        "reward": "reward_funcs",
        "output": "output_dir",
    }.items(),
)
def test_names_with_a_counterpart_in_training(typed, here):
    assert hint(typed, TRAIN, "--").startswith(f"it is called --{here} here")


@pytest.mark.parametrize(
    ("typed", "said"),
    {
        "use_dora": "peft_config=LoraConfig",
        "processing_class": "tokenizers",
        "steps_per_generation": "num_iterations",
        "padding_mask_crop": "mask_growth",
        "lora_dropout": "dropout would make the update see another policy",
        "max_completion_length": "no generated tokens",
        "vllm_gpu_memory_utilization": "rollout_batch_size",
        "sync_ref_model": "beta",
    }.items(),
)
def test_names_without_a_counterpart(typed, said):
    assert said in hint(typed, TRAIN, "--")


@pytest.mark.parametrize(
    ("typed", "here"),
    {
        "prompt": "instruction",
        "mask_image": "mask",
        "strength": "edit_strength",
        "num_images_per_prompt": "num_generations",
        "generator": "seed",
        "height": "resolution",
        "output_dir": "output",
        "lora_path": "lora",
        "steps": "num_inference_steps",
        "model_id": "model",
    }.items(),
)
def test_names_for_one_edit(typed, here):
    assert hint(typed, EDIT, "--").startswith(f"it is called --{here} here")


def test_a_typing_error_gets_the_nearest_name_and_nonsense_none():
    assert hint("learning_rat", TRAIN, "--") == "the nearest known one is --learning_rate"
    assert hint("zzzzz", TRAIN) is None


def test_everything_that_trl_and_diffusers_know_is_known_or_answered():
    theirs = names(GRPOConfig, ModelConfig, ScriptArguments) - {"ignore_bias_buffers"}
    theirs |= set(inspect.signature(GRPOTrainer).parameters) | {"model_name_or_path"}
    silent = [name for name in theirs if name not in TRAIN | TRAINER and hint(name, ()) is None and name not in HINTS]
    drawing = set(inspect.signature(FluxKontextInpaintPipeline.__call__).parameters) - {"self"}
    silent += [name for name in drawing if name not in EDIT and name not in HINTS]
    plumbing = {"output_type", "return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs"}
    assert sorted(set(silent) - plumbing - {"max_sequence_length", "_auto_resize"}) == []


def test_hints_lead_to_names_that_are_there():
    there = TRAIN | EDIT | TRAINER | names(*OTHERS) | {"init_lora"}
    targets = {name for found in HINTS.values() if isinstance(found, Here) for name in found.names}
    assert targets - there == set()


@pytest.mark.parametrize(
    ("cls", "given", "said"),
    [
        (RCGRPOConfig, {"loss_type": "dapo"}, "RCGRPOConfig does not have.*it is called policy here"),
        (RCGRPOConfig, {"lr": 1e-4}, "lr: got an argument .*it is called learning_rate here"),
        (RCGRPOConfig, {"load_in_4bit": True}, "it is called model_init_kwargs here"),
        (RCGRPOConfig, {"lora_r": 8}, "peft_config=LoraConfig"),
        (RCGRPOConfig, {"num_generatoins": 8}, "the nearest known one is num_generations"),
        (RCGRPOConfig, {"zzzzz": 8}, "expected one of its fields$"),
        (RCGRPOTrainer, {"processing_class": None}, "RCGRPOTrainer does not have.*tokenizers"),
        (RCGRPOTrainer, {"reward_func": None}, "it is called reward_funcs here"),
        (RCGRPOTrainer, {"tokenizer": None}, "tokenizers; leave it out"),
    ],
)
def test_keywords_in_python(cls, given, said):
    with pytest.raises(TypeError, match=said):
        cls(**given)


def test_a_class_keeps_its_signature_and_its_subclasses():
    @hinted
    class Base:
        """Kept."""

        def __init__(self, model, size=3):
            self.model, self.size = model, size

    class Wider(Base):
        def __init__(self, model, extra, **rest):
            super().__init__(model, **rest)
            self.extra = extra

    assert list(inspect.signature(Base).parameters) == ["model", "size"] and Base.__doc__ == "Kept."
    assert Wider(1, extra=2, size=4).size == 4 and Base(1, 5).size == 5
    with pytest.raises(TypeError, match=r"model_id: got an argument that Base does not have.*called model here"):
        Wider(1, 2, model_id="x")


@pytest.mark.parametrize("flag", ["--lora_rank", "--lora-rank", "--lora-rank=8"])
def test_the_command_line_asks(flag):
    with pytest.raises(SystemExit, match=r"^rcgrpo train: unknown flag '--lora.rank'; it is called --lora_r here"):
        cli.main(["train", flag, "8"])


def test_a_config_file_asks(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("use_dora: true\n")
    with pytest.raises(SystemExit, match="unknown key 'use_dora'; pass `peft_config=LoraConfig"):
        cli.main(["train", "--config", str(path)])


MASKS, INSPECT, DIAGNOSE = data.MaskArguments, data.InspectArguments, diagnose.DiagnoseArguments
ONE_NAME = {
    "num_samples": (evaluate.EvaluateArguments, DIAGNOSE, INSPECT, MASKS),
    "num_generations": (RCGRPOConfig, DIAGNOSE, edit.EditArguments),
    "rollout_batch_size": (RCGRPOConfig, DIAGNOSE),
    "output_dir": (RCGRPOConfig, evaluate.EvaluateArguments, DIAGNOSE, MASKS, data_tux.BuildTuxArguments),
    "dataset": (train.ScriptArguments, evaluate.EvaluateArguments, DIAGNOSE, INSPECT, MASKS),
    "output": (edit.EditArguments, INSPECT),  # files
}


@pytest.mark.parametrize("name", ONE_NAME)
def test_flags_with_one_meaning_have_one_name(name):
    assert [cls.__name__ for cls in ONE_NAME[name] if name not in {f.name for f in fields(cls)}] == []
