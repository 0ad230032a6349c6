"""Variables of the environment: as defaults of options, in errors, and in the documented list."""

import re
from pathlib import Path

import click
import pytest
from test_cli import as_json, cptool

from cptool.cli.bench.options import MeasureOptions, measure_options
from cptool.cli.options.variables import VariableOption, with_origins

ROOT = Path(__file__).resolve().parents[2]


def test_every_variable_is_in_the_list_and_the_list_names_no_other():
    listed = set(re.findall(r"\bCPTOOL_[A-Z_]+\b", (ROOT / "docs/environment.md").read_text()))
    read = set()
    for folder, pattern in (("cptool", "*.py"), ("benchmarks", "*.py"), ("benchmarks", "*.sh")):
        for path in (ROOT / folder).rglob(pattern):
            read |= set(re.findall(r"\bCPTOOL_[A-Z_]+\b", path.read_text()))
    for path in (ROOT / "setup.py", *(ROOT / "tests").rglob("*.py")):
        read |= set(re.findall(r'environ\.get\("(CPTOOL_[A-Z_]+)"', path.read_text()))
    assert listed == read


def test_variables_are_defaults_and_the_command_line_wins(monkeypatch, mqa_path):
    for name, value in {"CP": "2", "DTYPE": "float32", "VARIANT": "pass-q"}.items():
        monkeypatch.setenv(f"CPTOOL_{name}", value)
    prefill = ("prefill", mqa_path, "--synthetic", "24")
    assert [as_json(*prefill)[field] for field in ("cp", "variant")] == [2, "pass-q"]
    assert as_json(*prefill, "--cp", "1")["cp"] == 1


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("THREADS", "100000", "--threads 100000: it must be 1 to 1024"),
        ("TIMEOUT", "inf", "--timeout inf"),
        ("CP", "two", "'two' is not a valid integer"),
        ("CP", "1000", "make 1000 ranks"),
        ("VARIANT", "pass-x", "'pass-x' is not one of"),
        ("DEVICE", "tpu", "'tpu' is not one of"),
        ("DTYPE", "int8", "'int8' is not one of"),
    ],
)
def test_errors_name_the_variable(monkeypatch, mqa_path, name, value, told):
    monkeypatch.setenv(f"CPTOOL_{name}", value)
    error = cptool("prefill", mqa_path, "--synthetic", "4", code=2).stderr
    assert told in error and error.count("\n") == 1
    assert f"--{name.lower()} is from CPTOOL_{name}" in error


def test_an_error_about_something_else_does_not_name_it(monkeypatch, mqa_path):
    monkeypatch.setenv("CPTOOL_CP", "2")
    error = cptool("prefill", mqa_path, "--synthetic", "4", "--threads", "100000", code=2).stderr
    assert "CPTOOL_CP" not in error
    assert with_origins("--cpu 1", {"--cp": "CPTOOL_CP"}) == "--cpu 1"


def test_an_empty_variable_is_not_set(monkeypatch):
    monkeypatch.setenv("CPTOOL_THREADS", "")
    monkeypatch.setenv("CPTOOL_DEVICE", "cpu")
    seen: list[MeasureOptions] = []

    @click.command()
    @measure_options
    def command(measuring: MeasureOptions) -> None:
        seen.append(measuring)

    command.main([], standalone_mode=False)
    assert (seen[0].threads, seen[0].device) == (None, "cpu")
    variables = {p.envvar for p in command.params if isinstance(p, VariableOption)}
    assert variables == {"CPTOOL_THREADS", "CPTOOL_DEVICE"}
