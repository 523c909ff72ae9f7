"""Edit a picture with a trained LoRA, in stock diffusers: nothing of rcgrpo is needed to use what it trained.

    python examples/use_lora_from_hub.py user/kontext-compbench --image in.png --instruction "remove the apple"
    python examples/use_lora_from_hub.py runs/compbench --tiny     the embedded editor and a held-out picture, a CPU

The LoRA is a Hub id or a folder. The picture is written beside the base's from the same noise. What it leaves out: a
mask; `RegionDecoupledFluxKontextPipeline` takes one and is a drop-in for the pipeline below.
"""

import argparse

import torch
from diffusers import FluxKontextPipeline
from PIL import Image

LORA_FILE = "pytorch_lora_weights.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lora", help="Hub id or folder")
    parser.add_argument("--tiny", action="store_true", help="embedded editor and picture")
    parser.add_argument("--image", help="the picture to edit")
    parser.add_argument("--instruction", help="what to do")
    parser.add_argument("--output", default="base_and_lora.png")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    if arguments.tiny:
        from rcgrpo import compbench_mini
        from rcgrpo.tiny import CALL, WEIGHTS

        row = compbench_mini("test", 1)[0]
        model, dtype, call = str(WEIGHTS), torch.float32, dict(CALL)
        source, instruction = row["input_image"], arguments.instruction or row["instruction"]
    else:
        if arguments.image is None or arguments.instruction is None:
            parser.error("--image and --instruction: got nothing, expected both, or --tiny")
        model, dtype, call = "black-forest-labs/FLUX.1-Kontext-dev", torch.bfloat16, {}
        source, instruction = Image.open(arguments.image).convert("RGB"), arguments.instruction

    pipe = FluxKontextPipeline.from_pretrained(model, dtype=dtype)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.load_lora_weights(arguments.lora, weight_name=LORA_FILE)

    def edit() -> Image.Image:
        noise = torch.Generator().manual_seed(arguments.seed)
        return pipe(image=source, prompt=instruction, generator=noise, **call).images[0]

    after = edit()
    pipe.disable_lora()
    before = edit()
    strip = Image.new("RGB", (before.width + after.width, after.height))
    strip.paste(before, (0, 0))
    strip.paste(after, (before.width, 0))
    strip.save(arguments.output)
    print(f"{instruction}: {arguments.output}, the base on the left, with {arguments.lora} on the right")


if __name__ == "__main__":
    main()
