"""docs/json.md and what the commands print: each field of one is in the other, with its type."""

import json

import click
import pytest
from click.testing import CliRunner
from json_document import PAGE, Document

from cptool.cli.json_output import SCHEMA
from cptool.cli.main import main

EVERY = "Every object"
ONCE = "--repeats 1 --threads 1 --device cpu"

RUNS = {
    "cptool prefill": [
        "{tiny} --synthetic 9",
        "{tiny} --synthetic 60 --cp 2 --session {here}/plain --profile {here}/trace.json",
    ],
    "cptool generate": [
        "{tiny} --synthetic 5 -n 3",
        "{smollm2} --chat --prompt Hi -n 2 --echo --session {here}/chat "
        "--logprobs 2 --prompt-logprobs 1",
    ],
    "cptool generate --batch-file": [
        "{here}/prompts.jsonl {tiny} -n 2 --output {here}/answers.jsonl"
    ],
    "--batch-file": [
        "generate {tiny} -n 2 --batch-file {here}/prompts.jsonl",
        "generate {smollm2} -n 2 --batch-file {here}/prompts.jsonl --stop x --logprobs 1 "
        "--prompt-logprobs 1",
    ],
    "cptool decode": ["{here}/plain -n 3 --profile {here}/trace.json --logit-bias 7=-1.5"],
    "--jsonl": [
        "generate {smollm2} --chat --prompt Hi --prompt Ho -n 2 --echo --session {here}/chats",
        "generate {smollm2} --prompt Hi -n 2 --logprobs 2",
    ],
    "cptool verify": ["{tiny} --synthetic 6 --max-cp 2 --weights q8_0"],
    "cptool plan": ["llama3-8b --context 8K --max-gpus 2 --ttft-below 1s", "{tiny} --context 256"],
    "cptool plan --sweep": [
        "ranks llama3-8b --context 8K",
        "contexts llama3-8b --context 16K --cp 2",
        "miss-rates llama3-8b --context 8K --cp 2",
    ],
    "cptool bench attention": [
        f"-t 5 --cached 0 --cached 3 --heads 4/2 -d 16 --dtype float32 {ONCE}"
    ],
    "cptool bench merge": [f"-n 2 -t 5 --heads 2 -d 16 --dtype float32 {ONCE}"],
    "cptool bench link": [f"--size 1K {ONCE}"],
    "cptool bench prefill": [f"{{tiny}} --context 32 --layers 1 --dtype float32 {ONCE}"],
    "cptool bench decode": [f"{{tiny}} --cached 32 --layers 1 --steps 2 {ONCE}"],
    "cptool bench levers": [f"{{tiny}} --prompt 40 -n 4 --scored 20 --cp 1 {ONCE}"],
    "cptool bench perplexity": ["{tiny} {here}/ids.json --ids --window 8 --threads 1 --device cpu"],
    "cptool bench emulate": [f"--shape {{tiny}} --context 128 --cp 2 --tp 2 {ONCE}"],
    "cptool session show": ["{here}/plain", "{here}/chats"],
    "cptool session list": ["{here}"],
    "cptool session export": ["{here}/plain", "{here}/chat", "{here}/chats"],
    "cptool doctor": [""],
    "cptool pull": ["", "smollm2-135m-instruct"],
    "cptool models": [""],
}
"""Arguments by the heading that documents the result, in the order in which they are run."""

CALIBRATED = {"cptool bench calibrate", "Rates by rows", "Measurement"}
"""Headings that calibration/test_calibrate.py holds against what it runs."""

ELSEWHERE = {*CALIBRATED, "Calibration", "Lines of --progress json"}
"""Those that this file does not; cli/test_doctor.py and test_progress_lines.py have the last."""

ALWAYS = {"cptool session export"}
"""Commands that print JSON without --json."""


@pytest.fixture(scope="module")
def document():
    return Document(PAGE.read_text())


