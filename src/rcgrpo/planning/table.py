"""A plan as a table that people read, and as plain values."""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .plan import GB, TERA, Plan

WIDTH = 112


def as_values(plan: Plan, share: float) -> dict[str, Any]:
    """For `--json`: gigabytes are 1e9 bytes, TFLOP 1e12 operations, times seconds."""
    images = plan.run.edits * plan.run.candidates / plan.run.num_iterations
    return {
        "gpu": None if plan.card is None else asdict(plan.card),
        "peak_share": share,
        "parameters": round(plan.parameters),
        "trained": round(plan.trained),
        "resident_gb": {name: value / GB for name, value in plan.weights.items()},
        "phases": [
            {"phase": each.name, "gb": each.bytes / GB, "tflop": each.flop / TERA, "seconds": each.seconds}
            for each in plan.phases
        ],
        "peak_gb": plan.peak.bytes / GB,
        "peak_phase": plan.peak.name,
        "fits": plan.fits,
        "seconds_per_update": plan.seconds,
        "images_per_update": images,
        "updates": plan.run.updates,
        "hours": _hours(plan),
        "held_out_pictures": plan.run.held_out,
        "held_out_hours": None if plan.held_out is None else plan.held_out / 3600,
        "peak_gb_when_cached": plan.peak_when_cached.bytes / GB,
    }


def as_text(plan: Plan, share: float) -> str:
    """Lines of at most `WIDTH` characters."""
    run = plan.run
    parts = [f"{name} {value / GB:.1f}" for name, value in plan.weights.items() if value]
    if run.cache_conditions:
        parts = [f"({part} in encode only)" if part.startswith("text") else part for part in parts]
    rows = [("phase", "GB", "TFLOP", "seconds")]
    rows += [
        (each.name, f"{each.bytes / GB:.1f}", f"{each.flop / TERA:.0f}", _number(each.seconds)) for each in plan.phases
    ]
    flop = sum(phase.flop for phase in plan.phases) / TERA
    rows += [("an update", f"{plan.peak.bytes / GB:.1f}", f"{flop:.0f}", _number(plan.seconds))]
    images = run.edits * run.candidates / run.num_iterations
    lines = [*textwrap.wrap(f"GB that stay: {', '.join(parts)}", WIDTH, subsequent_indent="  "), *_columns(rows)]
    counts = f"{images:.0f} images an update on each GPU"
    if run.updates:
        counts += f"; {run.updates} updates, {images * run.updates:.0f} images"
        hours = _hours(plan)
        counts += "" if hours is None else f", {hours:.1f} hours"
    lines.append(counts)
    if run.held_out:
        drawn = "" if plan.held_out is None else f", {plan.held_out / 3600:.1f} hours on one GPU"
        lines.append(f"held-out edits: {run.held_out} pictures of {run.held_out_stages} steps in all{drawn}")
    if plan.card is not None:
        margin = (plan.card.bytes - plan.peak.bytes) / GB
        fits = f"fits, {margin:.1f} GB to spare" if plan.fits else f"does not fit, by {-margin:.1f} GB"
        speed = "" if plan.card.flops is None else f", at {share:g} of {plan.card.flops / TERA:.0f} TFLOP/s (assumed)"
        lines.append(f"{plan.card.name}{speed}: {fits}; the peak is in {plan.peak.name}")
    if run.cache_conditions:
        cached = plan.peak_when_cached
        lines.append(
            f"after `rcgrpo cache` no text encoder is loaded: {cached.bytes / GB:.1f} GB, the peak in {cached.name}"
        )
    return "\n".join(lines)


def _hours(plan: Plan) -> float | None:
    return None if plan.seconds is None or not plan.run.updates else plan.seconds * plan.run.updates / 3600


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
