"""`cli/opening.py`: what is not there is known before rows and weights are loaded."""

import pytest

from fault_server import FaultServer
from rcgrpo.cli import main
from rcgrpo.cli.opening import check_ready


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch, tmp_path):
    def loaded(*_):
        raise AssertionError("rows were loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rcgrpo.cli.train.load_rows", loaded)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("RCGRPO_JUDGE_URL", "RCGRPO_JUDGE_MODEL", "RCGRPO_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)


def refused(*flags):
    given = ["train", "--output_dir", "out", "--dataset", "compbench-mini", "--eval_split", "", *flags]
    with pytest.raises(SystemExit) as stop:
        main(given)
    assert "\n" not in str(stop.value.code)
    return str(stop.value.code)


def test_a_run_that_insists_on_a_server_does_not_begin_without(monkeypatch):
    flags = ("--reward_funcs", "editscore", "background_ssim", "--judge_on_server", "true")
    assert "--judge_on_server: got true without RCGRPO_JUDGE_URL, expected the address of a judge" in refused(*flags)
    monkeypatch.setenv("RCGRPO_JUDGE_URL", "http://127.0.0.1:9/v1")
    assert "judge: got no answer from http://127.0.0.1:9/v1, expected a judge there" in refused(*flags)
    with FaultServer() as server:
        monkeypatch.setenv("RCGRPO_JUDGE_URL", server.url + "/v1")
        monkeypatch.setenv("RCGRPO_JUDGE_MODEL", "editscore")
        server.behave({"do": "body", "body": '{"data": [{"id": "base"}]}'})
        assert "judge: got the name 'editscore', expected one that" in refused(*flags)
        server.behave({"do": "body", "body": '{"data": [{"id": "editscore"}]}'})
        check_ready("kontext-tiny", ["editscore"], judge_on_server=True)


def test_a_judge_and_a_model_that_cannot_be_had_are_refused():
    assert "judge: got 'Qwen/Qwen3-VL-8B-Instruct', expected the Hub id" in refused("--reward_funcs", "editscore")
    said = refused("--model", "nobody/editor")
    assert "model: got 'nobody/editor', expected kontext-tiny" in said and "check the network (HF_HUB_OFFLINE)" in said


def test_rewards_without_a_judge_need_none():
    check_ready("kontext-tiny", ["compbench_mini"], judge_on_server=True)
