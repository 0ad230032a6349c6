"""-q and -v: what is on standard error."""

import pytest
from test_cli import cptool

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
