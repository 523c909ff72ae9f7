"""Bases whose weights are stored in fewer bits, as far as what stores them is installed: a LoRA on them trains."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from tiny_kontext import build_tiny_kontext
from tiny_training import last, make, same, weights

pytestmark = pytest.mark.filterwarnings("ignore")
PAGE = Path(__file__).parents[2] / "docs" / "performance.md"


def in_place_of_layers(transformer, made):
    """Each layer of a block gives way to what is made of it."""
    for name, layer in list(transformer.named_modules()):
        if isinstance(layer, nn.Linear) and "transformer_blocks" in name:
            parent, _, last_name = name.rpartition(".")
            setattr(transformer.get_submodule(parent), last_name, made(layer))
    transformer.requires_grad_(False)


def in_fp8(transformer, monkeypatch):
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)


def in_int8_by_torchao(transformer, monkeypatch):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    torchao.quantize_(transformer, torchao.Int8WeightOnlyConfig())


def in_int8_by_bitsandbytes(transformer, monkeypatch):
    bnb = pytest.importorskip("bitsandbytes.nn", reason="bitsandbytes is not installed")

    def made(layer):
        new = bnb.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
        new.weight = bnb.Int8Params(layer.weight.detach().clone(), requires_grad=False, has_fp16_weights=False)
        new.bias = layer.bias
        return new.to("cpu")

    in_place_of_layers(transformer, made)
    transformer.is_loaded_in_8bit = True


def in_nf4_by_bitsandbytes(transformer, monkeypatch):
    bnb = pytest.importorskip("bitsandbytes.nn", reason="bitsandbytes is not installed")
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)  # kernels that refuse layers so narrow

    def made(layer):
        kinds = {"compute_dtype": torch.bfloat16, "quant_type": "nf4"}
        new = bnb.Linear4bit(layer.in_features, layer.out_features, **kinds)
        new.weight = bnb.Params4bit(layer.weight.detach().clone(), requires_grad=False, quant_type="nf4", module=new)
        new.bias = layer.bias
        return new.to("cpu")

    in_place_of_layers(transformer, made)
    transformer.is_loaded_in_4bit = True


def in_gguf(transformer, monkeypatch):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q8_0

    def made(layer):
        if layer.in_features % 32:  # which Q8_0 does not store
            return layer
        new = GGUFLinear(layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=torch.bfloat16)
        stored = gguf.quants.quantize(layer.weight.detach().float().numpy(), kind)
        new.weight, new.bias = GGUFParameter(torch.from_numpy(stored), quant_type=kind), layer.bias
        return new

    in_place_of_layers(transformer, made)


STORES = {
    "fp8": (in_fp8, torch.float8_e4m3fn),
    "torchao, int8 weights": (in_int8_by_torchao, None),
    "bitsandbytes, 8 bits": (in_int8_by_bitsandbytes, torch.int8),
    "bitsandbytes, 4 bits (NF4)": (in_nf4_by_bitsandbytes, torch.uint8),
    "GGUF, Q8_0": (in_gguf, torch.uint8),
}
"""How each row of the page's table stores weights, and the dtype that it then has."""


def read(weight):
    return weight.dequantize() if hasattr(weight, "qdata") else weight.float()  # torchao's tensors compare as nothing


@pytest.mark.parametrize("how", STORES)
def test_a_base_of_fewer_bits_stays_as_it_is_while_its_lora_trains(tmp_path, data, how, monkeypatch):
    store, stored = STORES[how]
    pipe = build_tiny_kontext().to(torch.bfloat16)
    store(pipe.transformer, monkeypatch)
    trainer = make(tmp_path, data, pipe=pipe, bf16=True, max_steps=1)
    start = weights(trainer)
    base = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    assert not trainer.accelerator.native_amp
    trainer.train()
    assert last(trainer, "policy/log_ratio_max") == [0.0] and last(trainer, "grad_norm")[0] > 0
    assert not same(weights(trainer), start)
    after = dict(trainer.model.named_parameters())
    assert all(p.dtype == after[name].dtype and torch.equal(read(p), read(after[name])) for name, p in base.items())
    assert stored is None or stored in {p.dtype for p in base.values()}


def test_the_page_s_table_says_what_is_tested():
    """No row without a test, no test without a row."""
    section = PAGE.read_text().partition("## Bases of fewer bits\n")[2].partition("\n## ")[0]
    table = "".join(line for line in section.splitlines(keepends=True) if line[0] == "|")
    assert set(re.findall(r"^\| ([^|]+) \|.*\| yes", table, re.MULTILINE)) == STORES.keys()
    assert table.count("\n") == len(STORES) + 2
