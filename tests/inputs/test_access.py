"""`inputs/access.py`: a folder's file, and what the Hub says when it gives none, in one line."""

import pytest

from hub_server import HubServer, Repo, run_with_hub
from rcgrpo.inputs.access import fetch


def test_a_folder_s_file_is_there_or_not(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    assert fetch("model", str(tmp_path), "a.json", "a model") == tmp_path / "a.json"
    with pytest.raises(ValueError, match=r"model: got .*, expected a model \(FileNotFoundError: .*b.json"):
        fetch("model", str(tmp_path), "b.json", "a model")


GATED = """
import os
from rcgrpo.cli import main
for token, flags in (("", []), ("hf_test", ["--masks", "none"])):
    os.environ["HF_TOKEN"] = token
    for command in ("train", "cache"):
        try:
            main([command, "--model", "maker/editor", "--dataset", "BohanJia/CompBench", "--held_out", "0.1"])
        except SystemExit as stop:
            print(stop.code)
"""


def test_gated_weights_are_refused_in_one_line_before_anything_else_is_asked_for(tmp_path, monkeypatch):
    """Without an account, and with one that has not been let in."""
    monkeypatch.chdir(tmp_path)
    with HubServer() as server:
        server.repos["maker/editor"] = Repo(gated=True, files={"model_index.json": b"{}"})
        result = run_with_hub(GATED, server)
    lines = result.stdout.splitlines()
    assert len(lines) == 4, result.stdout + result.stderr
    for line, command in zip(lines, ("train", "cache") * 2, strict=True):
        assert line.startswith(
            f"rcgrpo {command}: model: got 'maker/editor', whose weights are gated, expected an account"
        )
        assert "accept the terms at https://huggingface.co/maker/editor, then `hf auth login`" in line
    assert {path for _, path, _ in server.requests} == {"/maker/editor/resolve/main/model_index.json"}
    assert {status for *_, status in server.requests} == {401, 403}
