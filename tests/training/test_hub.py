"""`hub.py`: what a stock pipeline makes of our file, and what the Hub makes of our folder."""

from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import FluxKontextPipeline
from huggingface_hub import ModelCard
from peft import AdaLoraConfig, LoHaConfig, LoraConfig, get_peft_model
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import SchedulerType

from hub_server import HubServer, run_with_hub
from rcgrpo.editors import FluxKontextEditor
from rcgrpo.tiny import WEIGHTS
from rcgrpo.training.hub import LORA_FILE, check_lora_config, model_card, save_lora
from tiny_kontext import TINY_CALL, build_tiny_kontext
from tiny_loras import TARGETS, draw, trained

LAST = {"target_modules": ["proj_out"], "alpha_pattern": {"^proj_out": 3}, "rank_pattern": {"^proj_out": 1}}
"""FLUX's last layer has another scale than the layers in the blocks that end in its name."""


def test_tiny_kontext_listens_to_image_prompt_and_noise():
    pipeline = build_tiny_kontext()
    pipeline.set_progress_bar_config(disable=True)

    def latents(colour="red", prompt="make it red", seed=0):
        return pipeline(
            image=Image.new("RGB", (32, 32), colour),
            prompt=prompt,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            **TINY_CALL,
        ).images

    base = latents()
    assert torch.equal(base, latents())
    for other in (latents(colour="blue"), latents(prompt="make it blue"), latents(seed=1)):
        assert (other - base).abs().mean() > 0.02
    weights = sum(p.numel() * 4 for part in (pipeline.transformer, pipeline.vae) for p in part.parameters())
    assert weights < 1e6


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"proj_mlp": 3}, "alpha_pattern": {"attn.to_q": 1}},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.5},
        {"target_modules": r".*attn\.to_[qv]"},
        LAST,
    ],
    ids=["alpha", "rslora", "dora", "patterns", "dropout", "regex", "last layer"],
)
def test_a_stock_pipeline_reproduces_the_trained_one(tmp_path, options):
    pipeline, model = trained(**options)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"PEFT's own file lies beside ours")
    assert save_lora(pipeline, model, tmp_path) == tmp_path / LORA_FILE
    fresh = build_tiny_kontext()
    without = draw(fresh)
    fresh.load_lora_weights(tmp_path)
    expected = draw(pipeline)
    assert torch.equal(draw(fresh), expected)
    assert not torch.equal(without, expected)


def test_the_file_holds_only_what_any_peft_understands_and_no_path(tmp_path):
    pipeline, model = trained(lora_dropout=0.5)
    model.peft_config["default"].base_model_name_or_path = "/home/someone/kontext"
    with safe_open(save_lora(pipeline, model, tmp_path / "new" / "folder"), "pt") as file:
        found = set(file.keys())
        assert file.metadata() == {"format": "pt"}
        assert {float(file.get_tensor(key)) for key in found if key.endswith(".alpha")} == {6.0}
    layers = {key.removesuffix(".alpha") for key in found if key.endswith(".alpha")}
    assert len(layers) == 10 and found == {
        f"{layer}.{part}" for layer in layers for part in ("alpha", "lora_A.weight", "lora_B.weight")
    }


def read_by_alpha(file):
    """A pipeline with a LoRA as ComfyUI reads it: the weights' difference is alpha / rank times up times down."""
    pipeline, weights = build_tiny_kontext(), load_file(file)
    doubles, singles = len(pipeline.transformer.transformer_blocks), len(pipeline.transformer.single_transformer_blocks)
    with torch.no_grad():
        for key in [key for key in weights if key.endswith(".lora_A.weight")]:
            layer = key.removesuffix(".lora_A.weight")
            assert layer in {f"transformer.{name}" for name in comfy_layers(doubles, singles)}
            down, up = weights.pop(key), weights.pop(f"{layer}.lora_B.weight")
            alpha = weights.pop(f"{layer}.alpha", None)
            scale = 1.0 if alpha is None else alpha.item() / len(down)
            pipeline.transformer.get_submodule(layer.removeprefix("transformer.")).weight += scale * up @ down
    assert not weights, "keys that it does not load"
    return pipeline


