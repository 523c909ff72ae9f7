"""`rcgrpo edit`: one picture."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .opening import open_pipeline
from .parsing import TINY, UsageError, check_picture, parse, use_embedded_model


@dataclass
class EditArguments:
    """One edit, for `rcgrpo edit`."""

    image: str = field(metadata={"help": "The picture to edit."})
    instruction: str = field(metadata={"help": "What to do, e.g. 'remove the apple'."})
    mask: str | None = field(
        default=None,
        metadata={
            "help": "Where: a picture of the same size, white = edit. It steers the noise; the background is drawn "
            "again too, not pasted back."
        },
    )
    lora: str | None = field(default=None, metadata={"help": "A LoRA: folder, file or Hub id."})
    model: str = field(default=TINY, metadata={"help": f"{TINY} (embedded), or a Hub id or folder of a Kontext model."})
    output: str = field(default="edited.png", metadata={"help": "Where to write the result."})
    num_generations: int = field(
        default=1, metadata={"help": "Candidates, side by side in the result.", "aliases": ["--num_candidates"]}
    )
    edit_strength: float = field(default=0.5, metadata={"help": "How much candidates differ inside the mask."})
    resolution: int | None = field(default=None, metadata={"help": "Side of the result; the model's own by default."})
    num_inference_steps: int | None = field(default=None, metadata={"help": "ODE steps; 8 for the tiny model."})
    guidance_scale: float = field(default=3.5, metadata={"help": "Distilled guidance."})
    seed: int = field(default=0, metadata={"help": "Seed of the noise."})


def run(arguments: Sequence[str]) -> None:
    """`rcgrpo edit`: one picture."""
    (args,) = parse((EditArguments,), arguments, None, "rcgrpo edit")
    if not args.instruction.strip():
        raise UsageError("--instruction: got nothing, expected what to do, such as 'remove the apple'")
    check_picture("output", args.output)
    if args.model == TINY:
        use_embedded_model([] if args.lora is None else [args.lora])
    import torch
    from diffusers import FluxKontextPipeline
    from PIL import Image

    from ..data.edits import decode_picture
    from ..pipeline import RegionDecoupledFluxKontextPipeline
    from ..report import write_atomically
    from ..tiny import CALL

    source = decode_picture(Path(args.image), "--image").convert("RGB")
    mask = None if args.mask is None else read_mask(Path(args.mask), source.size)
    if args.lora is not None:  # before a large model is loaded
        try:
            FluxKontextPipeline.lora_state_dict(args.lora)
        except Exception as error:  # the Hub's client alone has a dozen kinds
            raise UsageError(
                f"--lora: got {args.lora!r}, expected a folder or file that is there, or a Hub id, with a LoRA that "
                f"diffusers can read ({type(error).__name__}: {error})"
            ) from error
    tiny = args.model == TINY
    pipe = open_pipeline(RegionDecoupledFluxKontextPipeline, args.model)
    if args.lora is not None:
        load_lora(pipe, args.lora, args.model)
    call: dict[str, Any] = dict(CALL) if tiny else {}
    if tiny:
        args.instruction = args.instruction.lower().strip(" .!")  # its vocabulary is the data set's
        source = source.resize((CALL["width"], CALL["height"]), Image.Resampling.LANCZOS)
        mask = None if mask is None else mask.resize(source.size, Image.Resampling.NEAREST)
    if args.resolution is not None:
        side = args.resolution
        call |= {"height": side, "width": side, "max_area": side * side}
    if args.num_inference_steps is not None:
        call["num_inference_steps"] = args.num_inference_steps
    images = pipe(
        image=source,
        prompt=args.instruction,
        mask_image=mask,
        **({} if mask is None else {"edit_strength": args.edit_strength}),
        num_images_per_prompt=args.num_generations,
        guidance_scale=args.guidance_scale,
        generator=torch.Generator().manual_seed(args.seed),
        **call,
    ).images
    strip = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    for i, image in enumerate(images):
        strip.paste(image, (i * image.width, 0))
    with write_atomically(Path(args.output)) as path:
        strip.save(path)
    print(f"Written: {args.output} ({len(images)} candidate{'s' if len(images) > 1 else ''})")


def read_mask(path: Path, size: tuple[int, int]) -> Any:
    """The mask, "L" with 255 = edit.

    Raises:
        UsageError, ValueError: no picture, another size than the source's, nothing or too little of white.
    """
    from ..data.masks import decode_mask, refuse_dim

    mask = decode_mask(path, "luma", None, "--mask")
    if mask.size != size:
        raise UsageError(f"--mask: got {mask.width}×{mask.height}, expected the source's size {size[0]}×{size[1]}")
    if mask.getbbox() is None:
        raise UsageError(f"--mask: got {str(path)!r}, which is black, expected white where to edit")
    refuse_dim(mask, "--mask", "multiply a mask of 0 and 1 by 255")
    return mask


def load_lora(pipe: Any, lora: str, model: str) -> None:
    """Load a LoRA, and refuse one that is for another model.

    Raises:
        UsageError: its shapes do not fit, or nothing in it is for the model's transformer.
    """
    try:
        pipe.load_lora_weights(lora)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"--lora: got {lora!r}, expected one for {model} ({reason})") from error
    if not pipe.get_list_adapters():
        raise UsageError(f"--lora: got {lora!r}, expected one for {model}; it holds nothing for its transformer")
