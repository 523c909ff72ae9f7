"""Two hundred command lines that cannot work, and what is wrong with how each is answered.

Right is: an exit code other than 0 and one line that names the field or the value, without a trace. The bad part of a
command line stands last, so that `check` knows what the answer must name; a file is named after its fault.

    python benchmarks/bad_inputs.py            # all of them, in this process: some minutes on a CPU
    python benchmarks/bad_inputs.py edit mask  # those whose names hold one of these words

`prepare` makes the broken files; `{tmp}` in a command line is their folder. Nothing here reaches the network.
"""
# ruff: noqa: SIM905 - words in a text are read more easily than quoted ones

import contextlib
import io
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported
os.environ.setdefault("TQDM_DISABLE", "1")

PATIENCE_S = 180
"""What is accepted may run, or serve, for ever."""

RESULTS = ("out", "evaluation", "diagnosis", "masks", "tux")
TRAIN = (
    "train --use_cpu true --max_steps 1 --num_train_samples 2 --num_eval_samples 2 --per_device_train_batch_size 2 "
    "--num_generations 4 --num_anchors 1 --num_inference_steps_eval 1 --output_dir {tmp}/out"
).split()
TRAIN_FILE = [*TRAIN, "--eval_split", ""]
TRAIN_ALONE = [*TRAIN_FILE, *"--model kontext-tiny --num_inference_steps 2 --num_policy_steps 1".split()]
"""Without the embedded recipe, whose rewards have regions."""
EDIT = ["edit", "--instruction", "remove the apple", "--num_inference_steps", "1", "--image", "{tmp}/source.png"]
EVALUATE = "evaluate --num_samples 2 --num_inference_steps 1 --metrics psnr --output_dir {tmp}/evaluation".split()
DIAGNOSE = "diagnose --num_samples 2 --num_generations 2 --num_inference_steps 2 --output_dir {tmp}/diagnosis".split()
APP = ["app", "--port", "0"]
INSPECT = ["data", "inspect", "--num_samples", "2", "--output", "{tmp}/sheet.png"]
MASKS = ["data", "masks", "--num_samples", "2", "--output_dir", "{tmp}/masks"]
TUX = ["data", "build-tux", "--num_train", "2", "--num_test", "1", "--output_dir", "{tmp}/tux"]
SERVE = ["rewards", "serve", "--port", "0"]

# Each `flag=value`, after a command that is fine without it ----------------------------------------------------------