def comfy_layers(doubles, singles):
    """The layers for which ComfyUI takes `transformer.LAYER` of a FLUX LoRA (`model_lora_keys_unet` in comfy/lora.py).

    They are the keys of `flux_to_diffusers` in comfy/utils.py, as of 2025, for the layers that a LoRA can be on.
    """
    attention, feed = ("to_q", "to_k", "to_v"), ("net.0.proj", "net.2")
    double = [f"attn.{name}" for name in (*attention, "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")]
    double += ["attn.to_add_out", "norm1.linear", "norm1_context.linear"]
    double += [f"{part}.{name}" for part in ("ff", "ff_context") for name in feed]
    single = [*(f"attn.{name}" for name in attention), "proj_mlp", "proj_out", "norm.linear"]
    embedders = ("timestep_embedder", "text_embedder", "guidance_embedder")
    return (
        {f"transformer_blocks.{i}.{name}" for i in range(doubles) for name in double}
        | {f"single_transformer_blocks.{i}.{name}" for i in range(singles) for name in single}
        | {f"time_text_embed.{name}.linear_{i}" for name in embedders for i in (1, 2)}
        | {"proj_out", "x_embedder", "context_embedder", "norm_out.linear"}
    )


@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": 4},
        {"lora_alpha": 1, "r": 3},
        {"use_rslora": True, "r": 3},
        {"rank_pattern": {"proj_mlp": 3}, "alpha_pattern": {"attn.to_q": 1}},
        {"target_modules": "all-linear"},
        LAST,
    ],
    ids=["default", "odd", "rslora", "patterns", "all layers", "last layer"],
)
def test_a_reader_that_knows_alpha_alone_draws_the_same(tmp_path, options):
    pipeline, model = trained(**options)
    expected = draw(pipeline)
    found = draw(read_by_alpha(save_lora(pipeline, model, tmp_path)))
    assert (found - expected).abs().max() < 1e-4 < (draw(build_tiny_kontext()) - expected).abs().max()


def test_comfyui_knows_every_layer_that_is_trained_by_default():
    layers = comfy_layers(2, 2)
    named = dict(build_tiny_kontext(guidance_embeds=True).transformer.named_modules())
    assert layers == {name for name, module in named.items() if isinstance(module, torch.nn.Linear)}
    assert all(any(layer.endswith(target) for layer in layers) for target in FluxKontextEditor.lora_targets)


def test_loading_our_file_says_nothing_that_another_would_not(tmp_path, caplog):
    build_tiny_kontext().load_lora_weights(save_lora(*trained(), tmp_path))
    said = [record.message for record in caplog.records if "associated to CLIPTextModel" not in record.message]
    assert said == []


def test_the_same_weights_are_the_same_bytes(tmp_path):
    pipeline, model = trained()  # the order of a Rust hash map, of metadata for one, is another in each file
    assert len({save_lora(pipeline, model, tmp_path / str(i)).read_bytes() for i in range(8)}) == 1


def test_the_named_adapter_is_the_one_saved(tmp_path):
    pipeline, model = trained()
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=5, target_modules=["attn.to_v"]))
    with safe_open(save_lora(pipeline, model, tmp_path, adapter_name="other"), "pt") as file:
        assert all(".to_v." in key for key in file.keys())  # noqa: SIM118
    with pytest.raises(ValueError, match=r"'best'.*\['default', 'other'\]"):
        save_lora(pipeline, model, tmp_path, adapter_name="best")


