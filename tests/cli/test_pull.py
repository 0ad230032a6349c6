"""`cptool pull` and what it shows: the catalogue, and downloads from a hub on this machine."""

import json
import os
import subprocess
import sys

import pytest
from fake_hub import hub
from gguf_checkpoint import write
from llama_reference import random_llama
from terminal import CTRL_C, terminal
from test_cli import cptool

from cptool.cli.pull import fetching
from cptool.units import size


def test_the_catalogue_is_listed(smollm2_path, tmp_path, monkeypatch):
    header, row, _ = cptool("pull").stdout.splitlines()
    assert header.split() == ["model", "context", "size", "license", "on", "this", "machine"]
    assert row.split() == ["smollm2-135m-instruct", "8,192", "98.4", "MB", "Apache-2.0", "yes"]
    (model,) = json.loads(cptool("pull", "--json").stdout)["models"]
    assert model["path"] == str(smollm2_path) and model["bytes"] == smollm2_path.stat().st_size
    assert cptool("-q", "pull", model["name"]).stdout == f"{smollm2_path}\n"
    monkeypatch.setenv("CPTOOL_CACHE", str(tmp_path))
    assert json.loads(cptool("pull", "--json").stdout)["models"][0]["path"] is None
    assert "no (cptool pull smollm2-135m-instruct)" in cptool("pull").stdout
    assert "choose one of smollm2" in cptool("pull", "huge", code=2).stderr


def test_figures_of_a_download():
    assert fetching.figures(0, 50_000_000, 0, 0.0) == "0%, 0 B of 50 MB"
    shown = fetching.figures(30_000_000, 50_000_000, 10_000_000, 2.0)
    assert shown == "60%, 30 MB of 50 MB, 5 MB/s, 0:04 left"
    assert fetching.figures(3_000, 0, 3_000, 1.0) == "3 kB, 3 kB/s"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A checkpoint of 25 MB: the hub's library counts in steps of 10 MB."""
    path = tmp_path_factory.mktemp("repository")
    random_llama({"vocab_size": 49000}, path)
    return path


def run(*arguments, **environment):
    command = [sys.executable, "-m", "cptool", *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


def test_a_hub_id_is_fetched_once(tiny, tmp_path):
    with hub(tiny) as served:
        online = served.environment(tmp_path)
        bytes_here = size(sum(file.stat().st_size for file in tiny.iterdir()))
        first = run("plan", "org/tiny", "--context", "64", "--json", **online)
        assert f"org/tiny: downloading from the hub ({bytes_here})" in first.stderr
        assert first.returncode == 0 and "it/s" not in first.stderr  # no bar of the library
        again = run("pull", "org/tiny", **online)
        assert again.stderr == "" and again.stdout.startswith(str(tmp_path))
        assert sorted(served.fetched) == sorted(file.name for file in tiny.iterdir())
    assert run("pull", "org/tiny", **online, HF_HUB_OFFLINE="1").stdout == again.stdout
    assert run("-q", "pull", "org/other", **online, HF_HUB_OFFLINE="1").stderr.count("\n") == 1


def test_an_interrupted_download_leaves_no_model(tiny, tmp_path):
    with hub(tiny) as served:
        served.pause_s = 0.1
        command = ("prefill", "org/tiny", "--synthetic", "8")
        with terminal(*command, **served.environment(tmp_path)) as shown:
            shown.wait_for(r"org/tiny \S+ +\d+%, \S+ .B of \S+ MB, .* left")
            shown.type(CTRL_C)
            assert shown.end(10) == 130 and shown.shown.endswith("cptool: interrupted\r\n")
        offline = served.environment(tmp_path) | {"HF_HUB_OFFLINE": "1"}
        assert "could not be downloaded" in run("pull", "org/tiny", **offline).stderr
        served.pause_s = 0.0
        assert run("pull", "org/tiny", **served.environment(tmp_path)).returncode == 0
    assert served.fetched.count("model.safetensors") == 2


def test_all_parts_of_a_split_gguf_are_fetched(tmp_path):
    repository = tmp_path / "repository"
    repository.mkdir()
    write(repository / "tiny.gguf", every=5)
    with hub(repository) as served:
        online = served.environment(tmp_path / "cache")
        pulled = run("pull", "org/tiny/tiny-00002-of-00003.gguf", **online)
        assert pulled.stdout.strip().endswith("tiny-00002-of-00003.gguf")
        assert sorted(served.fetched) == [f"tiny-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
        assert "has no such file" in run("-q", "pull", "org/tiny/none.gguf", **online).stderr
    command = ("plan", "org/tiny/tiny-00001-of-00003.gguf", "--context", "64", "--json")
    assert run(*command, **online, HF_HUB_OFFLINE="1").returncode == 0
