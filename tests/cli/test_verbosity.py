"""-q and -v: what is on standard error."""

import json

import pytest
from test_cli import cptool

from cptool.units import duration

PLAN = ("plan", "llama3-8b", "--context", "8K")


@pytest.fixture
def prefill(mqa_path, tmp_path):
    return ("prefill", mqa_path, "--synthetic", "24", "--session", tmp_path / "s")


def test_quiet_leaves_results(prefill, tmp_path):
    done = cptool("-q", *prefill)
    assert done.stderr == ""
    assert [row.split()[0] for row in done.stdout.splitlines()] == ["next", "session"]
    decode = ("decode", tmp_path / "s", "-n", "2", "--temperature", "0")
    loud, quiet = cptool(*decode), cptool(*decode, "--quiet")
    assert "sampling" in loud.stderr and quiet.stderr == ""
    assert quiet.stdout.count("\n") == loud.stdout.count("\n") == 1


def test_quiet_leaves_errors_and_warnings(smollm2_path):
    assert "no such model" in cptool("prefill", "-q", "nothing", "--synthetic", "4", code=2).stderr
    spelled = cptool("prefill", smollm2_path, "-q", "--prompt", "<|im_start|>a").stderr
    assert "read as letters" in spelled and spelled.count("\n") == 1


def test_they_exclude_each_other_and_hold_for_one_command():
    assert "exclude each other" in cptool("-q", *PLAN, "-v", code=2).stderr
    cptool("-q", "-q", *PLAN, "-q")
    cptool("-v", *PLAN)


@pytest.mark.parametrize("words", [[], ["decode"], ["session", "show"], ["bench", "link"]])
def test_every_command_takes_them(words):
    shown = cptool(*words, "--help").stdout
    assert shown.count("--quiet") == shown.count("--verbose") == 1


def test_what_is_predicted_before_a_turn_is_what_its_report_says(prefill, tmp_path):
    """The session holds a token whose KV is pending, and the last turn goes back in it."""

    def turn(*command):
        done = cptool("-v", *command, "--json")
        said, found = " ".join(done.stderr.split()), json.loads(done.stdout)
        assert f"predicted: {duration(found['predicted_ttft_s'])} to the first token" in said
        if step_ms := found.get("predicted_ttit_ms"):
            assert f"{duration(step_ms / 1e3)} for each further token" in said
        return found["predicted_ttft_s"]

    turn(*prefill)
    cptool("decode", tmp_path / "s", "-n", "3", "--temperature", "0")
    ids = tmp_path / "ids"
    ids.write_text(json.dumps(list(range(10, 13))))
    turn("decode", tmp_path / "s", "-n", "3", "--temperature", "0", "--token-ids", ids)
    longer = ("prefill", prefill[1], "--synthetic", "40", "--session", tmp_path / "s", "--rewind")
    assert turn(*longer) > 0
