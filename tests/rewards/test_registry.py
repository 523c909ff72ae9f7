import functools
import subprocess
import sys
import types

import pytest

from rcgrpo.rewards import Reward, RewardError, available_rewards, register_reward, registry, resolve_rewards


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


def plain(images, **columns):
    return [1.0] * len(images)


def copy_of(function):
    return types.FunctionType(function.__code__, function.__globals__)


async def remote(images, **columns):
    return [1.0] * len(images)


class Constant:
    def __init__(self, value=0.5):
        self.value = value

    def __call__(self, images, **columns):
        return [self.value] * len(images)


class Remote:
    async def __call__(self, images, **columns):
        return [0.5] * len(images)


def test_decorator_sets_plain_attributes_and_gives_the_function_back():
    def reward(caption, **columns):
        return [None for _ in caption]

    assert register_reward("mine", columns=("caption",), required=True)(reward) is reward
    assert (reward.reward_name, reward.columns, reward.required) == ("mine", ("caption",), True)
    assert resolve_rewards("mine") == [Reward("mine", reward, ("caption",), True)]
    assert "mine" in available_rewards() and available_rewards() == sorted(available_rewards())


def test_a_reward_may_have_a_gradient():
    def on_tensors(pictures, **columns):
        return pictures.mean((1, 2, 3))

    @register_reward("brightest", differentiable=on_tensors)
    def brightest(images, **columns):
        return [0.0 for _ in images]

    assert resolve_rewards("brightest")[0].differentiable is on_tensors
    assert resolve_rewards("background_psnr")[0].differentiable is None


def test_registered_class_is_a_factory_and_its_instances_keep_the_name():
    decorated = register_reward("half", columns=("task",))(type("Half", (Constant,), {}))
    (reward,) = resolve_rewards("half")
    assert isinstance(reward.function, decorated) and reward.function(images=[1, 2]) == [0.5, 0.5]
    assert reward.name == "half" and reward.columns == ("task",)
    (instance,) = resolve_rewards(decorated(value=0.25))
    assert instance.name == "half" and instance.function(images=[1]) == [0.25]


def test_taken_name_is_an_error_but_running_a_cell_again_is_not():
    first, again = copy_of(plain), copy_of(plain)
    register_reward("mine")(first)
    register_reward("mine")(again)
    assert resolve_rewards("mine")[0].function is again
    with pytest.raises(ValueError, match=r"'mine' belongs to .*plain"):
        register_reward("mine")(Constant)
    with pytest.raises(ValueError, match="without dots"):
        register_reward("my.reward")
    with pytest.raises(TypeError, match=r"\('caption',\)"):
        register_reward("other", columns="caption")


def test_names_of_callables():
    named = Constant()
    named.reward_name = "named"
    given = [plain, functools.partial(remote, prompts=[]), named, Constant()]
    assert [reward.name for reward in resolve_rewards(given)] == ["plain", "remote", "named", "Constant"]


def test_partial_keeps_what_the_decorator_set():
    register_reward("mine", columns=("caption",), required=True)(reward := copy_of(plain))
    (resolved,) = resolve_rewards(functools.partial(reward, prompts=[]))
    assert (resolved.name, resolved.columns, resolved.required) == ("mine", ("caption",), True)


def test_is_async():
    given = [plain, remote, Constant(), Remote()]
    assert [reward.is_async for reward in resolve_rewards(given)] == [False, True, False, True]
    assert resolve_rewards(functools.partial(remote, prompts=[]))[0].is_async
    assert resolve_rewards(functools.partial(Remote(), prompts=[]))[0].is_async


def test_dotted_paths(monkeypatch):
    module = types.ModuleType("my_rewards")
    module.plain, module.Constant = plain, Constant
    monkeypatch.setitem(sys.modules, "my_rewards", module)
    assert [r.name for r in resolve_rewards(["my_rewards.plain", "my_rewards.Constant"])] == ["plain", "Constant"]
    with pytest.raises(ValueError, match=r"reward_funcs: got 'my_rewards.plane'.* did you mean 'plain'"):
        resolve_rewards("my_rewards.plane")
    with pytest.raises(ValueError, match="no module 'no_such_rewards'"):
        resolve_rewards("no_such_rewards.sub.plain")


def test_broken_import_inside_a_user_module_is_not_disguised(monkeypatch, tmp_path):
    (tmp_path / "broken_rewards.py").write_text("import a_package_that_is_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ValueError, match=r"got 'broken_rewards.plain', .*ModuleNotFoundError: .*a_package_that_is_missing"
    ):
        resolve_rewards("broken_rewards.plain")


def test_unknown_name_tells_field_value_nearest_and_all():
    with pytest.raises(ValueError) as caught:
        resolve_rewards(["background_keep", "backgroud_sim"])
    message = str(caught.value)
    assert message.startswith("reward_funcs: got 'backgroud_sim'") and "did you mean 'background_ssim'?" in message
    assert all(name in message for name in available_rewards())


def test_refusals():
    with pytest.raises(ValueError, match="2 rewards are called 'plain'"):
        resolve_rewards([plain, plain])
    with pytest.raises(TypeError, match="got 3, expected a callable"):
        resolve_rewards([plain, 3])
    with pytest.raises(ValueError, match="empty list"):
        resolve_rewards([])
    with pytest.raises(TypeError, match=r"'narrow' does not accept `\*\*columns`"):

        def narrow(images):
            return [0.0 for _ in images]

        resolve_rewards(narrow)


def test_built_in_rewards_resolve_and_attention_must_be_recorded():
    preservation = ["background_keep", "background_psnr", "background_ssim"]
    names = ["attention_concentration", *preservation, "compbench_mini", "region_edit"]
    assert [reward.name for reward in resolve_rewards(names)] == names
    attention = resolve_rewards("attention_concentration")[0].function
    assert attention(attention_density=[1.5, 0.5], images=[None, None]) == [1.5, 0.5]
    with pytest.raises(RewardError, match="the trainer records it when this reward is used"):
        attention(images=[None, None])


def test_import_stays_light():
    code = (
        "import sys, rcgrpo.rewards; "
        "heavy = 'timm torchmetrics datasets diffusers trl transformers peft lpips httpx2 fastapi'.split(); "
        "print([m for m in heavy if m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_a_reward_that_reads_tokens_is_told_that_there_are_none(caplog):
    def trls_own(completions, completion_ids, **columns):
        return [float(completion_ids is None) for _ in completions]

    resolve_rewards(trls_own)
    assert caplog.messages == [
        "reward 'trls_own' reads `completion_ids`, which is None here: a candidate is a picture, in `images`, and has "
        "no tokens"
    ]
    resolve_rewards(lambda **columns: [])
    assert len(caplog.messages) == 1