@pytest.fixture(scope="module")
def results(tiny_model, smollm2_path, tmp_path_factory):
    """What RUNS print, by heading."""
    here = tmp_path_factory.mktemp("json")
    (here / "broken").mkdir()
    (here / "broken" / "manifest.json").write_text("{")
    (here / "prompts.jsonl").write_text('{"token_ids": [1, 2], "id": "a"}\n{"token_ids": [3]}\n')
    (here / "ids.json").write_text(json.dumps(list(range(20))))
    places = {"tiny": tiny_model, "smollm2": smollm2_path, "here": here}
    return {
        heading: [
            CliRunner().invoke(main, line_of(heading, arguments.format(**places)))
            for arguments in several
        ]
        for heading, several in RUNS.items()
    }


def line_of(heading: str, arguments: str) -> list[str]:
    """The words of a command line of RUNS."""
    if not heading.startswith("cptool "):
        words = arguments.split()
        return words if heading in words else [*words, heading]
    option = [] if heading in ALWAYS else ["--json"]
    return [*heading.split()[1:], *arguments.split(), *option]


@pytest.fixture(scope="module")
def found(results, document):
    """What is wrong with each result, by heading."""
    return {
        heading: [problem for result in several for problem in problems(result, heading, document)]
        for heading, several in results.items()
    }


def problems(result, heading, document):
    if result.exit_code:
        return [f"exit code {result.exit_code}: {result.stderr} {result.exception}"]
    objects = [json.loads(line) for line in result.stdout.splitlines()]
    if heading == "--batch-file":
        return [
            problem
            for fields in objects
            for problem in document.check(fields, EVERY, "Answer line")
        ]
    if heading != "--jsonl":
        assert len(objects) == 1
        return document.check(objects[0], EVERY, heading)
    said = [
        document.check(fields, f"{fields['type'].capitalize()} line") for fields in objects[:-1]
    ]
    return sum(said, document.check(objects[-1], EVERY, "Result line"))


@pytest.mark.parametrize("heading", RUNS)
def test_what_is_printed_is_documented(heading, found):
    assert found[heading] == []


def test_what_is_documented_is_printed(found, document):
    left = document.unprinted()
    assert {(heading, name) for heading, name in left if heading not in ELSEWHERE} == set()


def commands(group: click.Group, path: str = "cptool"):
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def test_every_command_with_json_has_a_section(document):
    with_json = {
        path
        for path, command in commands(main)
        if path in ALWAYS or any("--json" in param.opts for param in command.params)
    }
    assert with_json <= document.sections.keys()
    assert with_json <= RUNS.keys() | CALIBRATED


def test_the_page_says_what_null_and_optional_mean(document):
    assert f"{SCHEMA}" in document.fields(EVERY)["schema"][1].meaning
    for section in document.sections.values():
        for field in section.own.values():
            where = (section.heading, field.name)
            assert ("null" in field.type) == ("null " in field.meaning), where
            assert field.optional == ("only " in field.meaning), where


def test_what_does_not_agree_is_found():
    page = """
# A
| field | type | unit | meaning |
| --- | --- | --- | --- |
| `count` | integer | | |
| `pairs` | list of [integer, number] | | |
| `texts` | map of (string or null) | | |
| `more` | [B](#b), optional | | |
## B
| `ok` | boolean or null | | |
"""
    good = {"count": 1, "pairs": [[1, 2.5]], "texts": {"a": None}}
    assert not Document(page).check(good, "A") and not Document(page).check(
        good | {"more": {"ok": None}}, "A"
    )
    assert Document(page).unprinted() == {("A", n) for n in (*good, "more")} | {("B", "ok")}
    for wrong in (
        {"count": True},
        {"count": 1.5},
        {"pairs": [[1]]},
        {"pairs": None},
        {"texts": {"a": 1}},
        {"more": None},
        {"more": {"ok": 1}},
        {"more": {}},
        {"other": 1},
    ):
        assert len(Document(page).check(good | wrong, "A")) == 1, wrong
    assert len(Document(page).check({}, "A")) == 3
