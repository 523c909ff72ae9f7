"""Bytes that live and floating-point operations, counted while real code runs on tensors without contents.

What autograd keeps, what checkpointing throws away and makes again, what a temporary costs: all of it is seen, as
every operation passes through here. Sizes are those of the storages, rounded up as CUDA's allocator does.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

_ROUND = 512  # bytes; CUDA's allocator hands out multiples
_SDPA_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_SDPA_FORMULAS = {
    _SDPA_ON_CPU: torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        torch.ops.aten._scaled_dot_product_flash_attention_backward
    ),
}


class Counter(TorchDispatchMode):
    """Counts what is allocated from its start on; `peaks` are the most bytes alive under each `label`.

    A question about the values of a tensor without contents, such as whether a mask is all ones, is answered by 1, and
    none is taken for zero.

    Args:
        known: tensors that were there before, which count nothing, and neither do views of them.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.label = ""
        self.live, self.flop = 0, 0
        self.peaks: dict[str, int] = {}
        self._seen = WeakIdKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        empty = bool(args) and isinstance(args[0], FakeTensor)
        if empty and func is torch.ops.aten._local_scalar_dense.default:
            return 1
        if empty and func is torch.ops.aten.nonzero.default and args[0].ndim == 1:
            return torch.arange(len(args[0])).unsqueeze(1)
        out = func(*args, **(kwargs or {}))
        packet = _SDPA_FORMULAS.get(func._overloadpacket, func._overloadpacket)
        if packet in flop_registry:
            self.flop += self._count(packet, func, args, kwargs or {}, out)
        tree_map_only(Tensor, self._see, out)
        self.peaks[self.label] = max(self.peaks.get(self.label, 0), self.live)
        return out

    def _count(self, packet: Any, func: Any, args: Any, kwargs: Any, out: Any) -> int:
        if func._overloadpacket is not packet and func._overloadpacket is not _SDPA_ON_CPU:
            # Arguments as CUDA's backward has them: gradient, query, key, value, out.
            return flop_registry[packet](*args[:5], None, out_val=out)
        if func._overloadpacket is _SDPA_ON_CPU:
            return flop_registry[packet](*args[:3], out_val=out)
        return flop_registry[packet](*args, **kwargs, out_val=out)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        size = -(-storage.nbytes() // _ROUND) * _ROUND
        self._seen[storage] = size
        self.live += size
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size


def _widened(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def widened(*args: Any, **kwargs: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.float(), (args, kwargs))
        return norm(*args, **kwargs)

    return widened


@contextmanager
def without_contents() -> Iterator[None]:
    """Everything made inside has shapes, dtypes and gradients, but neither memory nor values.

    It is on the CPU, as autograd refuses a GPU that is not there; norms are in fp32 under autocast as on CUDA.
    Attention is PyTorch's own, whatever this process or its environment has chosen for all models.
    """
    norms = {name: getattr(functional, name) for name in ("layer_norm", "rms_norm")}
    for name, norm in norms.items():
        setattr(functional, name, _widened(norm))
    try:
        with FakeTensorMode(), attention_backend():
            yield
    finally:
        for name, norm in norms.items():
            setattr(functional, name, norm)


def storages(*modules: nn.Module) -> list[Tensor]:
    """Parameters, their gradients and buffers: what lies in memory before anything is computed."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return [*tensors, *(tensor.grad for tensor in tensors if tensor.grad is not None)]
