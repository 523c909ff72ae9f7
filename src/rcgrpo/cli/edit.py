"""`rcgrpo edit`: one picture."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .opening import check_loras, open_pipeline, sampling_settings
from .parsing import GUIDANCE, STEPS, TINY, TRUE_CFG, UsageError, check_picture, parse, use_embedded_model


@dataclass
class EditArguments:
    """One edit, for `rcgrpo edit`."""

    image: str | None = field(default=None, metadata={"help": f"The picture to edit; {TINY} brings one along."})
    instruction: str | None = field(default=None, metadata={"help": "What to do, e.g. 'remove the apple'."})
    mask: str | None = field(
        default=None,
        metadata={
            "help": "Where: a picture of the same size, white = edit. It steers the noise; the background is drawn "
            "again too, not pasted back."
        },
    )
    lora: str | None = field(
        default=None, metadata={"help": "A LoRA: folder, file, Hub id, or kontext-tiny-long (embedded)."}
    )
    model: str = field(default=TINY, metadata={"help": f"{TINY} (embedded), or a Hub id or folder of an editor."})
    output: str = field(default="edited.png", metadata={"help": "Where to write the result."})
    num_generations: int = field(
        default=1, metadata={"help": "Candidates, side by side in the result.", "aliases": ["--num_candidates"]}
    )
    edit_strength: float = field(default=0.5, metadata={"help": "How much candidates differ inside the mask."})
    resolution: int | None = field(
        default=None,
        metadata={"help": f"Edit at resolution² pixels, at the picture's proportions; 1024, or 64 for {TINY}."},
    )
    own_size: bool = field(
        default=False,
        metadata={
            "help": "Edit at as many pixels as the picture has, and write exactly its size; not with --resolution."
        },
    )
    num_inference_steps: int | None = field(default=None, metadata={"help": STEPS})
    guidance_scale: float | None = field(default=None, metadata={"help": GUIDANCE})
    true_cfg_scale: float | None = field(default=None, metadata={"help": TRUE_CFG})
    seed: int = field(default=0, metadata={"help": "Seed of the noise."})


def run(arguments: Sequence[str]) -> None:
    """`rcgrpo edit`: one picture."""
    (args,) = parse((EditArguments,), arguments, None, "rcgrpo edit")
    example = args.model == TINY and (args.image, args.instruction, args.mask) == (None, None, None)
    if not example and args.image is None:
        raise UsageError("--image: got none, expected the picture to edit")
    if not example and not (args.instruction or "").strip():
        raise UsageError("--instruction: got nothing, expected what to do, such as 'remove the apple'")
    if args.own_size and args.resolution is not None:
        raise UsageError(f"--own_size: got true with --resolution {args.resolution}, expected one of them")
    check_picture("output", args.output)
    if example:
        from ..data import compbench_mini

        row = compbench_mini("test", 1)[0]
        args.instruction = row["instruction"]
        print(f"The embedded edit, source first: {args.instruction}\nYours: rcgrpo edit --image ... --instruction ...")
    if args.model == TINY:
        args.instruction = embedded_instruction(args.instruction, args.lora)
        use_embedded_model([] if args.lora is None else [args.lora])
    import torch
    from PIL import Image

    from ..editors.lora import load_lora
    from ..editors.sizes import own_resolution
    from ..evaluation.benchmark import Sampling
    from ..inputs.pictures import decode_picture, to_rgb
    from ..maths.regions import at_size
    from ..reporting.files import write_atomically

    source = to_rgb(row["input_image"] if example else decode_picture(Path(args.image), "--image"))
    given = row["mask"] if example else args.mask
    mask = None if given is None else read_mask(given, (source.height, source.width))
    loras = [] if args.lora is None else [args.lora]
    check_loras(args.model, loras)  # before a large model is loaded
    pipe = open_pipeline(args.model)
    for lora in loras:
        load_lora(pipe, lora, "lora", "--lora")
    if args.own_size:
        args.resolution = own_resolution(*source.size)
    sampling = Sampling(**sampling_settings(args))
    editor = sampling.editor(pipe)
    height, width = editor.size_for(source)
    images = pipe(
        image=editor.resized(source, height, width),
        prompt=args.instruction,
        mask_image=None if mask is None else at_size(mask, (height, width)),
        **({} if mask is None else {"edit_strength": args.edit_strength}),
        num_images_per_prompt=args.num_generations,
        generator=torch.Generator().manual_seed(args.seed),
        **editor.call_arguments(height, width),
    ).images
    if args.own_size:  # whole tokens may have cut it by a few pixels
        images = [image.resize(source.size, Image.Resampling.LANCZOS) for image in images]
    shown = [editor.resized(source, height, width), *images] if example else images
    strip = Image.new("RGB", (sum(image.width for image in shown), shown[0].height))
    for i, image in enumerate(shown):
        strip.paste(image, (i * image.width, 0))
    with write_atomically(Path(args.output)) as path:
        strip.save(path)
    print(f"Written: {args.output} ({len(images)} candidate{'s' if len(images) > 1 else ''})")


def embedded_instruction(instruction: str, lora: str | None) -> str:
    """An instruction as the embedded editor reads it; with a LoRA, which may have learnt others, any.

    Raises:
        UsageError: one that it does not know, with those that it does.
    """
    from ..data.wordings import known, plain, unknown

    text = plain(instruction)
    if not known(text):
        if lora is None:
            raise UsageError(f"--{unknown(text)}")
        print(f"Warning: without its LoRA the embedded editor does not know {text!r}", file=sys.stderr)
    return text


def read_mask(mask: Any, size: tuple[int, int]) -> Any:
    """The mask, fp32 `[height, width]`.

    Raises:
        ValueError: no picture, another (height, width) than the source's, nothing to edit, or what could be labels.
    """
    from ..inputs.masks import mask_to_tensor
    from ..maths.regions import check_mask

    read = mask_to_tensor(Path(mask) if isinstance(mask, str) else mask, "--mask")
    check_mask(read, size, "--mask")
    return read
