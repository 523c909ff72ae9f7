"""Train Kontext with a reward of your own.

    python examples/custom_reward.py --tiny          the embedded editor, a CPU, a minute or two
    python examples/custom_reward.py                 FLUX.1-Kontext-dev and CompBench from the Hub, one large GPU

A reward is any function of the candidates and of the data set's columns. It returns a number for each candidate, or
None where it has nothing to say. This one wants edits that are more colourful inside the mask. What it leaves out: a
judge of whether the instruction was followed; without one, colour is all that the editor learns.
"""

import argparse

import numpy as np
from peft import LoraConfig

from rcgrpo import RCGRPOConfig, RCGRPOTrainer, compbench_mini, load_edit_dataset


def colourful(images, masks, **columns):
    """Mean saturation inside the mask, in [0, 1]."""
    scores = []
    for image, mask in zip(images, masks, strict=True):
        saturation = np.asarray(image.convert("HSV"))[..., 1] / 255
        inside = np.asarray(mask) > 127
        scores.append(float(saturation[inside].mean()))
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="embedded editor and data")
    parser.add_argument("--output_dir", default="runs/colourful")
    parser.add_argument("--max_steps", type=int, default=5)
    arguments = parser.parse_args()
    common = dict(output_dir=arguments.output_dir, max_steps=arguments.max_steps, report_to="none")
    if arguments.tiny:
        from rcgrpo.tiny import CALL, WEIGHTS

        model, data, length = str(WEIGHTS), compbench_mini("train", 64), CALL["max_sequence_length"]
        config = RCGRPOConfig(**common, resolution=64, max_sequence_length=length, per_device_train_batch_size=2)
    else:
        model = "black-forest-labs/FLUX.1-Kontext-dev"
        data = load_edit_dataset("BohanJia/CompBench", split="train", held_out=0.1, on_missing="drop")
        config = RCGRPOConfig(
            **common,
            model_init_kwargs={"torch_dtype": {"default": "bfloat16", "vae": "float32"}},
            per_device_train_batch_size=1,
            gradient_accumulation_steps=8,
            rollout_batch_size=4,
            train_micro_batch_size=1,
        )

    trainer = RCGRPOTrainer(
        model=model,
        reward_funcs=[colourful, "background_keep"],
        args=config,
        train_dataset=data,
        peft_config=LoraConfig(
            r=16, lora_alpha=16, target_modules=["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]
        ),
    )
    trainer.train()
    trainer.save_model()
    print(f'pipe.load_lora_weights("{arguments.output_dir}") opens the result in a stock FluxKontextPipeline')


if __name__ == "__main__":
    main()
