"""How noisy a configuration's gradient is: `python benchmarks/snr.py --set num_generations=12 policy='"nft"'`.

Rolls out groups of several edits, each from several draws of noise, with the main job's recipe and what `--set` says
otherwise, and takes each group's gradient at the model as it is. Says |mean|² over the variance of one group, in groups
(1 / that: so many make one standard deviation of signal) and in seconds of this machine, with 95 % bootstrap intervals
over edits, and which part of the variance is within an edit (other noise) and which between edits. Minutes, not hours.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor


class Noise(NamedTuple):
    """`signal`: the unbiased |mean|²; `within`, `between`: variances, the sum over parameters, of a single group."""

    signal: float
    within: float
    between: float

    @property
    def groups(self) -> float:
        """Groups for one standard deviation of signal; infinite where none was found."""
        return (self.within + self.between) / self.signal if self.signal > 0 else float("inf")


def noise_of(gram: Tensor) -> Noise:
    """Signal and noise of gradients from their inner products.

    Args:
        gram: `[edits, draws, edits, draws]`, of at least two edits and two draws each.
    """
    edits, draws = gram.shape[:2]
    if edits < 2 or draws < 2:
        raise ValueError(f"gram: got {edits} edits × {draws} draws, expected at least 2 of each to tell them apart")
    own = torch.einsum("erer->er", gram).sum(1)
    same = torch.einsum("eres->e", gram)  # |Σ_r g|² of each edit
    within = float(((own - same / draws) / (draws - 1)).mean())
    means, grand = same / draws**2, float(gram.sum()) / (edits * draws) ** 2
    spread = float((means.sum() - edits * grand) / (edits - 1))  # of the edits' means
    return Noise(grand - spread / edits, within, spread - within / draws)


def interval(gram: Tensor, resamples: int = 2000) -> tuple[float, float]:
    """95 % of |mean|² over a group's variance, by bootstrap over edits; a pair of copies is no pair of edits."""
    generator, edits = torch.Generator().manual_seed(0), len(gram)
    own = torch.einsum("eres->e", gram)
    cross = gram.sum((1, 3))
    draws, found = gram.shape[1], []
    total = noise_of(gram)
    variance = total.within + total.between
    for _ in range(resamples):
        count = torch.bincount(torch.randint(edits, (edits,), generator=generator), minlength=edits).double()
        pairs = count.outer(count)
        pairs.fill_diagonal_(0)
        off = cross - torch.diag(own)
        found.append(float((pairs * off).sum() / pairs.sum() / draws**2 / variance))
    low, high = torch.tensor(found).quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def gradients(trainer: Any, edits: Sequence[Any], draws: int) -> tuple[Tensor, float]:
    """`[edits, draws, parameters]` and the seconds that one group took."""
    from rcgrpo.transitions import choose, gather

    args, rows = trainer.args, []
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    trainer.model.train()
    began = time.process_time()
    for edit in edits:
        for draw in range(draws):
            key = ("snr", draw)
            groups = trainer.make_groups([edit], args.num_generations, key)
            trainer.score_groups(groups)
            steps = args.policy_step_indices
            chosen = choose(groups, trainer.policy, args.num_anchors, args.num_policy_steps, steps, key)
            trainer.model.zero_grad()
            trainer.compute_loss(trainer.model, gather(groups, chosen, trainer.policy, {})).backward()
            rows.append(
                torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
            )
    seconds = (time.process_time() - began) / len(rows)
    trainer.model.zero_grad()
    return torch.stack(rows).unflatten(0, (len(edits), draws)), seconds


def make_trainer(recipe: Path, overrides: Sequence[str], folder: str, edits: int) -> Any:
    from peft import LoraConfig

    from rcgrpo import RCGRPOConfig, RCGRPOTrainer, compbench_mini
    from rcgrpo.cli.parsing import use_embedded_model
    from rcgrpo.cli.train import LORA_TARGETS
    from rcgrpo.tiny import WEIGHTS

    use_embedded_model()
    settings = yaml.safe_load(recipe.read_text())
    settings |= {name: json.loads(value) for name, _, value in (each.partition("=") for each in overrides)}
    for name in ("model", "dataset", "num_train_samples", "num_eval_samples"):
        settings.pop(name, None)
    rewards, rank, alpha = (settings.pop(name) for name in ("reward_funcs", "lora_r", "lora_alpha"))
    settings |= {"save_strategy": "no", "disable_tqdm": True, "use_cpu": not torch.cuda.is_available(), "bf16": False}
    rows = compbench_mini("train", max(edits, settings["per_device_train_batch_size"]))
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules=LORA_TARGETS)
    return RCGRPOTrainer(str(WEIGHTS), rewards, RCGRPOConfig(folder, **settings), rows, None, lora)


def main() -> None:
    from importlib.resources import files

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path(str(files("rcgrpo") / "recipes" / "tiny.yaml")))
    parser.add_argument("--set", nargs="*", default=[], help="settings instead of the recipe's, as name=JSON")
    parser.add_argument("--edits", type=int, default=24)
    parser.add_argument("--draws", type=int, default=3, help="groups of each edit, from other noise")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(args.recipe, args.set, folder, args.edits)
        edits = [trainer.train_dataset.edit(i) for i in range(args.edits)]
        found, seconds = gradients(trainer, edits, args.draws)
    flat = found.flatten(0, 1)
    gram = (flat @ flat.T).double().unflatten(0, found.shape[:2]).unflatten(-1, found.shape[:2])
    noise, (low, high) = noise_of(gram), interval(gram)
    variance = noise.within + noise.between
    print(
        json.dumps(
            {
                "set": args.set,
                "snr": noise.signal / variance,
                "snr_95": [low, high],
                "groups": noise.groups,
                "seconds": noise.groups * seconds,
                "seconds_per_group": seconds,
                "within_share": noise.within / variance,
            }
        )
    )


if __name__ == "__main__":
    main()
