"""An evaluation as the Hub reads it: `model-index`, a file for each LoRA, and in the card beside a LoRA when asked.

Where it fits: `rcgrpo evaluate` calls `write_cards` after `results.write_results`, whose `results.json` it reads. An
entry's dataset `config` is the category, its `args` hold the base's mean and the paired difference with its interval.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, metadata_save
from huggingface_hub.repocard_data import eval_results_to_model_index

from ..reporting.files import write_atomically
from ..training.hub import eval_result

CARDS = "cards"


def write_cards(folder: Path, loras: Mapping[str, Path | None], update: bool = False) -> list[Path]:
    """Write `cards/NAME.md` for each LoRA: metadata alone, which `huggingface_hub.metadata_load` reads.

    Args:
        folder: of the evaluation, with its `results.json`.
        loras: contenders and their LoRA files; the base has none.
        update: also put the entries into the `README.md` beside each LoRA, in place of those of the same data,
            category and metric.

    Returns:
        The READMEs that were updated.
    """
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    updated = []
    for name, lora in loras.items():
        entries = [] if lora is None else _entries(results, name)
        if lora is None or not entries:
            continue
        with write_atomically(folder / CARDS / f"{name}.md") as path:
            metadata_save(path, {"model-index": eval_results_to_model_index(name, entries)})
        readme = lora.parent / "README.md"
        if update and readme.is_file():
            _update(readme, name, entries)
            updated.append(readme)
    return updated


def _entries(results: Mapping[str, Any], name: str) -> list[EvalResult]:
    """One contender's means, category by category; those without a value are left out."""
    base, settings, found = results["contenders"][0], results["settings"], []
    for section in results["categories"]:
        means = {standing["name"]: standing["estimates"] for standing in section["standings"]}
        for metric, estimate in means[name].items():
            if estimate["mean"] is None:
                continue
            paired = means[f"{name} − {base}"][metric]
            args = {"base": means[base][metric]["mean"], "difference": paired["mean"]}
            args |= {"low": paired["low"], "high": paired["high"], "n": paired["n"]}
            args |= {"confidence": results["intervals"]["confidence"]}
            found.append(
                eval_result(
                    results["metrics"][metric]["label"],
                    estimate["mean"],
                    settings.get("dataset"),
                    {key: value for key, value in args.items() if value is not None},
                    dataset_config=section["name"],
                    dataset_split=" ".join(settings.get("splits", ())) or None,
                )
            )
    return found


def _update(path: Path, name: str, entries: Sequence[EvalResult]) -> None:
    def what(entry: EvalResult) -> tuple[Any, ...]:
        return (*entry.unique_identifier, entry.dataset_name, entry.metric_type)

    card, new = ModelCard.load(path), {what(entry) for entry in entries}
    kept = [entry for entry in card.data.eval_results or () if what(entry) not in new]
    card.data.model_name = card.data.model_name or name
    card.data.eval_results = [*kept, *entries]
    with write_atomically(path) as unfinished:
        card.save(unfinished)
