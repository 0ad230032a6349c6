"""Ctrl-C in a terminal: the first one ends a command in order and keeps what was said."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
from terminal import CTRL_C, terminal
from test_cli import as_json, cptool

from cptool.distributed import signals
from cptool.session import store

# A layer of this prompt takes minutes.
LONG = ("--synthetic", 60_000, "--context-length", 100_000)
SLOW = {"CPTOOL_ISA": "portable"}
# An answer that the model does not end: 300 is its EOS, which would come after 291 tokens.
ENDLESS = ("-n", 90_000, "--context-length", 100_000, "--logit-bias", "300=-1000")


def lines(shown: str) -> list[str]:
    return [line for line in re.split(r"[\r\n]+", shown) if line.strip()]


@pytest.mark.parametrize("cp", [1, 2])
def test_a_prompt_that_is_read_is_dropped_within_a_layer(mqa_path, tmp_path, cp):
    made = tmp_path / "s"
    options = (*LONG, "--cp", cp, "--threads", 1, "--dtype", "float32")
    with terminal("prefill", mqa_path, *options, "--session", made, **SLOW) as opened:
        opened.wait_for(r"reading 0 of 60,000 tokens, chunk 1 of ")
        opened.type(CTRL_C)
        assert opened.end() == 130
        told = "cptool: interrupted while the prompt was read; nothing was kept"
        assert lines(opened.shown)[-1] == told
        assert opened.left() == [] and not store.exists(made)


@pytest.mark.parametrize("cp", [1, 2])
def test_answers_keep_what_was_said(mqa_path, tmp_path, cp):
    """A next turn that is dropped leaves the session as it was; one that is answered is kept."""
    made = tmp_path / "s"
    cptool("prefill", mqa_path, "--synthetic", 9, "--session", made)
    whole = as_json("decode", made, "-n", 5, "--seed", 1, "--cp", cp)["token_ids"][0]
    cptool("prefill", mqa_path, "--synthetic", 9, "--session", tmp_path / "t")
    options = ("--cp", cp)
    with terminal("decode", tmp_path / "t", *ENDLESS, "--seed", 1, *options) as opened:
        opened.wait_for(r"answering, token [\d,]{2,} of 90,000 .*\d+ tokens/s")
        opened.type(CTRL_C)
        assert opened.end() == 130
        count = len(store.load(tmp_path / "t").sequences[0].tokens) - 9
        told = f"interrupted after {count:,} tokens; session {tmp_path / 't'} keeps them"
        assert " ".join(lines(opened.shown)).endswith(f"cptool: {told}")
        assert opened.left() == [] and count > 5
    assert store.load(tmp_path / "t").sequences[0].tokens[9:14] == tuple(whole)
    revision = store.load(made).revision
    with terminal("decode", made, *LONG, *options, "--threads", 1, **SLOW) as opened:
        opened.wait_for("reading 0 of 60,00[01] tokens, chunk 1 of")
        opened.type(CTRL_C)
        assert opened.end() == 130
        told = f"cptool: interrupted while the prompt was read; session {made} is as it was"
        assert lines(opened.shown)[-1] == told
    assert store.load(made).revision == revision
    cptool("session", "verify", made)


def test_json_says_that_an_answer_was_interrupted(mqa_path, tmp_path):
    made = tmp_path / "s"
    cptool("prefill", mqa_path, "--synthetic", 9, "--session", made)
    options = (*ENDLESS, "--json")
    with terminal("decode", made, *options) as opened:
        opened.wait_for("answering, token")
        opened.type(CTRL_C)
        assert opened.end() == 130
    (printed,) = (line for line in lines(opened.shown) if line.startswith("{"))
    assert json.loads(printed)["stopped"] == ["interrupted"]


@pytest.mark.parametrize("cp", [1, 2])
def test_chat_goes_on_after_a_question_that_was_not_read_to_its_end(smollm2_path, cp):
    options = ("--cp", cp, "--threads", 1, "-n", 4, "--dtype", "float32")
    with terminal("chat", smollm2_path, *options, **SLOW) as opened:
        opened.wait_for("> ")
        for pause in (0.0, 0.0, 0.02, 0.3):  # discards a line, and ends nothing, at any pace
            time.sleep(pause)
            opened.type(b"nothing" + CTRL_C)
        opened.wait_for("or /exit to end.*\n.*> ")
        time.sleep(signals.PATIENCE_S + 0.5)
        opened.type(b"one two three four five " * 150 + b"\r")
        opened.wait_for(r"reading 781 tokens, layer \d+ of 30")
        opened.type(CTRL_C)
        opened.wait_for("it is as if it was not asked")
        opened.type(b"Hi\r")
        opened.wait_for(r"\[\d tokens?[^\]]*in\s+context\]")
        opened.type(b"/exit\r")
        assert opened.end() == 0 and opened.left() == []


SLOW_END = """
import sys, time
from cptool.cli import entry, main
from cptool.distributed import signals
from cptool.host import scratch
signals.PATIENCE_S = 0.3
scratch.remove_folders = lambda: time.sleep(1)
def command(self, ctx, name):
    print("now", flush=True)
    try:
        time.sleep(60)
    except BaseException:
        time.sleep({cleanup})
        raise
main.Commands.get_command = command
sys.argv = ["cptool", "plan"]
entry.main()
"""


@pytest.mark.parametrize("cleanup", [0.0, 0.4])
def test_an_interruption_is_reported_once_however_long_the_end_takes(cleanup):
    """By the main thread, or by the one that ends the process when it takes too long."""
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_END.format(cleanup=cleanup)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "now\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[1] == "cptool: interrupted\n"
    assert process.returncode == 130


STOPPED = """
import sys, time
from cptool.distributed import signals
signals.PATIENCE_S = {patience}
signals.guard(signals.signal.getsignal(2))
heard = []
def request():
    heard.append(1)
    return {heard}
with signals.stopping(request, lambda: {noticed}):
    try:
        print("now", flush=True)
        while not {over}:
            time.sleep(0.01)
        print("kept", heard)
    except KeyboardInterrupt:
        print("raised", heard)
"""


@pytest.mark.parametrize(
    "heard, noticed, over, count, printed, code",
    [
        (True, True, "heard", 1, "kept [1]\n", 0),  # the body ends in order
        (False, False, "False", 1, "raised [1]\n", 0),  # nobody would hear of it: raised at once
        (True, True, "False", 2, "raised [1]\n", 0),  # the second one ends the command
        (True, False, "False", 1, "", 130),  # it was not heard: ended in time all the same
    ],
)
def test_the_first_signal_requests_and_the_second_one_raises(
    heard, noticed, over, count, printed, code
):
    patience = 0.3 if heard and not noticed else 60  # of the last one alone
    script = STOPPED.format(heard=heard, noticed=noticed, over=over, patience=patience)
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "now\n"
        for _ in range(count):
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)
        assert process.communicate(timeout=60)[0] == printed
    assert process.returncode == code
