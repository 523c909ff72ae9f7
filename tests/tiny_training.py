"""A trainer on a random editor of 32 x 32 pixels, rewards for it, and what a run left behind."""

import signal

import numpy as np
import torch
from peft import LoraConfig
from PIL import Image
from transformers import TrainerCallback

from processes import on_processes
from rcgrpo import RCGRPOConfig, RCGRPOTrainer
from tiny_kontext import TINY_CALL, build_tiny_kontext

LAYERS = ["to_q", "to_v", "to_k", "to_out.0"]
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-3, "lr_scheduler_type": "linear", "max_steps": 3}


def brightness(images, **columns):
    return [float(np.asarray(image).mean()) / 255 for image in images]


def redness(images, **columns):
    return [float(np.asarray(image)[..., 0].mean()) / 255 for image in images]


def by_number(images, prompts, **columns):
    """Blind, because eight-bit pixels would blow up the last bits in which batches of other shapes differ."""
    return [float((len(prompt) + i) % 4 % 3) for i, prompt in enumerate(prompts)]


def flat_for_removals(task, **columns):
    return [0.5 if t == "remove" else score for t, score in zip(task, by_number(**columns), strict=True)]


def make(
    folder,
    data,
    reward=brightness,
    eval_dataset=None,
    pipe=None,
    peft=True,
    callbacks=None,
    optimizers=(None, None),
    **options,
):
    """A trainer whose optimizer is plain SGD, so that weights show gradients."""
    small = {"resolution": 32, "max_sequence_length": 16, "num_inference_steps": 3, "num_policy_steps": 2}
    small |= {"policy_steps_range": [0, 1], "num_generations": 4, "num_anchors": 2, "max_steps": 2}
    small |= {"per_device_train_batch_size": 2, "learning_rate": 1.0, "optim": "sgd", "lr_scheduler_type": "constant"}
    small |= {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=LAYERS) if peft is True else peft
    pipe = pipe or build_tiny_kontext()
    pipe.set_progress_bar_config(disable=True)
    args = RCGRPOConfig(str(folder), **(small | options))
    return RCGRPOTrainer(pipe, reward, args, data, eval_dataset, lora, callbacks, optimizers)


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def trained_step_by_step(trainer):
    """Weights after each update."""
    found = []

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            found.append(weights(trainer))

    trainer.add_callback(Keep())
    trainer.train()
    return found


def distance(new, old, start):
    """Relative to how far training moved."""
    norm = sum((old[name] - start[name]).square().sum() for name in old).sqrt()
    assert norm > 0
    return float(sum((new[name] - old[name]).square().sum() for name in old).sqrt() / norm)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def history(trainer, first=0):
    timing = ("step_time", "train_", "eval_runtime", "eval_samples", "eval_step")
    rows = [row for row in trainer.state.log_history if row["step"] > first and "train_runtime" not in row]
    return [{k: v for k, v in row.items() if not k.startswith(timing)} for row in rows]


def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    source = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    generator = torch.Generator().manual_seed(3)
    return pipe(image=source, prompt="remove it", generator=generator, output_type="np", **TINY_CALL).images


def last(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


FLOW_GRPO = {"policy": "flow_grpo", "policy_steps_range": [0, 0.7]}


FOUR = {"per_device_train_batch_size": 4, "seed": 1}


def rolled_out(trainer, data, edits=1):
    groups = trainer.make_groups(
        [trainer.train_dataset.edit(i) for i in range(edits)], trainer.args.num_generations, (0, 0)
    )
    trainer.score_groups(groups)
    trainer.forget_metrics()
    return groups


def sized(size, **columns):
    return [float(s * (i % 4)) for i, s in enumerate(size)]


def pairs(size, **columns):
    return [float(i % 2) if s > 2 else None for i, s in enumerate(size)]


def sized_rows(data):
    """Four edits whose rewards spread by 1, 2, 3 and 4 times as much, the second with a turn of 5."""
    rows = [{**dict(data[i]), "size": i + 1, "turns": None} for i in range(4)]
    rows[1]["turns"] = [{"instruction": "add a red ball", "mask": rows[1]["mask"], "size": 5}]
    return rows


BATCH = {"per_device_train_batch_size": 4, "turns_column": "turns", "shuffle_dataset": False, "max_steps": 1}
BATCH |= {"advantage_power": 2.0}
BY_BATCH = {"scale_rewards": "batch"}, {"multi_objective_aggregation": "normalize_then_sum"}


def batch_advantages_of(trainer):
    """By the size of the edit's rewards."""
    return {g.edit.columns["size"]: g.advantages.tolist() for groups in trainer._buffer for g in groups}


class StopAt(TrainerCallback):
    """Ctrl-C, or whatever `act` does with the model, after an update."""

    def __init__(self, step, act=None):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == self.step:
            if self.act is None:
                raise KeyboardInterrupt
            self.act(model)


class Signal(TrainerCallback):
    """Sends this process a signal at an event of a step."""

    def __init__(self, step, number=signal.SIGTERM, event="on_step_begin"):
        self.step, self.number = step, number
        setattr(self, event, self.send)

    def send(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            signal.raise_signal(self.number)


def on_two_processes(folder, worker):
    """The exit status and the errors of a script, whose argument is the folder."""
    (folder / "worker.py").write_text(worker)
    return on_processes(2, folder / "worker.py", folder)
