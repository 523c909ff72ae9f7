"""`RCGRPOTrainer`: moves data between the rooms, on TRL's base trainer.

The way of one edit: sampler → rows (undecoded) → `Edit` → `editor.encode` → region-decoupled noise → `rollout` →
pictures → rewards → advantages → transitions → `compute_loss`. Start-up is a list of checks (`checks`, `rows`), groups
come from the generation cycle (`cycle`), numbers go to the log (`run_log`) and weights to disk (`saving`); here is the
update.

Gotchas: rollout and update call the same wrapped module through `editor.velocity`, else the policy ratio is not 1.
Whole groups live on one process, because candidates are compared with each other in latent space; what is drawn at
random comes from keys, so a resume, another GPU count or another order sees the same noise.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import PeftConfig
from torch import Tensor, nn
from transformers import TrainerCallback

from ..groups.policies import RatioPolicy, make_policy
from ..groups.reward_gradient import follow, reward_of_prediction
from ..groups.rollout import Group
from ..groups.transitions import Transitions, choose, gather, micro_batches
from ..inputs.hints import hinted
from ..maths.objective import keep_hinge, predict_clean, velocity_kl
from ..maths.regions import region_weights
from ..processes.lockstep import Lockstep
from ..processes.stopping import interruptible
from ..rewards import ATTENTION_REWARDS, FailureWatch, failing_together
from .adapters import StartingPoint, adapters_of
from .checkpoints import read_seal
from .checks import (
    check_attention,
    check_engine,
    check_enough,
    check_gradient,
    check_lora,
    check_optimizer,
    check_reference,
    probe_rewards,
)
from .config import RCGRPOConfig
from .config_checks import check_trackers
from .cycle import CycleSampler, GeneratingTrainer
from .gradient_meter import GradientMeter
from .guard import RegressionGuard
from .late import late_encoders, without_encoders
from .log import make_readable
from .model import compile_blocks, load_pipeline, trained_model, with_quantization
from .precision import computes_in_bf16, round_lora
from .rooms import editor_of, exploration_of, scoring_of
from .rows import check_played, each_set
from .sharding import shard

__all__ = ["CycleSampler", "RCGRPOTrainer", "UntaughtUpdates"]


class UntaughtUpdates(TrainerCallback):
    """Lets an update in which no candidate had a say pass without a step of the optimizer.

    Its gradients are 0, but AdamW's weight decay and the momentum of earlier updates would move the weights all the
    same. Optimizers leave weights without a gradient alone, and so their own state.
    """

    def __init__(self, trainer: "RCGRPOTrainer") -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, accelerator = self.trainer, self.trainer.accelerator
        taught = torch.tensor(float(trainer._taught), device=accelerator.device)
        trainer._taught = False
        if not float(accelerator.reduce(taught, reduction="sum")):
            if not args.max_grad_norm > 0:  # fp16's scaler wants to have seen gradients, as clipping would have let it
                accelerator.unscale_gradients()
            trainer.model.zero_grad(set_to_none=True)


@hinted
class RCGRPOTrainer(GeneratingTrainer):
    """
    Trainer for region-constrained GRPO on flow-matching image editors (RC-GRPO-Editing, arXiv 2604.09386).

    Args:
        model: a pipeline of FLUX.1-Kontext, FLUX.2-klein or Qwen-Image-Edit-Plus (any subclass), a Hub id or a local
            folder of one. The pipeline is trained in place: `trainer.pipeline` edits with the trained weights at any
            time.
        reward_funcs: a reward, or a list of them: callables `f(prompts, images, source_images, masks, **columns) ->
            list[float | None]` (sync or async), names of registered rewards, or dotted paths. See `rcgrpo.rewards`.
        args: the configuration.
        train_dataset: rows with a source picture, an instruction, a mask (1 = edit; in pictures 255) and the columns
            that the rewards read; a `datasets.Dataset` or a sequence of dictionaries.
        eval_dataset: held-out rows of the same kind, or a dictionary of such sets, whose numbers are logged as
            `eval_NAME_...`.
        peft_config: a new LoRA on the transformer. Without it the LoRA that is on the transformer already, loaded by
            diffusers or by PEFT, goes on being trained; if there is none, the whole transformer is trained.
        callbacks, optimizers: as in `transformers.Trainer`. Callbacks get the pipeline's (first) tokenizer as
            `processing_class`. A progress callback of your own takes the place of the readable log.
        quantization_config: how to quantize the base where `model` is a name: diffusers' `PipelineQuantizationConfig`,
            or the transformer's own configuration, such as a `BitsAndBytesConfig`.

    Raises:
        ValueError, TypeError: anything that cannot work, before the first step, naming field, value, what was expected
            and what to do.
    """

    loss_is_scaled_for_ga = False
    _tag_names: ClassVar[list[str]] = ["trl", "rcgrpo"]
    _name = "RC-GRPO"
    _paper: ClassVar[dict[str, str]] = {"title": "RC-GRPO-Editing", "id": "2604.09386"}

    def __init__(
        self,
        model: Any,
        reward_funcs: Callable | str | Sequence[Callable | str],
        args: RCGRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
    ) -> None:
        args = args if args is not None else RCGRPOConfig("rcgrpo-output")
        check_trackers(args)
        self.args = args  # which `_rows` reads before the Trainer's own start
        self.scoring = scoring_of(reward_funcs, args)
        check_gradient(args, self.rewards)
        self._records_attention = args.log_attention or any(r.name in ATTENTION_REWARDS for r in self.rewards)
        self.exploration = exploration_of(args)
        train_rows = self._rows(train_dataset, "train")
        eval_rows = each_set(eval_dataset, self._rows)
        if train_rows is None:
            raise ValueError("train_dataset: got None, expected rows with a source, an instruction and a mask")
        check_lora(peft_config)
        init_kwargs = with_quantization(args.model_init_kwargs, quantization_config)
        late = late_encoders(model, args, init_kwargs)
        self.pipeline = load_pipeline(model, without_encoders(init_kwargs, late))
        goes_on = peft_config is None and bool(adapters_of(self.pipeline.transformer))
        check_reference(args, has_lora=peft_config is not None or goes_on)
        self.editor = editor_of(self.pipeline, args, late)
        check_attention(args, self.editor, self._records_attention)
        self.policy = make_policy(args, args.named_regions)
        trained = trained_model(self.pipeline, peft_config, args.seed)
        self._start = StartingPoint(trained) if args.beta and goes_on else None
        check_optimizer(trained, optimizers[0])
        natively = computes_in_bf16(trained)
        if natively:
            round_lora(trained)
        super().__init__(
            model=trained,
            args=args,
            data_collator=list,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        held_out = list(eval_rows.values()) if isinstance(eval_rows, dict) else [eval_rows]
        check_engine(self.accelerator, args, goes_on, held_out)
        if natively:
            self.accelerator.native_amp = False  # no autocast around a model that is in bf16 itself
        if args.torch_compile:
            compile_blocks(self.pipeline.transformer, self.accelerator, args)
        if args.shard_model:
            shard(trained, self.accelerator)
            self._lockstep = Lockstep()
        check_enough(train_rows, self._cycle_size())
        for rows in (train_rows, *held_out):
            check_played(rows, args, self.exploration, self.editor)
        self.editor.place(self.accelerator.device)
        self._eval_editor = self.editor.with_steps(args.num_inference_steps_eval or args.num_inference_steps)
        self.failures = FailureWatch(self.rewards, args.max_reward_failures)
        self._taught = False
        self.add_callback(UntaughtUpdates(self))
        self._meter = GradientMeter(self.accelerator.unwrap_model(self.model), self._log_metric)
        if not args.shard_model:
            self.add_callback(self._meter)
        self.add_callback(RegressionGuard(args.stop_on_regression))
        self.callback_handler.processing_class = getattr(self.pipeline, "tokenizer", None)
        make_readable(self, callbacks or ())
        with failing_together(self.accelerator):
            probe_rewards(self.rewards, train_rows.edit(0), self.editor, self._records_attention, self._submit)
        self.forget_metrics()

    def _send_telemetry(self) -> None:
        """TRL's telemetry is not for other packages to send."""

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._taught = False
        return super()._inner_training_loop(*args, **kwargs)

    def _facts(self) -> dict[str, Any]:
        return {**super()._facts(), "drift": self._meter.drift}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._meter.drift = float(read_seal(resume_from_checkpoint).get("drift", "nan"))

    # ------------------------------------------------------------------------------------------ update

    def compute_loss(  # type: ignore[override]
        self, model: nn.Module, inputs: Transitions, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The policy's loss, the mean over a micro-batch of transitions; fills in `old`."""
        velocity = self.editor.velocity(model, inputs.latents, inputs.timestep, inputs.conditions)
        return self.loss_of(model, velocity, inputs)

    def loss_of(self, model: nn.Module, velocity: Tensor, inputs: Transitions) -> Tensor:
        """The loss of what the model answered, `[B, tokens, channels]`, which is all that a gradient comes through."""
        mismatch = self._rollout_mismatch(velocity, inputs)
        loss, numbers = self.policy.loss(velocity, inputs)
        numbers |= mismatch
        metrics, args = self._metrics["train"], self.args
        place = (inputs.latents, inputs.timestep, velocity)
        if args.reward_gradient_weight:
            way = follow(self.editor, model, inputs, velocity, args.reward_gradient_steps)
            weights, regions = self.reward_weights.tolist(), self.reward_regions
            views = inputs.generators("view")
            values = reward_of_prediction(self.editor, way.clean, inputs.groups, self.rewards, weights, regions, views)
            numbers["reward_of_prediction"] = float(values.detach().mean())
            loss = loss - args.reward_gradient_weight * values * inputs.taught
            place = way.places(inputs.generators("kl"))  # what the reward moves at any step, the KL may hold there
        if args.beta:
            latents, timestep, answer = place
            with torch.no_grad(), self._reference(model) as still:
                reference = self.editor.velocity(still, latents, timestep, inputs.conditions)
            kl = velocity_kl(answer, reference, region_weights(inputs.elements, args.beta_keep))
            numbers["kl"] = float(kl.detach().mean())
            loss = loss + args.beta * kl * inputs.taught
        if args.keep_hinge_weight:
            clean = predict_clean(inputs.latents, velocity, inputs.sigma)
            hinge = keep_hinge(clean, inputs.conditions.source, inputs.region, args.keep_hinge_margin)
            numbers["keep_hinge"] = float(hinge.detach().mean())
            loss = loss + args.keep_hinge_weight * hinge * inputs.taught
        for name, value in numbers.items():
            metrics[name].append(value)
        return loss.mean()

    @contextmanager
    def _reference(self, model: nn.Module) -> Iterator[Any]:
        """The model as it was at the start: its base, or with the LoRA that the run went on from."""
        if self._start is not None:
            yield self._start.of(model)
        else:
            with self.accelerator.unwrap_model(model).disable_adapter():
                yield model

    def _rollout_mismatch(self, velocity: Tensor, inputs: Transitions) -> dict[str, float]:
        """What tells that rollout and update do not ask the same model; the ratio cannot, as it starts from here."""
        euler = isinstance(self.pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
        steps_alike = self.args.policy == "flow_grpo" or (euler and self.args.solver in (None, "euler"))
        if inputs.old is not None or not steps_alike or not isinstance(self.policy, RatioPolicy):
            return {}
        return {"policy/rollout_mismatch": self.policy.mismatch(velocity, inputs)}

    def training_step(  # type: ignore[override]
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """One micro-step: rollout (or buffer), then backward through the transitions in micro-batches."""
        # Several processes can only stop together, where they meet.
        with interruptible() if self.accelerator.num_processes == 1 else nullcontext():
            return self._micro_step(model, inputs)

    def _micro_step(self, model: nn.Module, inputs: Any) -> Tensor:
        began = time.perf_counter()
        model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):  # schedule-free ones have modes
            self.optimizer.train()
        groups = self._prepare_inputs(inputs)
        args, known = self.args, self._old[self._step % self.args.gradient_accumulation_steps]
        key = (args.seed, self.state.global_step // args.num_iterations)
        chosen = choose(groups, self.policy, args.num_anchors, args.num_policy_steps, args.policy_step_indices, key)
        batches = micro_batches(groups, chosen, args.train_micro_batch_size)
        # A mean over edits, whether their groups are dropped or further turns follow, so that it is the same however
        # edits are spread over micro-steps and ranks.
        size = len(inputs) * args.num_anchors * args.num_policy_steps
        total = torch.zeros((), device=self.accelerator.device)
        for _ in range(self._passes_of_others(len(batches))):
            self._pass_along(model, gather(groups, batches[0][:1], self.policy, {}))
        for i, where in enumerate(batches, start=1):
            transitions = gather(groups, where, self.policy, known)
            self._taught |= bool(transitions.taught.any())
            # Gradients travel between processes once, with the last micro-batch.
            with nullcontext() if i == len(batches) else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(model, transitions) * len(where) / size
                total += loss.detach()
                if i == len(batches):  # the one place that all processes come to, however many micro-batches they have
                    with failing_together(self.accelerator):
                        self._refuse_non_finite(total, groups)
                self.accelerator.backward(loss / self.current_gradient_accumulation_steps)
            known.update(zip(where, transitions.old, strict=True))  # type: ignore[arg-type]
        self._step += 1
        self._metrics["train"]["step_time"].append(time.perf_counter() - began)
        return total / self.current_gradient_accumulation_steps

    def _passes_of_others(self, own: int) -> int:
        """How many more micro-batches another process has, of a model whose every pass takes all of them."""
        if self._lockstep is None:
            return 0
        numbers = self.accelerator.gather(torch.tensor([own], device=self.accelerator.device))
        return int(numbers.max()) - own

    def _pass_along(self, model: nn.Module, inputs: Transitions) -> None:
        """The passes of a micro-batch, from which nothing is learned."""
        asked = (inputs.latents, inputs.timestep, inputs.conditions)
        velocity = self.editor.velocity(model, *asked)
        if self.args.beta:
            with torch.no_grad(), self._reference(model) as still:
                self.editor.velocity(still, *asked)
        self.accelerator.backward(velocity.sum() * 0.0)

    def _refuse_non_finite(self, loss: Tensor, groups: Sequence[Group]) -> None:
        if not bool(torch.isfinite(loss)):
            rows = ", ".join(group.edit.label for group in groups)
            raise FloatingPointError(
                f"loss: got {float(loss)} at step {self.state.global_step} on {rows}, expected a finite "
                "number; lower learning_rate, or train in bf16 instead of fp16"
            )
