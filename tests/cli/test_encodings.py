"""Answers on outputs whose encoding lacks characters: these become `?`, and the turn is kept.

JSON is ASCII on all of them.
"""

import json
import os
import subprocess
import sys

import pytest
from material import make_huggingface

from cptool.session import store
from cptool.session.conversation import find_dialogues

NARROW = [
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"PYTHONIOENCODING": "latin-1:strict"},
]
TEXT = "naïve ☕ 漢"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_huggingface(tmp_path_factory.mktemp("model") / "hf")


def cptool(encoding: dict, *arguments, said: str = "") -> bytes:
    """What the command writes to standard output; it must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "cptool", *map(str, arguments)],
        input=said.encode(),
        capture_output=True,
        env=os.environ | encoding,
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.parametrize("encoding", NARROW, ids=["ascii", "latin-1"])
def test_what_an_encoding_lacks_is_replaced_and_the_turn_kept(model, tmp_path, encoding):
    where, told = tmp_path / "s", tmp_path / "told"
    written = TEXT.encode("latin-1" if "latin" in str(encoding) else "ascii", "replace")
    (tmp_path / "doc.txt").write_text(TEXT, encoding="utf-8")
    asked = (model, "--prompt-file", tmp_path / "doc.txt")
    assert cptool(encoding, "generate", *asked, "-n", 3, "--echo").startswith(written)
    cptool(encoding, "prefill", *asked, "--chat", "--session", where)
    as_json = cptool(encoding, "decode", where, "-n", 4, "--json")
    assert as_json.isascii()
    (answer,) = json.loads(as_json)["text"]
    (dialogue,) = find_dialogues(where, store.load(where))
    assert dialogue.messages == (("user", TEXT), ("assistant", answer))
    cptool(encoding, "chat", where, "-n", 4, said=f"{TEXT}\n/save\n")
    (dialogue,) = find_dialogues(where, store.load(where))
    assert [content for role, content in dialogue.messages if role == "user"] == [TEXT] * 2
    assert written in cptool(encoding, "session", "show", where)
    assert written in cptool(encoding, "session", "export", where, "--format", "text")
    exported = cptool(encoding, "session", "export", where)
    assert exported.isascii() and json.loads(exported)["messages"] == dialogue.dicts()
    form = ("--format", "text", "--output", told)
    cptool(encoding, "session", "export", where, *form)
    assert TEXT in told.read_text(encoding="utf-8")
