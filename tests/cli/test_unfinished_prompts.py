"""Commands whose prompt is long: what a signal leaves of them, and the same command after it."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from test_cli import as_json, cptool

from cptool.session import store
from cptool.session.unfinished import read_ahead

CHUNKED = ("--context-length", 9000, "--chunk", 250, "--threads", 1)
LONG = ("--synthetic", 5000, *CHUNKED)


def stop(number, made, *arguments, group=False, revision=2):
    """The exit code and standard error of a command that gets a signal once the session `made` has
    this revision: the command alone, or all processes of its group.
    """
    command = [sys.executable, "-m", "cptool", *map(str, arguments), "--save-every", "1ms"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"CPTOOL_ISA": "portable"},  # slow enough to be in the middle
        start_new_session=True,
    )
    until = time.monotonic() + 60
    while not store.exists(made) or store.read(made).revision < revision:
        assert time.monotonic() < until and process.poll() is None, process.communicate()
        time.sleep(0.02)
    (os.killpg if group else os.kill)(process.pid, number)
    told = process.communicate(timeout=60)[1]
    return process.returncode, told


@pytest.fixture(scope="module")
def expected(mqa_path):
    """The answer to the long prompt."""
    return as_json("generate", mqa_path, *LONG, "-n", 3, "--temperature", 0)["token_ids"]


def test_a_killed_prefill_goes_on_on_other_ranks(mqa_path, expected, tmp_path):
    made = tmp_path / "s"
    code, _ = stop(signal.SIGKILL, made, "prefill", mqa_path, *LONG, "--session", made, "--cp", 2)
    assert code == -signal.SIGKILL
    cptool("session", "verify", made)
    kept = read_ahead(store.load(made))
    assert kept in range(250, 5000, 250)
    assert "no turn yet" in cptool("decode", made, code=2).stderr
    assert f"{kept:,} tokens of a next turn" in cptool("session", "show", made).stdout
    for cp in (1, 3):
        again = tmp_path / f"on-{cp}"
        shutil.copytree(made, again)
        done = cptool("prefill", mqa_path, *LONG, "--session", again, "--cp", cp)
        assert f"{again} has {kept:,} of the 5,000 tokens of this prompt" in done.stderr
        assert f"{kept:,} of them of this prompt" in done.stdout
        found = as_json("decode", again, "-n", 3, "--temperature", 0, *CHUNKED[:2])
        assert found["token_ids"] == expected
        cptool("session", "verify", again)


@pytest.mark.parametrize(
    "number, group, code, said",
    [
        (signal.SIGINT, True, 130, "interrupted"),
        (signal.SIGTERM, True, 143, "terminated"),
        (signal.SIGTERM, False, 143, "terminated"),
    ],
)
def test_a_signal_keeps_what_is_computed(mqa_path, expected, tmp_path, number, group, code, said):
    made = tmp_path / "s"
    asked = ("generate", mqa_path, *LONG, "-n", 3, "--temperature", 0, "--session", made)
    cp = 2 if group else 1
    found, told = stop(number, made, *asked, "--cp", cp, group=group)
    kept = read_ahead(store.load(made))
    assert found == code
    assert told.splitlines()[-1] == (
        f"cptool: {said} while the prompt was read; session {made} keeps {kept:,} of its 5,000 "
        "tokens; the same command goes on there"
    )
    again = as_json(*asked)
    assert (again["resumed"], again["token_ids"]) == (kept, expected)


def test_a_next_turn_that_was_interrupted(mqa_path, token_file, tmp_path):
    made = tmp_path / "s"
    cptool("prefill", mqa_path, "--token-ids", token_file([5, 6, 7]), "--session", made)
    shutil.copytree(made, tmp_path / "whole")
    asked = (*LONG, "-n", 3, "--temperature", 0)
    expected = as_json("decode", tmp_path / "whole", *asked)
    code, _ = stop(signal.SIGINT, made, "decode", made, *asked, revision=3)
    assert code == 130
    manifest = store.load(made)
    assert (manifest.turns, manifest.sequences[0].tokens) == (((3,),), (5, 6, 7))
    found = as_json("decode", made, *asked, "--cp", 2)
    assert found["token_ids"] == expected["token_ids"] and found["resumed"] > 0
    assert len(store.load(made).turns) == 2


def test_a_conversation_begins_once_its_document_is_read(small_smollm2_path, tmp_path):
    document = tmp_path / "doc.txt"
    document.write_text("One boat was late, and two were early. " * 300)
    made, whole = tmp_path / "s", tmp_path / "whole"
    asked = ("prefill", small_smollm2_path, "--chat", "--prompt-file", document, *CHUNKED)
    code, _ = stop(signal.SIGTERM, made, *asked, "--session", made)
    assert code == 143
    for command in ("decode", "chat"):
        assert "holds no turn yet" in cptool(command, made, code=2).stderr
    for place in (made, whole):
        cptool(*asked, "--session", place)
    question = ("--prompt", "Which was late?", "-n", 4, "--temperature", 0, *CHUNKED[:2])
    answers = [as_json("decode", place, *question) for place in (made, whole)]
    assert answers[0]["text"] == answers[1]["text"]
    shown = [as_json("session", "show", place) for place in (made, whole)]
    assert shown[0]["messages"] == shown[1]["messages"] and len(shown[0]["messages"][0]) == 2
