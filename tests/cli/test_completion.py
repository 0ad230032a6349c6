"""Shell completion, through click's own machinery."""

import subprocess
import sys

import pytest
from click.shell_completion import ShellComplete

from cptool.checkpoint import catalogue
from cptool.cli.main import main
from cptool.planning import profiles

MODEL = "smollm2-135m-instruct"


def complete(*words):
    """What the shell is offered for the last of `words`: {candidate: help}, files as None."""
    shell = ShellComplete(main, {}, "cptool", "_CPTOOL_COMPLETE")
    items = shell.get_completions(list(words[:-1]), words[-1])
    return {item.value: item.help if item.type == "plain" else None for item in items}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A current directory, a cache and a hub's cache, all empty."""
    monkeypatch.setenv("CPTOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


@pytest.mark.parametrize("command", [["prefill"], ["verify"], ["chat"], ["plan"]])
def test_models(workplace, tmp_path, command):
    assert complete(*command, "smol") == {"": None, MODEL: "cptool pull gets it"}
    catalogue.path_of(MODEL).parent.mkdir(parents=True)
    catalogue.path_of(MODEL).touch()
    (tmp_path / "hub" / "models--meta-llama--Llama-3--8B").mkdir(parents=True)
    assert complete(*command, "smol")[MODEL] == "pulled"
    assert "meta-llama/Llama-3--8B" in complete(*command, "meta")
    assert complete("pull", "") == {MODEL: "pulled"}


@pytest.mark.parametrize("words", [["plan"], ["bench", "prefill"], ["bench", "emulate", "--shape"]])
def test_shapes(workplace, words):
    assert complete(*words, "llama3-4")["llama3-405b"] == "shape"
    assert MODEL in complete(*words, "")


@pytest.mark.parametrize("words", [["plan", "x"], ["bench", "emulate"]])
def test_hardware(workplace, words):
    assert "gtt-h100" in complete(*words, "--hardware", "g")
    assert "measured" not in complete(*words, "--hardware", "")
    profiles.profile_path().parent.mkdir()
    profiles.profile_path().touch()
    assert "measured" in complete(*words, "--hardware", "m")


def test_sessions(workplace):
    for name in ("story", "deep/stone"):
        (workplace / name).mkdir(parents=True)
        (workplace / name / "manifest.json").touch()
    (workplace / "stuff").mkdir()
    for words in (["decode"], ["session", "show"], ["prefill", "m", "--session"]):
        assert complete(*words, "st") == {"": None, "story": "session"}
    assert "deep/stone" in complete("decode", "deep/s")
    assert "./story" in complete("chat", "./s")
    assert f"{workplace}/story" in complete("decode", f"{workplace}/")
    assert complete("decode", "missing/") == {"": None}


def test_nothing_waits_for_torch(workplace):
    code = (
        "import sys\nfrom click.shell_completion import ShellComplete\n"
        "from cptool.cli.main import main\n"
        "shell = ShellComplete(main, {}, 'cptool', '_CPTOOL_COMPLETE')\n"
        "for words in (['chat'], ['decode'], ['bench', 'prefill'], ['plan', 'x', '--hardware']):\n"
        "    assert shell.get_completions(words, ''), words\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