FLAGS: list[tuple[list[str], str]] = [
    (
        TRAIN,
        "learning_rate=nan learning_rate=inf learning_rate=-1e-4 learning_rate=fast weight_decay=nan weight_decay=-0.1 "
        "adam_beta1=1 adam_beta2=nan adam_epsilon=0 max_grad_norm=-1 warmup_steps=-3 lr_scheduler_type=zigzag "
        "optim=sgdd gradient_accumulation_steps=0 per_device_train_batch_size=-2 num_train_epochs=nan max_steps=0 "
        "lora_r=0 lora_r=-4 lora_alpha=0 lora_alpha=-8 lora_target_modules=nothing num_train_samples=0 "
        "num_train_samples=-1 num_eval_samples=0 save_steps=0 save_steps=-1 save_steps=2.5 save_steps=nan "
        "logging_steps=-1 eval_steps=nan save_total_limit=-1 save_strategy=sometimes seed=-1 seed=99999999999 "
        "data_seed=-1 dataloader_num_workers=-1 guidance_scale=nan guidance_scale=inf true_cfg_scale=0.5 "
        "edit_strength=nan edit_strength=-0.1 keep_strength=2 mask_growth=nan independent_share=1.5 num_generations=1 "
        "num_generations=4.5 num_anchors=0 num_anchors=99 num_inference_steps=0 num_inference_steps=100000 "
        "num_policy_steps=99 num_iterations=0 temperature=0 epsilon=nan epsilon=inf epsilon_high=0 beta=-1 "
        "resolution=0 resolution=3 resolution=1000000 max_sequence_length=0 rollout_batch_size=0 check_rows=-1 "
        "policy=ppo solver=rk4 exploration=local report_to=wandb report_to=paper log_level=loud "
        "model_init_kwargs={bad model_init_kwargs=[1] lr_scheduler_kwargs={'a':1} accelerator_config=gone.json "
        "preset=unheard held_out=0.5 train_split=dev eval_split=train "
        "resume_from_checkpoint={tmp}/gone output_dir={tmp}/source.png output_dir=/proc/none",
    ),
    (
        EDIT,
        "resolution=3 resolution=0 resolution=-64 resolution=99999999 guidance_scale=nan guidance_scale=-1 "
        "edit_strength=1.5 edit_strength=nan num_inference_steps=0 num_inference_steps=2.5 num_generations=0 seed=-1 "
        "seed=1.5 output={tmp}/edited.txt output={tmp}/source.png/x.png image={tmp}/gone.png image={tmp}/text.png "
        "image={tmp}/truncated.png image={tmp}/empty.png image={tmp} mask={tmp}/gone.png mask={tmp}/text.png "
        "mask={tmp}/black.png mask={tmp}/dim.png mask={tmp}/small.png instruction= lora={tmp}/gone "
        "lora={tmp}/empty lora={tmp}/truncated.safetensors lora={tmp}/text.safetensors lora={tmp}/foreign.safetensors "
        "lora={tmp}/nothing.safetensors lora=nobody/nothing model={tmp}/gone model={tmp}/empty model=nobody/nothing "
        "model={tmp}/model-other model={tmp}/model-json model={tmp}/model-cut model={tmp}/model-parts",
    ),
    (
        EVALUATE,
        "num_samples=0 num_samples=-3 metric_size=0 batch_size=0 num_pictures=-1 guidance_scale=inf seed=-1 "
        "metrics=mse metrics= splits=validation held_out=nan intervals_by=frame dataset={tmp}/gone.jsonl "
        "dataset=nobody/nothing model={tmp}/model-cut lora={tmp}/gone lora={tmp}/truncated.safetensors "
        "lora={tmp}/foreign.safetensors lora={tmp}/not-a-number.safetensors resume=true output_dir={tmp}/source.png",
    ),
    (
        DIAGNOSE,
        "num_generations=1 num_samples=1 num_samples=-1 match_tolerance=nan mask_growth=-1 keep_strength=nan "
        "solver=magic num_maps=-1 rollout_batch_size=0 reward=unheard reward=gone_module.reward "
        "edit_reward=syntax_error.reward dataset={tmp}/gone.jsonl split=validation model={tmp}/empty "
        "lora={tmp}/foreign.safetensors",
    ),
    (
        APP,
        "port=99999 port=-1 host=0.0.0.0 guidance_scale=nan resolution=7 num_inference_steps=0 model={tmp}/gone "
        "lora={tmp}/gone",
    ),
    (
        INSPECT,
        "dataset={tmp}/gone.jsonl dataset={tmp}/broken.jsonl dataset={tmp}/empty.jsonl dataset={tmp}/empty "
        "dataset={tmp}/table.xyz dataset={tmp}/mapping dataset=nobody/nothing",
    ),
    (
        [*INSPECT[:2], "compbench-mini", *INSPECT[2:]],
        "num_samples=0 cell=0 split=dev held_out=1 held_out=-0.5 columns=input_image preset=unheard "
        "mask_encoding=guess on_missing=magic output={tmp}/sheet.doc",
    ),
    (
        [*MASKS[:2], "compbench-mini", *MASKS[2:]],
        "method=magic num_draws=0 num_samples=-1 sigma=nan threshold=2 seed=-1 output_dir={tmp}/source.png",
    ),
    (TUX, "size=100 num_train=0 num_test=-1 stamps_folder={tmp}/gone seed=-1"),
    (
        SERVE,
        "port=70000 concurrency=0 max_waiting=-1 max_request_mb=0 host=0.0.0.0 reward_funcs=unheard "
        "reward_funcs=syntax_error.reward",
    ),
]

