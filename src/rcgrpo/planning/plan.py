"""From what calls take to what a run takes: the peak by phase, FLOP and seconds of an update, and what to lower.

What is counted: weights, the LoRA with its gradients, AdamW's states and its average in fp32, what the calls of each
phase allocate, the candidates' trajectories, and a judge in this process, which works beside rollouts. What is not:
CUDA's own context, fragmentation, workspaces.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from .cards import Card
from .judging import Judging, judge_weights, measure_judge
from .known import Parts
from .measuring import Costs, Update, measure_vae, measure_velocity, whole
from .model import Shape, make_editor, size_of, text_encoders

GB, TERA = 1e9, 1e12
OPTIMIZER = 16  # bytes a trained weight: itself, its gradient and AdamW's two states, all in fp32
BYTES = {"bitsandbytes_4bit": 0.5 + 4 / 64, "bitsandbytes_8bit": 1.0}
"""Bytes of a quantised weight: NF4 has a scale in fp32 for each 64."""


@dataclass(frozen=True)
class Run:
    """What a run's memory and time depend on.

    Args:
        shape: of one candidate's call; its batch is not read.
        update: of the update.
        edits: of an update on one process.
        candidates: of each edit.
        stages: the model's calls of a rollout.
        transitions: that an update reads of each edit.
        rollout_batch_size, train_micro_batch_size: as in the configuration, filled in.
        num_iterations, cache_conditions: as in the configuration.
        quantised: how each part is quantised that is; a key of `BYTES`.
        judge: bytes of a judge on the same GPU, as somebody states them.
        judges: those on the same GPU of which more is known.
        averaged: whether an average of what is trained is kept, as with `ema_decay`.
        updates: of the whole run, if known.
        held_out: pictures that the run draws of held-out edits, and `held_out_stages`, the model's calls for each.
    """

    shape: Shape
    update: Update
    edits: int = 8
    candidates: int = 12
    stages: int = 8
    transitions: int = 16
    rollout_batch_size: int = 12
    train_micro_batch_size: int = 16
    num_iterations: int = 1
    cache_conditions: bool = False
    quantised: tuple[tuple[str, str], ...] = ()
    judge: float = 0.0
    judges: tuple[Judging, ...] = ()
    averaged: bool = False
    updates: int | None = None
    held_out: int = 0
    held_out_stages: int = 0


@dataclass(frozen=True)
class Phase:
    """One phase of an update: the most bytes alive in it, all of its FLOP, seconds on a card if one is known."""

    name: str
    bytes: float
    flop: float
    seconds: float | None


@dataclass(frozen=True)
class Plan:
    """Of one run on one card.

    Args:
        weights: bytes by what they hold; `lora` with gradients and optimizer.
        phases: of an update, in order.
        parameters, trained: numbers of weights, of the transformer and of the LoRA.
        held_out: seconds of drawing held-out edits, in the whole run.
    """

    run: Run
    card: Card | None
    weights: dict[str, float]
    phases: tuple[Phase, ...]
    parameters: float
    trained: float
    held_out: float | None = None

    @property
    def peak(self) -> Phase:
        """The phase that needs the most memory."""
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def peak_when_cached(self) -> Phase:
        """The same where `rcgrpo cache` has encoded everything, so that no text encoder is loaded."""
        return max(self.phases[1:], key=lambda phase: phase.bytes)

    @property
    def fits(self) -> bool:
        """On its card."""
        return self.card is None or self.peak.bytes <= self.card.bytes

    @property
    def seconds(self) -> float | None:
        """Of an update."""
        times = [phase.seconds for phase in self.phases]
        return None if None in times else sum(times)  # type: ignore[arg-type]


class Planner:
    """Plans for one model; what has been measured is not measured again."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self._measured: dict[Any, Any] = {}
        self._encoders = {
            name: (sum(w.numel() for w in model.parameters()), model.get_input_embeddings().weight.numel())
            for name, model in text_encoders(parts).items()
        }

    def plan(self, run: Run, card: Card | None = None, share: float = 0.4) -> Plan:
        """What a run takes.

        Args:
            card: that it is to run on.
            share: of the card's peak that it reaches.
        """
        rollout, train = self._velocity(run, False), self._velocity(run, True)
        decode, encode = self._vae(run, True), self._vae(run, False)
        weights = self._weights(run, train)
        encoders = weights["text encoders"]
        resident = sum(weights.values()) - (encoders if run.cache_conditions else 0)
        unpacked = 2.0 * train.largest if dict(run.quantised).get("transformer") else 0.0  # one matrix at a time
        images, prompts = run.edits * run.candidates / run.num_iterations, run.edits / run.num_iterations
        guided = bool(self._guided(run))
        text = sum(2 * (number - table) for number, table in self._encoders.values()) * run.shape.max_sequence_length
        sampled = images * run.stages * rollout.flop / run.rollout_batch_size
        learned = run.edits * run.transitions * train.flop / run.train_micro_batch_size
        judging = sum(self._remember(judge, partial(measure_judge, judge)) for judge in run.judges)
        halves = run.shape.vae_dtype.itemsize // 2  # fp32 convolutions run in TF32, at half of the peak
        rows = [
            ("encode", encode.peak + (encoders if run.cache_conditions else 0), prompts * (text * (1 + guided)), 1),
            ("rollout", rollout.peak + unpacked + judging, sampled, 1),
            ("decode", decode.peak + judging, images * decode.flop, halves),
            ("update", train.peak + unpacked, learned, 1),
        ]
        speed = None if card is None or card.flops is None else card.flops * share
        phases = [
            Phase(name, resident + more, flop, None if speed is None else flop * slower / speed)
            for name, more, flop, slower in rows
        ]
        drawn = run.held_out_stages * rollout.flop / run.rollout_batch_size + decode.flop * halves
        held_out = None if speed is None else run.held_out * drawn / speed
        return Plan(run, card, weights, tuple(phases), train.frozen, train.trained, held_out)

    def advice(self, plan: Plan, share: float = 0.4) -> tuple[list[str], Plan]:
        """What to set for the run to fit, one thing after another, and the plan with it; it may still not fit."""
        said: dict[str, str] = {}
        while not plan.fits:
            for name, text, changed in _smaller(plan):
                said[name] = text
                plan = self.plan(changed, plan.card, share)
                break
            else:
                break
        return list(said.values()), plan

    # -------------------------------------------------------------------------------- measurements

    def _remember(self, key: Any, make: Any) -> Any:
        if key not in self._measured:
            self._measured[key] = make()
        return self._measured[key]

    def _velocity(self, run: Run, train: bool) -> Costs:
        batch = run.train_micro_batch_size if train else run.rollout_batch_size
        update = run.update if train else replace(run.update, gradient_checkpointing=True)
        shape = replace(run.shape, batch=batch)
        measure = partial(measure_velocity, self.parts, shape, update, train)
        return self._remember((shape, update, train), lambda: whole(self.parts, measure))

    def _vae(self, run: Run, decode: bool) -> Costs:
        shape = replace(run.shape, batch=1)  # one picture at a time
        return self._remember((shape, decode), lambda: measure_vae(self.parts, shape, decode))

    def _guided(self, run: Run) -> bool:
        return self._editor(run).cfg_scale > 1

    def _editor(self, run: Run) -> Any:
        blocks = {"num_layers": 1}
        return self._remember(("editor", run.shape), lambda: make_editor(self.parts, blocks, run.shape))

    def _weights(self, run: Run, train: Costs) -> dict[str, float]:
        quantised, shape, editor = dict(run.quantised), run.shape, self._editor(run)
        small = BYTES.get(quantised.get("transformer", ""), shape.dtype.itemsize)
        transformer = train.matrices * small + (train.frozen - train.matrices) * shape.dtype.itemsize
        encoders = 0.0
        for name, (number, table) in self._encoders.items():
            each = BYTES.get(quantised.get(name, ""), shape.text_dtype.itemsize)
            encoders += (number - table) * each + table * shape.text_dtype.itemsize
        rows, columns = editor.grid_for(*size_of(editor))
        # Every step of every candidate, in fp32, until the update has read it.
        trajectories = run.edits * run.candidates * (run.stages + 1) * rows * columns * editor.channels * 4
        return {
            "transformer": transformer,
            "VAE": self._vae(run, True).frozen * shape.vae_dtype.itemsize,
            "text encoders": encoders,
            "LoRA, gradients, AdamW": train.trained * OPTIMIZER,
            "averaged LoRA": train.trained * 4 * run.averaged,
            "trajectories": float(trajectories),
            "judge": run.judge + sum(map(judge_weights, run.judges)),
        }