def test_a_crash_while_writing_leaves_the_previous_file(tmp_path, monkeypatch):
    pipeline, model = trained()
    before = save_lora(pipeline, model, tmp_path).read_bytes()

    def crash(weights, filename, metadata=None):
        Path(filename).write_bytes(before[:100])
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", crash)
    with pytest.raises(OSError, match="No space left"):
        save_lora(pipeline, model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {LORA_FILE: before}


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"modules_to_save": ["proj_out"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"lora_alpha": 0}, "lora_alpha=0, with which a LoRA does nothing"),
        ({"alpha_pattern": {"to_q": float("nan")}}, "lora_alpha=nan"),
    ],
)
def test_adapters_that_diffusers_cannot_load_are_refused(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        check_lora_config(LoraConfig(target_modules=TARGETS, **options))


@pytest.mark.parametrize("kind", [LoHaConfig, AdaLoraConfig])
def test_other_kinds_of_adapter_are_refused(kind):
    with pytest.raises(ValueError, match=kind.__name__):
        check_lora_config(kind(target_modules=TARGETS, **({"total_step": 1} if kind is AdaLoraConfig else {})))


def parsed(card, tmp_path):
    card.save(tmp_path / "README.md")
    return ModelCard.load(tmp_path / "README.md")


def test_card_metadata_survives_the_file(tmp_path):
    card = parsed(
        model_card(
            model_name="kontext-rcgrpo",
            hub_model_id="user/kontext-rcgrpo",
            base_model="black-forest-labs/FLUX.1-Kontext-dev",
            license_name="flux-1-dev-non-commercial-license",
            datasets="BohanJia/CompBench",
            metrics={"ssim": 0.935, "psnr": float("nan"), "background PSNR (dB)": 31.5},
            metric_args={"ssim": {"before": 0.93, "n": 12}},
            tags=["compbench", "lora"],
        ),
        tmp_path,
    )
    data = card.data.to_dict()
    assert data["library_name"] == "diffusers"
    assert data["base_model"] == "black-forest-labs/FLUX.1-Kontext-dev"
    assert data["base_model_relation"] == "adapter"
    assert data["pipeline_tag"] == "image-to-image"
    assert (data["license"], data["license_name"]) == ("other", "flux-1-dev-non-commercial-license")
    assert data["datasets"] == ["BohanJia/CompBench"]
    assert {"rcgrpo", "trl", "lora", "image-editing", "reinforcement-learning", "compbench"} <= set(data["tags"])
    assert len(data["tags"]) == len(set(data["tags"]))
    assert card.data.model_name == "kontext-rcgrpo"
    result, other = card.data.eval_results
    assert (result.metric_args, other.metric_args) == ({"before": 0.93, "n": 12}, None)
    assert (other.metric_type, other.metric_name) == ("background_psnr_db", "background PSNR (dB)")
    assert (result.task_type, result.metric_type, result.metric_value) == ("image-to-image", "ssim", 0.935)
    assert (result.dataset_type, result.dataset_name) == ("BohanJia/CompBench", "CompBench")
    assert 'load_lora_weights("user/kontext-rcgrpo")' in card.text
    assert 'FluxKontextPipeline.from_pretrained("black-forest-labs/FLUX.1-Kontext-dev"' in card.text
    assert "2604.09386" in card.text and "{{TRL:" in card.text


def test_the_licence_is_the_bases_own_unless_another_is_named(tmp_path):
    flux = "black-forest-labs/FLUX.1-Kontext-dev"
    data = parsed(model_card(model_name="m", base_model=flux), tmp_path).data
    assert (data.license, data.license_name) == ("other", "flux-1-dev-non-commercial-license")
    assert data.license_link == f"https://huggingface.co/{flux}/blob/main/LICENSE.md"
    for given, base, expected in [("mit", flux, "mit"), (None, "someone/else", "other"), (None, None, "other")]:
        data = parsed(model_card(model_name="m", base_model=base, license=given), tmp_path).data
        assert data.license == expected and "license_name" not in data.to_dict()


def test_examples_become_the_pages_widget(tmp_path):
    (tmp_path / "samples").mkdir()
    for name in ("1_source.png", "1_edited.png", "2_source.png"):
        (tmp_path / "samples" / name).touch()
    examples = [
        {"source": f"samples/{i}_source.png", "edited": f"samples/{i}_edited.png", "prompt": "remove: the 'cup'"}
        for i in (1, 2)
    ]
    card = parsed(model_card(model_name="m", folder=tmp_path, examples=examples), tmp_path)
    assert card.data.widget == [  # of the second one a picture is missing
        {"src": "samples/1_source.png", "prompt": "remove: the 'cup'", "output": {"url": "samples/1_edited.png"}}
    ]
    assert "widget" not in model_card(model_name="m", folder=tmp_path).data.to_dict()
    with pytest.raises(ValueError, match=r"picture='\.\./edited\.png'"):
        model_card(model_name="m", folder=tmp_path, examples=[{**examples[0], "edited": "../edited.png"}])


def test_card_of_a_local_base_keeps_the_path_private(tmp_path):
    base = tmp_path / "secret" / "my-editor"
    card = parsed(
        model_card(
            model_name="m",
            base_model=str(base),
            datasets=[str(tmp_path / "secret" / "my-edits")],
            metrics={"reward": 1.0},
            settings={
                "output_dir": str(tmp_path / "secret" / "run"),
                "reward_funcs": "a|b\nc",
                "seed": None,
                "lr_scheduler_type": SchedulerType.COSINE,
                "lora_target_modules": ["to_k", "to_q"],
            },
        ),
        tmp_path,
    )
    assert "secret" not in card.content and str(tmp_path) not in card.content
    assert "`my-editor`" in card.text and "`my-edits`" in card.text
    assert "| `output_dir` | run |" in card.text and r"| `reward_funcs` | a\|b c |" in card.text
    assert "| `lr_scheduler_type` | cosine |" in card.text and "| `lora_target_modules` | to_k, to_q |" in card.text
    assert "seed" not in card.text
    assert not {"base_model", "base_model_relation", "datasets"} & card.data.to_dict().keys()


def test_a_relative_folder_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_card(model_name="m", base_model="models/editor").data.base_model == "models/editor"
    Path("models/editor").mkdir(parents=True)
    assert model_card(model_name="m", base_model="models/editor").data.base_model is None


def test_card_shows_only_what_there_is(tmp_path):
    bare = model_card(model_name="m", folder=tmp_path)
    assert "![" not in bare.text and "## Results" not in bare.text and "## Training settings" not in bare.text
    assert "model-index" not in bare.content and bare.data.license == "other"
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "contact_sheet.png").touch()
    (tmp_path / "reward_curves.png").touch()
    table = "| metric | base | LoRA |\n|---|---|---|\n| ssim | 0.90 | 0.93 |"
    full = model_card(model_name="m", folder=tmp_path, metric_table=table, settings={"num_generations": 12})
    assert "\n\n![Before and after](samples/contact_sheet.png)\n\n" in full.text
    assert f"\n\n{table}\n\n" in full.text and "\n\n![Reward curves](reward_curves.png)\n\n" in full.text
    assert "|---|---|\n| `num_generations` | 12 |\n\n" in full.text
    with pytest.raises(ValueError, match="relative"):
        model_card(model_name="m", folder=tmp_path, picture="/etc/passwd.png")