# Rewards, data sets and models of a training --------------------------------------------------------------------------

REWARDS = (
    "unheard gone_module.reward syntax_error.reward import_error.reward raises.reward empty_module.reward "
    "not_callable.reward no_columns.reward needs_arguments.Reward too_few.reward always_fails.reward"
).split()
TABLES = (
    "gone.jsonl broken.jsonl empty.jsonl table.xyz instruction-empty.jsonl instruction-number.jsonl "
    "input_image-gone.jsonl input_image-truncated.jsonl mask-black.jsonl mask-small.jsonl mask-missing.jsonl "
    "mask-text.jsonl input_image-column.jsonl mapping"
).split()
MODELS = "gone empty model-other model-json model-cut model-parts".split()

NAMES = (
    "lora_rank use_peft batch_size model_name_or_path lr load_in_4bit dataset_test_split dataset_name "
    "steps_per_generation loss_type processing_class quantization_config strength padding_mask_crop true_cfg generator "
    "use_vllm learning_rat zzz"
).split()
"""Flags of other tools, for `train`; each is answered with a word on it."""

CONFIGS = {
    "gone": None,
    "syntax": "a: [",
    "list": "- 1\n- 2\n",
    "bytes": b"\xff\xfe\x00a",
    "num_generations-text": "num_generations: many\n",
    "num_generations-list": "num_generations: [4, 5]\n",
    "num_generatoins": "num_generatoins: 4\n",
    "learning_rate-nan": "learning_rate: .nan\n",
    "weight_decay-nan": "weight_decay: .nan\n",
    "lora_rank": "lora_rank: 8\n",
    "policy_steps_range": "policy_steps_range: 0.5\n",
    "reward_weights": "reward_weights: [1, heavy]\n",
    "antithetic": "antithetic: 3\n",
    "env": "env: 3\n",
    "env-name": "env: {'A=B': 1}\n",
}
"""Names and contents of configuration files."""


def _bad_inputs() -> Iterator[tuple[str, list[str]]]:
    for command, pairs in FLAGS:
        for pair in pairs.split():
            flag, _, value = pair.partition("=")
            yield (
                f"{' '.join(command[:2] if command[0] in ('data', 'rewards') else command[:1])}: {pair}",
                [
                    *command,
                    f"--{flag}",
                    value,
                ],
            )
    yield from ((f"train: reward {name}", [*TRAIN_ALONE, "--reward_funcs", name]) for name in REWARDS)
    for table in TABLES:
        yield f"train: data set {table}", [*TRAIN_FILE, "--dataset", f"{{tmp}}/{table}"]
    for model in MODELS:
        yield f"train: model {model}", [*TRAIN, "--model", f"{{tmp}}/{model}"]
    yield from ((f"train: name {name}", [*TRAIN, f"--{name}", "1"]) for name in NAMES)
    yield from ((f"train: config {name}", [*TRAIN, "--config", f"{{tmp}}/{name}.yaml"]) for name in CONFIGS)
    yield "train: region_strengths", [*TRAIN, "--regions_column", "labels", "--region_strengths", "0.5", "nan"]
    yield "train: reward_weights", [*TRAIN, "--reward_weights", "1", "nan"]
    yield "train: policy_steps_range", [*TRAIN, "--policy_steps_range", "0.9", "0.1"]
    yield "train: attention_blocks", [*TRAIN, "--attention_reward_weight", "1", "--attention_blocks", "999"]
    yield "train: stray", [*TRAIN, "stray"]
    yield "train: no value", [*TRAIN, "--learning_rate"]
    yield "edit: --strength", [*EDIT, "--strength", "0.5"]
    yield "edit: --output_dir", [*EDIT, "--output_dir", "x"]
    yield "edit: no value", [*EDIT[:-1]]
    yield "evaluate: --num_edits", [*EVALUATE, "--num_edits", "3"]
    yield "rewards: now", ["rewards", "now"]
    yield "data inspect: rle-huge", [*INSPECT, "--mask_encoding", "rle", "--dataset", "{tmp}/rle-huge.jsonl"]
    yield "data: nothing", ["data"]
    yield "data: look", ["data", "look"]
    yield "command: trian", ["trian"]
    yield "command: none", []


