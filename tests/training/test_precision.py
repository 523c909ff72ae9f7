"""`precision.py`: a bf16 base is asked in bf16, as stock pipelines ask it, and its LoRA is trained in fp32."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from rcgrpo.training.precision import RoundedLinear, computes_in_bf16, round_lora
from tiny_kontext import build_tiny_kontext
from tiny_training import last, make, weights

pytestmark = pytest.mark.filterwarnings("ignore")


def seen_dtypes(trainer):
    """Of what norms, layers and LoRA matrices of the blocks put out, in rollouts and updates."""
    found = set()

    def see(module, args, output):
        found.update(each.dtype for each in (output if isinstance(output, tuple) else (output,)))

    base = trainer.pipeline.transformer
    for block in (*base.transformer_blocks, *base.single_transformer_blocks):
        for module in block.modules():
            if isinstance(module, nn.Linear) or "Norm" in type(module).__name__:
                module.register_forward_hook(see)
    return found


def test_a_bf16_base_runs_without_autocast_and_meets_its_old_policy_exactly(tmp_path, data):
    pipe = build_tiny_kontext().to(torch.bfloat16)
    trainer = make(tmp_path, data, pipe=pipe, bf16=True, train_micro_batch_size=3, num_iterations=2, epsilon=0.2)
    assert not trainer.accelerator.native_amp
    found, start = seen_dtypes(trainer), weights(trainer)
    trainer.train()
    assert found == {torch.bfloat16}
    first, second = last(trainer, "policy/log_ratio_max")
    assert first == 0 < second
    assert all(value < 1e-2 for value in last(trainer, "policy/rollout_mismatch"))
    after = weights(trainer)
    assert {weight.dtype for weight in after.values()} == {torch.float32}
    moved = [(after[name] - start[name]).abs().max() for name in after if "lora_B" in name]
    assert all(move > 0 for move in moved)
    # Rounded to bf16 a step this small would vanish from some weight; in fp32 it does not.
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in after.values())


def test_before_training_it_is_the_stock_model_to_the_bit(tmp_path, data):
    stock = build_tiny_kontext().to(torch.bfloat16)
    trainer = make(tmp_path, data, pipe=build_tiny_kontext().to(torch.bfloat16), bf16=True, max_steps=1)
    asked = []
    trainer.pipeline.transformer.register_forward_hook(
        lambda module, args, kwargs, output: asked.append((kwargs, output)), with_kwargs=True
    )
    trainer.train()
    kwargs, (answer,) = asked[0]
    with torch.no_grad():
        (expected,) = stock.transformer(**kwargs)
    assert answer.dtype == torch.bfloat16 and torch.equal(answer, expected)


def test_an_fp32_base_keeps_autocast(tmp_path, data):
    trainer = make(tmp_path, data, bf16=True, max_steps=1)
    found = seen_dtypes(trainer)
    trainer.train()
    assert found == {torch.bfloat16}  # of weights in fp32
    assert {weight.dtype for weight in trainer.model.parameters()} == {torch.float32}
    assert not any(isinstance(module, RoundedLinear) for module in trainer.model.modules())


def test_weights_are_rounded_on_the_way_in_and_gradients_are_not():
    layer = nn.Linear(2, 1, bias=False)
    layer.__class__ = RoundedLinear
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.001, 3.0]]))  # 1.001 is 1 in bf16
    out = layer(torch.tensor([[2.0, 1.0], [0.0, 1.0]], dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16 and out.tolist() == [[5.0], [3.0]]
    out.sum().backward()
    assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad.tolist() == [[2.0, 2.0]]


@pytest.mark.parametrize(("dora", "rounded"), [(False, 2), (True, 0)])
def test_dora_is_left_as_it_is(dora, rounded):
    base = nn.Sequential(nn.Linear(4, 4, bias=False, dtype=torch.bfloat16))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], use_dora=dora))
    assert computes_in_bf16(model)
    round_lora(model)
    assert sum(isinstance(module, RoundedLinear) for module in model.modules()) == rounded
    out = model(torch.ones(1, 4, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    model.base_model.model[0].base_layer.weight.data = torch.ones(4, 4)
    assert not computes_in_bf16(model)
