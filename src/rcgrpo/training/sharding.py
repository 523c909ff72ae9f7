"""A model spread over the processes block by block (PyTorch's FSDP2), its gradients and the optimizer's state with it.

Where it fits: the trainer shards what is trained in place of accelerate's wrapping. Checkpoints go through functions
below, so they are the same files as without, and any number of processes goes on from them. Gotchas: every forward
takes all processes (`processes.lockstep`), and so does whatever makes a tensor whole, in the same order everywhere. A
block's class has another name from then on, so it is compiled before.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from ..editors.attention import blocks_of


def base_of(model: nn.Module) -> nn.Module:
    """The transformer in a model that is trained."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def shard(model: nn.Module, accelerator: Any) -> None:
    """Spread a model's weights over all processes, LoRA and base, and let accelerate take it as it is.

    Args:
        model: what is trained, the same on every process, wherever its weights are.
        accelerator: accelerate's; the device is its.
    """
    base = base_of(model)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for block in blocks_of(base):
        fully_shard(block, mesh=mesh)
    fully_shard(base, mesh=mesh, reshard_after_forward=True)  # or its weights could not be changed after a rollout
    base.register_load_state_dict_pre_hook(spread_what_is_loaded)
    accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)  # without DDP


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, all of one that is not spread."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """On the CPU; of one that is spread, on every process at once."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def as_spread(value: Any, like: Tensor) -> Any:
    """A tensor that is whole, spread as another of its shape is; anything else as it is."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def spread_what_is_loaded(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a module takes over weights from a file."""
    for name, weight in module.named_parameters():
        if prefix + name in state_dict:
            state_dict[prefix + name] = as_spread(state_dict[prefix + name], weight)


def spread_optimizer_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Before an optimizer takes over its state from a file."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    state = dict(state_dict["state"])
    for number, weight in zip(numbers, weights, strict=True):
        if number in state:
            state[number] = {name: as_spread(value, weight) for name, value in state[number].items()}
    return {**state_dict, "state": state}


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Within it, entered by every process at once, a model's state dict holds what is trained, whole and on the CPU."""
    base = base_of(model)
    weights = {name: full(weight.detach()) for name, weight in base.named_parameters() if weight.requires_grad}

    def put_in(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        state_dict |= {prefix + name: weight for name, weight in weights.items() if prefix + name in state_dict}

    handle = base.register_state_dict_post_hook(put_in)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def whole_state(optimizer: Optimizer) -> Iterator[None]:
    """The same of an optimizer's."""
    state = {
        number: {name: full(value) if isinstance(value, Tensor) else value for name, value in each.items()}
        for number, each in optimizer.state_dict()["state"].items()
    }
    handle = optimizer.register_state_dict_post_hook(lambda _, kept: {**kept, "state": state})
    try:
        yield
    finally:
        handle.remove()


def plain_copy(model: Any) -> Any:
    """Of a sharded transformer, with the weights of its state dict and its own class again, to be saved."""
    kind: Any = next(each for each in type(model).__mro__ if not issubclass(each, FSDPModule))
    with torch.device("meta"):
        copy = kind.from_config(model.config)
    copy.load_state_dict(model.state_dict(), assign=True)
    return copy