BAD_INPUTS: list[tuple[str, list[str]]] = list(_bad_inputs())


# Broken files ---------------------------------------------------------------------------------------------------------

MODULES = {
    "syntax_error": "def reward(images, **columns:\n",
    "import_error": "import a_package_that_is_missing\n",
    "raises": "raise RuntimeError('no licence')\n",
    "empty_module": "",
    "not_callable": "reward = 3\n",
    "no_columns": "def reward(images):\n    return [0.0] * len(images)\n",
    "needs_arguments": "class Reward:\n    def __init__(self, path):\n        self.path = path\n",
    "too_few": "def reward(images, **columns):\n    return [0.0]\n",
    "always_fails": "def reward(images, never_there, **columns):\n    return [0.0] * len(images)\n",
}


def prepare(folder: Path) -> None:
    """Fill a folder with the files that `BAD_INPUTS` name. What is called `gone` is not there."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "source.png")
    for name, value, size in (("mask", 255, 64), ("black", 0, 64), ("dim", 90, 64), ("small", 255, 10)):
        mask = Image.new("L", (size, 64))
        mask.paste(value, (0, 0, size // 2, 32))
        if name == "dim":  # two shades, neither of which is white
            mask.paste(60, (0, 0, 16, 32))
        mask.save(folder / f"{name}.png")
    (folder / "truncated.png").write_bytes((folder / "source.png").read_bytes()[:200])
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("no picture\n")
    (folder / "empty").mkdir()
    for name, code in MODULES.items():
        (folder / f"{name}.py").write_text(code)
    for name, text in CONFIGS.items():
        if text is not None:
            (folder / f"{name}.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    _prepare_tables(folder)
    _prepare_loras(folder)
    _prepare_models(folder)


def _prepare_tables(folder: Path) -> None:
    good = {"input_image": "source.png", "instruction": "remove the apple", "mask": "mask.png"}
    huge = {"size": [400_000, 200_000], "counts": [0, 80_000_000_000]}
    tables = {
        "instruction-empty": {"instruction": "  "},
        "instruction-number": {"instruction": 3},
        "input_image-gone": {"input_image": "gone.png"},
        "input_image-truncated": {"input_image": "truncated.png"},
        "mask-black": {"mask": "black.png"},
        "mask-small": {"mask": "small.png"},
        "mask-missing": {"mask": None},
        "mask-text": {"mask": "text.png"},
        "rle-huge": {"mask": huge},
    }
    for name, change in tables.items():
        rows = [good | change, good | change]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "input_image-column.jsonl").write_text('{"picture": "source.png", "instruction": "go", "mask": "m"}\n')
    (folder / "broken.jsonl").write_text('{"input_image": "source.png", \n{"instruction"\n')
    (folder / "empty.jsonl").touch()
    (folder / "table.xyz").write_text("a,b\n1,2\n")
    (folder / "mapping").mkdir()
    (folder / "mapping" / "mapping_file.json").write_text('{"000": {"image_path": ')


def _prepare_loras(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    layer = "transformer.transformer_blocks.0.attn.to_q"
    for name, width, value in (("foreign", 3072, 0.01), ("not-a-number", 128, float("nan"))):
        tensors = {f"{layer}.lora_A.weight": torch.full((4, width), value)}
        save_file(tensors | {f"{layer}.lora_B.weight": torch.full((width, 4), value)}, folder / f"{name}.safetensors")
    save_file({"nothing.weight": torch.zeros(2)}, folder / "nothing.safetensors")
    whole = (folder / "foreign.safetensors").read_bytes()
    (folder / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "text.safetensors").write_text("no tensors\n")


def _prepare_models(folder: Path) -> None:
    from rcgrpo.tiny import WEIGHTS

    for name in ("model-other", "model-json", "model-cut", "model-parts"):
        shutil.copytree(WEIGHTS, folder / name)
    index = folder / "model-other" / "model_index.json"
    index.write_text(index.read_text().replace("FluxKontextPipeline", "StableDiffusionPipeline"))
    (folder / "model-json" / "model_index.json").write_text('{"_class_name": ')
    weights = next((folder / "model-cut" / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    shutil.rmtree(folder / "model-parts" / "vae")


# The check ------------------------------------------------------------------------------------------------------------


def check(argv: list[str], folder: Path) -> str | None:
    """Run a bad command line in this process.

    Args:
        argv: as in `BAD_INPUTS`.
        folder: that `prepare` filled; the command runs in it.

    Returns:
        None if it is answered as it should be, else what is wrong.
    """
    arguments = [part.replace("{tmp}", str(folder)) for part in argv]
    for name in RESULTS:  # of an input that was accepted
        shutil.rmtree(folder / name, ignore_errors=True)
    code, said = _run(arguments, folder)
    if not code:
        return f"exit code {code}, expected another one than 0"
    message = code if isinstance(code, str) else said.strip()
    if "Traceback" in said or "Traceback" in message:
        return f"a trace: {message[-300:]}"
    if len(message.strip().splitlines()) != 1:
        return f"{len(message.splitlines())} lines, expected one: {message[:300]!r}"
    if not message.startswith("rcgrpo"):
        return f"not told as the command's: {message}"
    if "report it with its trace" in message:
        return f"not foreseen: {message}"
    if not any(word.lower() in message.lower() for word in _bad_part(argv)):
        return f"names none of {', '.join(_bad_part(argv))}: {message}"
    return None


def _bad_part(argv: list[str]) -> list[str]:
    """Words one of which an answer must hold: of the last flag, its value, or what stands last."""
    flags = [place for place, part in enumerate(argv) if part.startswith("--")]
    part = argv[flags[-1] :] if flags else argv[-1:] or ["command"]
    words = [word for text in part for word in re.split(r"[/.={}]|-(?=[a-z])", text.replace("{tmp}", ""))]
    return [word.strip("-") for word in words if len(word) > 2] or part


def _run(arguments: list[str], folder: Path) -> tuple[int | str | None, str]:
    """The exit code as `sys.exit` got it, and what was printed; what a process would keep to itself is put back."""
    from rcgrpo.cli import main

    def stop(*_: object) -> None:
        raise TimeoutError(f"still going after {PATIENCE_S} s")

    environment, path, where, printed = dict(os.environ), list(sys.path), Path.cwd(), io.StringIO()
    os.environ.pop("RCGRPO_TRACEBACK", None)
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(PATIENCE_S)
    code: int | str | None = 0
    try:
        os.chdir(folder)
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            main(arguments)
    except SystemExit as end:
        code = end.code
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        os.chdir(where)
        sys.path[:] = path
        os.environ.clear()
        os.environ.update(environment)
        for name in MODULES:
            sys.modules.pop(name, None)
    return code, printed.getvalue()


def main(words: list[str]) -> None:
    chosen = [(name, argv) for name, argv in BAD_INPUTS if not words or any(word in name for word in words)]
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "files"
        prepare(folder)
        for name, argv in chosen:
            if (found := check(argv, folder)) is not None:
                wrong += 1
                print(f"{name}\n    {found}", flush=True)
    print(f"bad inputs: {len(chosen) - wrong} of {len(chosen)} answered in one line that names what is wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main(sys.argv[1:])
