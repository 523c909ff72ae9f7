"""Bases whose weights are stored in fewer bits, as far as what stores them is installed: a LoRA on them trains."""

import pytest
import torch

from tiny_kontext import build_tiny_kontext
from tiny_training import last, make, same, weights

pytestmark = pytest.mark.filterwarnings("ignore")


def in_fp8(transformer):
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)


def in_int8_by_torchao(transformer):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    torchao.quantize_(transformer, torchao.Int8WeightOnlyConfig())


@pytest.mark.parametrize("store", [in_fp8, in_int8_by_torchao])
def test_a_base_of_fewer_bits_stays_as_it_is_while_its_lora_trains(tmp_path, data, store):
    pipe = build_tiny_kontext().to(torch.bfloat16)
    store(pipe.transformer)
    trainer = make(tmp_path, data, pipe=pipe, bf16=True, max_steps=1)
    start = weights(trainer)
    base = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    assert not trainer.accelerator.native_amp
    trainer.train()
    assert last(trainer, "policy/log_ratio_max") == [0.0] and last(trainer, "grad_norm")[0] > 0
    assert not same(weights(trainer), start)
    after = dict(trainer.model.named_parameters())
    assert all(p.dtype == after[name].dtype and torch.equal(p.float(), after[name].float()) for name, p in base.items())
    assert store is not in_fp8 or torch.float8_e4m3fn in {p.dtype for p in base.values()}
