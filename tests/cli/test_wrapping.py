"""Lines break between words, and not between a number and its unit."""

import shlex

import pytest

from cptool.cli.figures.wrapping import continued, wrapped


@pytest.mark.parametrize(
    "text, lines",
    [
        ("", [""]),
        ("attention 62.7 s (81%)", ["attention", "62.7 s (81%)"]),
        ("in 1 min 50 s more", ["in 1 min 50 s", "more"]),
        ("105 MB, 1 h 5 min", ["105 MB,", "1 h 5 min"]),
        ("12.8 GB/s of weights", ["12.8 GB/s of", "weights"]),
        ("the 3 steps", ["the 3 steps"]),
        ("abcdefghijklmnop", ["abcdefghijklm", "nop"]),
        ("日本語日本語日本", ["日本語日本語", "日本"]),
    ],
)
def test_lines_of_thirteen_columns(text, lines):
    assert wrapped(text, 13, break_long_words=True) == lines


def test_a_command_that_is_continued_is_the_same():
    command = "cptool prefill 'a model of my own' --prompt-file PROMPT --cp 16"
    lines = continued(command, 30)
    assert max(map(len, lines)) <= 30 and all(line.endswith(" \\") for line in lines[:-1])
    assert shlex.split("\n".join(lines).replace("\\\n", "")) == shlex.split(command)
    assert continued(command, 80) == [command]
