"""How commands open a model: the embedded one as it was trained, another one as its makers draw with it."""

import os
from collections.abc import Sequence
from typing import Any

import torch

from ..editors.base import FlowEditor
from ..editors.lora import check_lora
from ..editors.opening import RegionDecoupledPipeline, region_decoupled_class, skeleton
from ..tiny import CALL, RESOLUTION, WEIGHTS
from ..training.model import naming_model
from .parsing import TINY, UsageError


def editor_of(model: str) -> tuple[type[FlowEditor], dict[str, Any]]:
    """The editor of a Hub id or folder, and its `model_index.json`; nothing else is read.

    Raises:
        ValueError: there is no such model, or none that has an editor.
    """
    with naming_model(model) as index:
        return region_decoupled_class(str(index.get("_class_name"))).editor_class, index


def call_defaults(model: str) -> dict[str, Any]:
    """`resolution`, steps, guidance and text length where a flag does not say otherwise; see `FlowEditor.usual_call`.

    Raises:
        ValueError: there is no such model, or none that has an editor.
    """
    editor, index = editor_of(_name(model))
    usual = editor.usual_call(index)
    if model == TINY:
        usual |= {"resolution": RESOLUTION}
        usual |= {name: CALL[name] for name in ("num_inference_steps", "max_sequence_length")}
    return usual


def sampling_settings(args: Any) -> dict[str, Any]:
    """How to draw, for `evaluation.benchmark.Sampling`: the model's defaults, and the flags that were set."""
    usual = call_defaults(args.model)
    asked = {name: getattr(args, name, None) for name in usual}
    return usual | {name: value for name, value in asked.items() if value is not None}


def open_pipeline(model: str) -> Any:
    """The pipeline with a region, on the GPU, or on the CPU where there is none; fp32 if embedded, else bfloat16.

    Args:
        model: "kontext-tiny", or a Hub id or folder.

    Raises:
        ValueError: it cannot be opened, or is a kind of model that has no editor.
    """
    name, dtype = _name(model), torch.float32 if model == TINY else torch.bfloat16
    with naming_model(name):
        pipeline = RegionDecoupledPipeline.from_pretrained(name, dtype=dtype)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def check_ready(model: str, reward_funcs: Sequence[str] = (), judge_on_server: bool = False) -> None:
    """Refuse a model without access, and judges that are not there, before rows and weights are loaded.

    Args:
        model: "kontext-tiny", or a Hub id or folder.
        reward_funcs: names of rewards; those that have a `check` are asked.
        judge_on_server: nobody but a server will do.

    Raises:
        ValueError: naming model or judge, and how to get it.
    """
    from ..rewards import resolve_rewards
    from ..rewards.judges import URL_VARIABLE

    with naming_model(_name(model)):
        pass
    rewards = resolve_rewards(list(reward_funcs)) if reward_funcs else []
    checks = [check for reward in rewards if (check := getattr(reward.function, "check", None)) is not None]
    if judge_on_server and checks and not os.environ.get(URL_VARIABLE):
        raise UsageError(
            f"--judge_on_server: got true without {URL_VARIABLE}, expected the address of a judge, such as "
            "http://judge:8000/v1; see docs/judges.md, or set it to false to load the judge in this process"
        )
    for check in checks:
        check()


def check_loras(model: str, loras: Sequence[str], flag: str = "--lora") -> None:
    """Refuse LoRAs that cannot be read or do not fit, before a large model is loaded and anything is written.

    Args:
        model: "kontext-tiny", or a Hub id or folder.
        loras: folders, files or Hub ids.
        flag: that named them.

    Raises:
        UsageError: naming the flag, the LoRA and what is wrong with it.
    """
    if not loras:
        return
    with naming_model(_name(model)):
        kind, transformer = skeleton(_name(model))
    for lora in loras:
        try:
            check_lora(lora, kind, transformer, flag)
        except ValueError as error:
            raise UsageError(str(error)) from error


def _name(model: str) -> str:
    return str(WEIGHTS) if model == TINY else model
