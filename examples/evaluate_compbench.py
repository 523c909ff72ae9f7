"""CompBench's metrics of FLUX.1-Kontext-dev without and with a LoRA, on the videos that training did not see.

    python examples/evaluate_compbench.py runs/compbench           CLIP and LPIPS weights are fetched on first use
    python examples/evaluate_compbench.py runs/compbench --tiny    the embedded editor, data and metrics, a CPU, seconds

A LoRA is a folder, a file or a Hub id; several are compared with each other. Results reach the disk batch by batch;
after a crash go on with `--resume`. With `--held_out 0`, for a LoRA that was trained on something else, all edits count
and the published rows stand beside them. What it leaves out: multi-turn edits, which `rcgrpo evaluate` has too. The
12 B path is the tiny one's code on the real class; it has not been run with the 12 B weights yet.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import FluxKontextPipeline

from rcgrpo import compbench_mini, load_edit_dataset
from rcgrpo.data import EditRows
from rcgrpo.evaluation.benchmark import Sampling, contenders, load_loras, make_plan, open_folder, run
from rcgrpo.evaluation.held_out import COMPBENCH_METRICS, MINI_METRICS, Scorer
from rcgrpo.evaluation.results import write_results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lora", nargs="+", help="folder, file or Hub id")
    parser.add_argument("--tiny", action="store_true", help="embedded editor, data and metrics")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/compbench-evaluation"))
    parser.add_argument("--held_out", type=float, default=0.1, help="the share of the videos that training left out")
    parser.add_argument("--num_samples", type=int, default=None, help="so many edits; all, or 16 with --tiny")
    parser.add_argument("--resume", action="store_true", help="go on with what --output_dir holds")
    arguments = parser.parse_args()

    if arguments.tiny:
        from rcgrpo.tiny import CALL, WEIGHTS

        model, name, dtype = str(WEIGHTS), "kontext-tiny", torch.float32
        data = compbench_mini("test", arguments.num_samples or 16)
        metrics, metric_size = MINI_METRICS, None  # enlarging 64 pixels to CompBench's 512 says nothing
        sampling = Sampling(64, CALL["num_inference_steps"], max_sequence_length=CALL["max_sequence_length"])
    else:
        model = name = "black-forest-labs/FLUX.1-Kontext-dev"
        dtype = torch.bfloat16
        split = "held_out" if arguments.held_out else "train"  # its large split is called train, and is the benchmark
        data = load_edit_dataset("BohanJia/CompBench", split=split, held_out=arguments.held_out)
        metrics, metric_size = COMPBENCH_METRICS, 512
        sampling = Sampling(resolution=512, num_inference_steps=28)  # the size of train_compbench.py

    rows = EditRows(data, "evaluation")
    plan = make_plan(rows, arguments.num_samples)
    scorer = Scorer(metrics, metric_size)
    entrants = contenders(arguments.lora)  # "base" first, then each LoRA under its folder's name
    names = [entrant.name for entrant in entrants]
    pipeline = FluxKontextPipeline.from_pretrained(model, dtype=dtype)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    load_loras(pipeline, entrants)

    settings = {"model": name, "dataset": "CompBench-mini" if arguments.tiny else "CompBench", **asdict(sampling)}
    settings |= {"loras": arguments.lora, "held_out": arguments.held_out, "num_samples": arguments.num_samples}
    earlier = open_folder(arguments.output_dir, settings, arguments.resume)
    records = run(pipeline, entrants, rows, plan, sampling, scorer, arguments.output_dir, earlier, batch_size=4)
    whole = not arguments.tiny and not arguments.held_out
    print(write_results(arguments.output_dir, records, rows, plan, names, metrics, settings, published=whole))
    print(f"Written to {arguments.output_dir}: results.json, results.md, report.html, samples.jsonl, images")


if __name__ == "__main__":
    main()
