"""Train FLUX.1-Kontext-dev on CompBench with EditScore as the judge: the script to copy and change.

    accelerate launch examples/train_compbench.py      one or more GPUs of 80 GB
    python examples/train_compbench.py --tiny          the embedded editor, data and reward, a CPU, seconds

CompBench is a benchmark, so a tenth of its videos is kept away from training, and `evaluate_compbench.py` reports on
those. EditScore's judge runs beside the editor unless `RCGRPO_JUDGE_URL` names a server that runs it, which is faster.
What it leaves out: smaller GPUs (recipes `flux-24gb.yaml`, `flux-48gb.yaml`) and a report before and after; both come
with `rcgrpo train --config`. The 12 B path is the tiny one's code on the real class; it has not been run with the 12 B
weights yet, so its settings are a start, not a result.
"""

import argparse

from peft import LoraConfig

from rcgrpo import RCGRPOConfig, RCGRPOTrainer, compbench_mini, load_edit_dataset

HELD_OUT = 0.1  # share of the videos; the same in evaluate_compbench.py
LORA_TARGETS = [
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),  # the picture's side of attention
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),  # the instruction's side
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="embedded editor, data and reward")
    parser.add_argument("--output_dir", default="runs/compbench")
    parser.add_argument("--max_steps", type=int, default=None, help="updates; 300, or 2 with --tiny")
    parser.add_argument("--hub_model_id", default=None, help="push the LoRA there, e.g. user/kontext-compbench")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output_dir")
    arguments = parser.parse_args()

    if arguments.tiny:
        from rcgrpo.tiny import CALL, WEIGHTS

        model, data, data_name = str(WEIGHTS), compbench_mini("train", 64), "compbench-mini"
        reward_funcs, reward_weights = ["compbench_mini"], [1.0]
        length = CALL["max_sequence_length"]
        scale = dict(resolution=64, max_sequence_length=length, num_generations=4, num_anchors=2, max_steps=2)
    else:
        from rcgrpo.rewards import EditScoreReward

        model, data_name = "black-forest-labs/FLUX.1-Kontext-dev", "BohanJia/CompBench"
        data = load_edit_dataset(data_name, split="train", held_out=HELD_OUT, on_missing="drop")  # no mask: no region
        # What was asked for weighs more than what must stay, or the safest edit becomes none at all.
        reward_funcs, reward_weights = [EditScoreReward(), "background_ssim"], [1.0, 0.5]
        scale = dict(
            model_init_kwargs={"torch_dtype": {"default": "bfloat16", "vae": "float32"}},
            resolution=512,  # train at the size that you edit at
            num_generations=12,  # candidates of an edit ...
            num_anchors=4,  # ... and how many of them an update looks at
            gradient_accumulation_steps=8,  # edits in an update, on each GPU
            rollout_batch_size=4,  # these two bound memory and change nothing else
            train_micro_batch_size=1,
            warmup_steps=5,
            max_steps=300,
        )
    if arguments.max_steps is not None:
        scale["max_steps"] = arguments.max_steps
    config = RCGRPOConfig(
        arguments.output_dir,
        **scale,
        reward_weights=reward_weights,
        edit_strength=0.5,  # how much candidates differ inside the mask ...
        keep_strength=0.0,  # ... and outside it
        per_device_train_batch_size=1,
        learning_rate=1e-4,
        save_steps=25,
        log_completions=True,  # candidates and their rewards, in output_dir/completions
        report_to="none",
        push_to_hub=arguments.hub_model_id is not None,
        hub_model_id=arguments.hub_model_id,
    )
    trainer = RCGRPOTrainer(
        model=model,
        reward_funcs=reward_funcs,
        args=config,
        train_dataset=data,
        peft_config=LoraConfig(r=32, lora_alpha=64, target_modules=LORA_TARGETS),
    )
    trainer.train(resume_from_checkpoint=arguments.resume)
    trainer.save_model()
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=data_name)
    print(f"Written to {config.output_dir}: LoRA and model card. Compare it with the base:")
    print(f"python examples/evaluate_compbench.py {config.output_dir}{' --tiny' if arguments.tiny else ''}")
    trainer.close()


if __name__ == "__main__":
    main()