def _smaller(plan: Plan) -> Iterator[tuple[str, str, Run]]:
    """Ways to lower the peak's phase, the cheapest first: the setting, what to say, the run with it."""
    run, phase = plan.run, plan.peak.name
    if phase == "update" and not run.update.gradient_checkpointing:
        changed = replace(run, update=replace(run.update, gradient_checkpointing=True))
        yield "gradient_checkpointing", "gradient_checkpointing: true", changed
    if phase == "update" and run.train_micro_batch_size > 1:
        size = run.train_micro_batch_size // 2
        yield "train", f"train_micro_batch_size: {size}", replace(run, train_micro_batch_size=size)
    if phase == "rollout" and run.rollout_batch_size > 1:
        size = run.rollout_batch_size // 2
        yield "rollout", f"rollout_batch_size: {size}", replace(run, rollout_batch_size=size)
    if run.judge or run.judges:
        yield "judge", "the judge on a server, at RCGRPO_JUDGE_URL", replace(run, judge=0.0, judges=())
    if not run.cache_conditions:
        yield "cache", "cache_conditions: true", replace(run, cache_conditions=True)
    if "transformer" not in dict(run.quantised):
        changed = replace(run, quantised=(*run.quantised, ("transformer", "bitsandbytes_4bit")))
        yield "quantise", "model_init_kwargs: the transformer in NF4, as in recipes/flux-24gb.yaml", changed
    if phase != "encode" and run.shape.resolution > 256:
        size = run.shape.resolution * 3 // 4 // 64 * 64
        yield "resolution", f"resolution: {size}", replace(run, shape=replace(run.shape, resolution=size))
