"""Helps: their examples are command lines that parse, and they fit 80 columns."""

import shlex

import click
import pytest
from click.testing import CliRunner
from test_json_fields import commands

from cptool.cli.main import main

COMMANDS = dict(commands(main))
GROUPS = ("cptool", "cptool session", "cptool bench")


def help_of(path: str) -> str:
    done = CliRunner().invoke(main, [*path.split()[1:], "--help"])
    assert done.exit_code == 0
    return done.stdout


def examples_in(text: str) -> list[str]:
    """The example lines of a help, those that go on joined."""
    _, found, after = text.replace(" \\\n", " ").partition("Examples:\n")
    lines = after.split("\n\n")[0].splitlines() if found else []
    return [line.strip() for line in lines]


@pytest.mark.parametrize("path", [*GROUPS, *COMMANDS])
def test_examples_parse(path, tmp_path, monkeypatch):
    """Up to where the command would be run, in a folder with the files that they name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "doc.txt").touch()
    reached = []

    def arrive(self, context):
        if not isinstance(self, click.Group):
            reached.append(context.command_path.replace("main", "cptool"))

    monkeypatch.setattr(click.Command, "invoke", arrive)
    found = examples_in(help_of(path))
    assert 1 <= len(found) <= 3
    for line in found:
        words = shlex.split(line.partition("| ")[2] or line.partition(" > ")[0])
        assert words[0] == "cptool"
        done = CliRunner().invoke(main, words[1:])
        assert (done.exit_code, done.stderr) == (0, ""), (line, done.stderr)
    assert len(reached) == len(found)
    if path in COMMANDS:
        assert set(reached) == {path}


@pytest.mark.parametrize("path", [*GROUPS, *COMMANDS])
def test_a_help_fits_80_columns(path):
    assert max(map(len, help_of(path).splitlines())) <= 80


@pytest.mark.parametrize("path", COMMANDS)
def test_every_option_has_a_help(path):
    options = [param for param in COMMANDS[path].params if isinstance(param, click.Option)]
    assert [option.opts for option in options if not option.help] == []