def snippet(card):
    return card.text.split("```python\n")[1].split("```")[0]


def test_the_embedded_editors_snippet_runs_as_it_stands(tmp_path, monkeypatch):
    pipeline = FluxKontextPipeline.from_pretrained(WEIGHTS)
    model = get_peft_model(pipeline.transformer, LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    save_lora(pipeline, model, tmp_path)
    source = Image.linear_gradient("L").convert("RGB")
    for name in ("source", "edited"):
        source.save(tmp_path / f"{name}.png")
    example = {"source": "source.png", "edited": "edited.png", "prompt": "add an apple on the left"}
    card = model_card(model_name="m", base_model="kontext-tiny", folder=tmp_path, examples=[example])
    assert card.data.license == "apache-2.0"
    monkeypatch.chdir(tmp_path)
    done = {}
    exec(snippet(card), done)
    assert done["edited"].size == (64, 64) and Image.open("edited.png").size == (64, 64)
    assert done["pipe"].get_active_adapters() == ["default_0"]
    assert not np.array_equal(done["edited"], source.resize((64, 64)))


def test_a_trained_transformers_card_opens_it(tmp_path, monkeypatch):
    pipeline = FluxKontextPipeline.from_pretrained(WEIGHTS)
    with torch.no_grad():
        pipeline.transformer.proj_out.bias += 1
    pipeline.transformer.save_pretrained(tmp_path / "transformer")
    Image.new("RGB", (64, 64)).save(tmp_path / "input.png")
    given = {"model_name": "m", "folder": tmp_path, "transformer": "FluxTransformer2DModel"}
    card = model_card(base_model="kontext-tiny", **given)
    assert "A fine-tune of `kontext-tiny`, trained by" in card.text and "lora" not in card.data.tags
    monkeypatch.chdir(tmp_path)
    done = {}
    exec(snippet(card), done)
    assert torch.equal(done["pipe"].transformer.proj_out.bias, pipeline.transformer.proj_out.bias)
    card = model_card(base_model="x/y", hub_model_id="me/m", **given)
    compile(snippet(card), "snippet", "exec")
    assert 'from_pretrained("me/m", subfolder="transformer"' in card.text and "load_lora_weights" not in card.text
    assert card.data.base_model_relation == "finetune"


def test_the_snippet_names_what_a_reader_of_the_hub_can_reach(tmp_path):
    (tmp_path / "a b.png").touch()
    example = {"source": "a b.png", "edited": "a b.png", "prompt": 'write "é"'}
    card = model_card(model_name="m", hub_model_id="user/m", base_model="x/y", folder=tmp_path, examples=[example])
    code = snippet(card)
    compile(code, "snippet", "exec")
    assert 'load_image("https://huggingface.co/user/m/resolve/main/a%20b.png")' in code
    assert r'prompt="write \"é\"")' in code and 'pipe.load_lora_weights("user/m")' in code
    assert 'load_image("input.png")' in snippet(model_card(model_name="m", hub_model_id="user/m", folder=tmp_path))


ROUND_TRIP = """
import tempfile
from hashlib import sha256
from pathlib import Path
import torch
from huggingface_hub import HfApi, ModelCard
from rcgrpo.training.hub import model_card, save_lora
from tiny_kontext import build_tiny_kontext
from tiny_loras import draw, trained

with tempfile.TemporaryDirectory() as folder:
    pipeline, model = trained()
    print(sha256(save_lora(pipeline, model, folder).read_bytes()).hexdigest())
    model_card(model_name="repo", hub_model_id="user/repo").save(Path(folder) / "README.md")
    api = HfApi()
    for _ in range(2):
        api.create_repo("user/repo", private=True, exist_ok=True)
    api.upload_folder(repo_id="user/repo", folder_path=folder, commit_message="first")
fresh = build_tiny_kontext()
fresh.load_lora_weights("user/repo")
assert torch.equal(draw(fresh), draw(pipeline))
assert ModelCard.load("user/repo").data.pipeline_tag == "image-to-image"
assert sorted(api.list_repo_files("user/repo")) == ["README.md", "pytorch_lora_weights.safetensors"]
"""


def test_push_and_pull_are_bit_identical():
    with HubServer(lfs=True) as server:
        result = run_with_hub(ROUND_TRIP, server)
    assert result.returncode == 0, result.stderr
    repo = server.repos["user/repo"]
    assert repo.private and repo.commits == ["first"] and repo.lfs == {LORA_FILE}
    assert sha256(server.files["user/repo"][LORA_FILE]).hexdigest() == result.stdout.strip()


PLAIN = """
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError
api = HfApi()
assert api.whoami()["name"] == "user"
name = api.create_repo("plain").repo_id
data, bad = bytes(range(256)) * 100, b"---\\na: [\\n---\\n"
for _ in range(2):  # the second upload finds nothing changed and makes no commit
    api.upload_file(repo_id=name, path_in_repo="a/x.safetensors", path_or_fileobj=data)
api.upload_file(repo_id=name, path_in_repo="b.txt", path_or_fileobj=b"text")
api.delete_file("b.txt", name)
assert open(hf_hub_download(name, "a/x.safetensors"), "rb").read() == data
assert [entry.path for entry in api.list_repo_tree(name)] == ["a"]
assert api.file_exists(name, "a/x.safetensors") and not api.file_exists(name, "b.txt")
for call, error in [
    (lambda: api.create_repo("plain"), HfHubHTTPError),
    (lambda: api.create_repo("else/where"), HfHubHTTPError),
    (lambda: api.model_info("user/none"), RepositoryNotFoundError),
    (lambda: hf_hub_download(name, "none"), EntryNotFoundError),
    (lambda: api.upload_file(repo_id=name, path_in_repo="README.md", path_or_fileobj=bad), ValueError),
]:
    try:
        call()
    except error:
        continue
    raise AssertionError(error)
"""


def test_the_server_speaks_the_clients_language():
    with HubServer(token="hf_other") as server:
        result = run_with_hub(PLAIN, server)
    assert result.returncode == 0, result.stderr
    assert server.files == {"user/plain": {"a/x.safetensors": bytes(range(256)) * 100}}
    assert len(server.repos["user/plain"].commits) == 3


def test_a_wrong_token_is_refused():
    script = """
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
calls = [
    lambda: HfApi().create_repo("user/repo", exist_ok=True),
    lambda: HfApi().upload_file(repo_id="user/repo", path_in_repo="a", path_or_fileobj=b"a"),
    lambda: HfApi().model_info("user/repo"),
]
for call in calls:
    try:
        call()
    except HfHubHTTPError as error:
        print(error.response.status_code, error)
"""
    with HubServer() as server:
        result = run_with_hub(script, server, HF_TOKEN="hf_wrong")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("401 ") >= 3 and "Invalid credentials in Authorization header" in result.stdout
    assert not server.repos and {status for _, _, status in server.requests} == {401}
