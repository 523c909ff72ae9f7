"""`push_to_hub=True` against a test Hub, in a process of its own, because the endpoint is read at import."""

from hashlib import sha256

import pytest
from huggingface_hub import ModelCard

from hub_server import HubServer, run_with_hub

SCRIPT = """
import numpy as np
from huggingface_hub.errors import HfHubHTTPError
from rcgrpo import compbench_mini
from tiny_training import brightness, draw, make
from tiny_kontext import build_tiny_kontext

data = compbench_mini("train", 8, 32)
options = dict(push_to_hub=True, hub_model_id="user/edits", hub_private_repo=True)
options |= dict(save_strategy="steps", save_steps=1, hub_strategy="every_save")
try:
    make({folder!r} + "/wrong", data, brightness, hub_token="hf_wrong", **options)
except HfHubHTTPError as error:
    print("refused:", str(error).replace(chr(10), " "))

trainer = make({folder!r} + "/right", data, brightness, **options)
trainer.train()
trainer.push_to_hub(dataset_name="user/compbench", tags="fluent")

stock = build_tiny_kontext()
base = draw(stock)
stock.load_lora_weights("user/edits")
assert np.array_equal(draw(stock), draw(trainer.pipeline)) and not np.array_equal(draw(stock), base)
print("the same pictures")
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """What the script printed, its folder, and the repository that it left on the server."""
    folder = tmp_path_factory.mktemp("push")
    with HubServer(lfs=True) as hub:
        done = run_with_hub(SCRIPT.format(folder=str(folder)), hub)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, folder, hub.repos["user/edits"]


def test_the_server_holds_the_lora_that_was_trained(pushed):
    output, folder, repo = pushed
    assert "the same pictures" in output
    local = (folder / "right" / "pytorch_lora_weights.safetensors").read_bytes()
    assert sha256(repo.files["pytorch_lora_weights.safetensors"]).digest() == sha256(local).digest()
    assert repo.private and len(repo.commits) >= 2  # checkpoints on the way, then the end
    assert not [path for path in repo.files if path.startswith(("checkpoint-", "_"))]


def test_the_card_says_what_it_is_and_keeps_local_paths_to_itself(pushed):
    _, folder, repo = pushed
    card = ModelCard(repo.files["README.md"].decode())
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "image-to-image"
    assert card.data.datasets == ["user/compbench"] and {"rcgrpo", "trl", "lora", "fluent"} <= set(card.data.tags)
    assert str(folder) not in card.content and "hf_test" not in card.content
    assert 'load_lora_weights("user/edits")' in card.content


def test_a_wrong_token_is_refused_before_training(pushed):
    output, folder, _ = pushed
    (line,) = [line for line in output.splitlines() if line.startswith("refused:")]
    assert "401" in line and "Invalid credentials" in line
    assert not list((folder / "wrong").glob("checkpoint-*"))
