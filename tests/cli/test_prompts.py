"""The prompt options: their order, several texts in one prompt, standard input, chat messages."""

import dataclasses
import json

import click
import pytest
from click.testing import CliRunner
from test_cli import as_json, cptool

from cptool.checkpoint import open_checkpoint
from cptool.cli.main import main
from cptool.cli.options.prompts import Prompts, chat_prompt_options


@click.command()
@chat_prompt_options
@click.pass_context
def show(ctx, asked: Prompts):
    read = asked.read(ctx.obj, begin=True)
    click.echo(json.dumps([dataclasses.asdict(prompt) for prompt in read]))


@pytest.fixture(scope="module")
def checkpoint(smollm2_path):
    return open_checkpoint(str(smollm2_path))


@pytest.fixture
def given(checkpoint, tmp_path):
    """The prompts that options stand for; the names of files are relative to `tmp_path`."""
    (tmp_path / "a.txt").write_text("Text A\n")
    (tmp_path / "b.txt").write_text("Text B")
    (tmp_path / "ids.json").write_text("[[5], [6, 7]]")

    def read(*arguments, stdin: str | bytes = "", env=None) -> list[dict]:
        words = [
            str(tmp_path / word) if word.endswith((".txt", ".json")) else word for word in arguments
        ]
        result = CliRunner(env=env).invoke(show, words, input=stdin, obj=checkpoint)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return json.loads(result.stdout)

    return read


def test_the_batch_has_the_order_of_the_command_line(given):
    prompts = given("--prompt", "one", "--token-ids", "ids.json", "--synthetic", "3")
    assert [p["tokens"] for p in prompts][1:3] == [[5], [6, 7]] and len(prompts[3]["tokens"]) == 3
    prompts = given(
        *("--prompt-file", "b.txt", "--prompt", "one", "--synthetic", "2"),
        *("--prompt=two", "--token-ids", "ids.json", "--prompt-file", "a.txt"),
    )
    texts = ["Text B", "one", None, "two", None, None, "Text A\n"]
    assert [p["text"] for p in prompts] == texts
    assert len(prompts[2]["tokens"]) == 2 and prompts[4]["tokens"] == [5]
    assert [prompts[n]["name"] for n in (1, 3)] == ["--prompt 1", "--prompt 2"]


def test_files_go_before_the_next_prompt(given, checkpoint):
    prompts = given(
        *("--file", "a.txt", "--file", "b.txt", "--prompt", "Why?"),
        *("--prompt", "alone", "--file", "b.txt", "--prompt-file", "a.txt"),
        *("--file", "a.txt", "--file", "b.txt"),
    )
    assert [p["text"] for p in prompts] == [
        "Text A\n\n\nText B\n\nWhy?",
        "alone",
        "Text B\n\nText A\n",
        "Text A\n\n\nText B",
    ]
    for prompt in prompts:
        assert prompt["tokens"] == checkpoint.tokenizer().encode(prompt["text"])


@pytest.mark.parametrize("option", ["--prompt", "--prompt-file", "--file"])
def test_a_dash_is_standard_input(given, option):
    text = "naïve\r\nlines\n"
    more = ("--prompt", "Why?") if option == "--file" else ()
    (prompt,) = given(option, "-", *more, stdin="\ufeff".encode() + text.encode())
    assert prompt["text"] == (f"{text}\n\nWhy?" if more else text)


def test_chat_messages_follow_the_system_message(given, checkpoint):
    (prompt,) = given("--chat", "--system", "Be brief.", "--file", "b.txt", "--prompt", "Why?")
    assert prompt["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Text B\n\nWhy?"},
    ]
    assert prompt["tokens"] == checkpoint.tokenizer().chat(prompt["messages"])
    (prompt,) = given("--chat", "--prompt", "Why?")
    assert prompt["messages"] == [{"role": "user", "content": "Why?"}]


MISTAKES = [
    (("--prompt", "-", "--file", "-"), "x", "--file -: standard input is read once, by --prompt -"),
    (("--prompt", "-"), "", "standard input: the prompt is empty"),
    (("--prompt-file", "-"), b"caf\xe9", "standard input is not UTF-8 text (byte 3)"),
    (("--prompt-file", "-"), "x" * (10 << 20), "standard input has more than 9,437,184 bytes"),
    (("--file", "-", "--synthetic", "3"), "x", "--synthetic after --file"),
    (("--prompt", "a", "--system", "b"), "", "--system: it is a message of the chat template"),
    (("--file", "/nowhere.txt", "--prompt", "a"), "", "/nowhere.txt cannot be read"),
    (("--prompt", "a", "--synthetic", "99999"), "", "sequence 2 has 99999 tokens"),
]


@pytest.mark.parametrize("arguments, stdin, expected", MISTAKES)
def test_mistakes_of_prompts(smollm2_path, arguments, stdin, expected):
    words = ("prefill", str(smollm2_path), *arguments)
    result = CliRunner().invoke(main, words, input=stdin)
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1
    assert expected in result.stderr


def test_the_processes_of_a_launcher_do_not_share_standard_input(smollm2_path, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    refused = cptool("prefill", smollm2_path, "--prompt", "-", code=2).stderr
    assert "the processes of a launcher share one standard input" in refused


def test_prefill_reads_the_prompts_in_order(smollm2_path, tmp_path):
    (tmp_path / "a.txt").write_text("A text")
    asked = ("--synthetic", 3, "--file", tmp_path / "a.txt", "--prompt", "b", "--synthetic", 2)
    fields = as_json("prefill", smollm2_path, *asked)
    lengths = fields["tokens_per_sequence"]
    assert lengths[0] == 3 and lengths[1] > 3 and lengths[2] == 2
