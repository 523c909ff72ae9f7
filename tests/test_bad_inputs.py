"""`benchmarks/bad_inputs.py`: a sample of its command lines; run the file itself for all of them."""

import pytest
from benchmarks.bad_inputs import BAD_INPUTS, _bad_part, check, prepare

SAMPLE = [
    "train: learning_rate=nan",
    "train: weight_decay=nan",
    "train: lora_alpha=0",
    "train: gradient_accumulation_steps=0",
    "train: num_train_samples=0",
    "train: save_steps=-1",
    "train: seed=-1",
    "train: guidance_scale=nan",
    "train: report_to=wandb",
    "train: model_init_kwargs={bad",
    "train: preset=unheard",
    "train: reward syntax_error.reward",
    "train: reward import_error.reward",
    "train: reward empty_module.reward",
    "train: data set broken.jsonl",
    "train: data set instruction-empty.jsonl",
    "train: data set mapping",
    "train: model empty",
    "train: model model-cut",
    "train: model model-json",
    "train: name lora_rank",
    "train: config syntax",
    "train: config num_generations-list",
    "train: config env-name",
    "train: no value",
    "edit: resolution=3",
    "edit: image={tmp}/truncated.png",
    "edit: instruction=",
    "edit: lora={tmp}/truncated.safetensors",
    "edit: model={tmp}/gone",
    "edit: model=nobody/nothing",
    "edit: model={tmp}/model-other",
    "edit: --strength",
    "evaluate: num_samples=-3",
    "evaluate: held_out=nan",
    "diagnose: match_tolerance=nan",
    "app: port=-1",
    "app: lora={tmp}/gone",
    "data inspect: rle-huge",
    "data inspect: held_out=1",
    "data masks: sigma=nan",
    "data build-tux: num_test=-1",
    "rewards serve: concurrency=0",
    "command: trian",
    "command: none",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad") / "files"
    prepare(folder)
    return folder


@pytest.mark.parametrize("name", SAMPLE)
def test_one_line_that_names_what_is_wrong(name, folder):
    assert check(dict(BAD_INPUTS)[name], folder) is None


def test_there_are_two_hundred_of_every_command():
    assert len(BAD_INPUTS) >= 200 and len(dict(BAD_INPUTS)) == len(BAD_INPUTS)
    assert {argv[0] for _, argv in BAD_INPUTS if argv} >= {"train", "edit", "evaluate", "diagnose", "app", "data"}


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        (lambda: None, "exit code 0"),
        (lambda: (_ for _ in ()).throw(SystemExit("rcgrpo edit: --resolution\nbad")), "2 lines"),
        (lambda: (_ for _ in ()).throw(SystemExit("rcgrpo edit: something is wrong")), "names none of resolution"),
        (lambda: (_ for _ in ()).throw(SystemExit("resolution")), "not told as the command's"),
        (lambda: (_ for _ in ()).throw(KeyError("resolution")), "not foreseen"),
        (lambda: print("Traceback (most recent call last)") or (_ for _ in ()).throw(SystemExit(1)), "a trace"),
    ],
)
def test_the_check_sees_what_it_is_for(behaviour, said, folder, monkeypatch):
    monkeypatch.setattr("rcgrpo.cli.edit.run", lambda arguments: behaviour())
    found = check(["edit", "--resolution", "3"], folder)
    assert found is not None and said in found


def test_an_answer_must_name_the_flag_its_value_or_a_part_of_the_files_name():
    assert _bad_part(["train", "--max_steps", "1", "--data", "{tmp}/mask-black.jsonl"]) == [
        "data",
        "mask",
        "black",
        "jsonl",
    ]
    assert _bad_part(["trian"]) == ["trian"] and _bad_part([]) == ["command"]
