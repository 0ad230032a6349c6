"""Tables fit the terminal, and no number is cut."""

import importlib

import pytest
from click.testing import CliRunner

from cptool.cli import draw
from cptool.cli.bench.options import emit
from cptool.cli.figures import tables
from cptool.cli.figures.tables import Column
from cptool.cli.main import main

COLUMNS = (
    Column(name="variant", left=True),
    Column(name="time per step"),
    Column(name="predicted", rank=1),
    Column(name="exposed", rank=3),
    Column(name="sent", rank=2),
)
ROWS = [
    ("pass-kv", "1,234 ms", "1,111 ms", "87.7 ms", "111 MB"),
    ("", "3 d 15 h", "2 h", "", "0 B"),
]


def drawn(monkeypatch, capsys, width, **more):
    monkeypatch.setattr(tables, "room", lambda to_stderr: width)
    tables.show(COLUMNS, ROWS, **more)
    return capsys.readouterr().out.splitlines()


def test_what_fits_is_shown_in_full(monkeypatch, capsys):
    assert drawn(monkeypatch, capsys, 60, title="times", caption="a caption") == [
        "times",
        "         time per",
        "variant      step  predicted  exposed    sent",
        "pass-kv  1,234 ms   1,111 ms  87.7 ms  111 MB",
        "         3 d 15 h        2 h              0 B",
        "a caption",
    ]


def test_the_least_important_columns_are_left_out_first(monkeypatch, capsys):
    lines = drawn(monkeypatch, capsys, 40)
    assert lines[1] == "variant      step  predicted    sent"
    assert " ".join(lines[4:]) == "Left out for want of room: exposed; --wide prints all."
    assert "predicted" in drawn(monkeypatch, capsys, 30)[1]


def test_a_row_takes_several_lines_where_the_key_columns_do_not_fit(monkeypatch, capsys):
    lines = drawn(monkeypatch, capsys, 16)
    assert lines[:4] == ["variant", "  time per step", "pass-kv", "       1,234 ms"]


def test_without_a_terminal_nothing_is_left_out(monkeypatch, capsys):
    lines = drawn(monkeypatch, capsys, None, caption="word " * 99 + "word")
    assert lines[0].split() == "variant time per step predicted exposed sent".split()
    assert len(lines) == 4 and len(lines[-1]) == 499


@pytest.mark.parametrize("width", range(16, 60))
def test_no_number_is_cut_at_any_width(monkeypatch, capsys, width):
    lines = drawn(monkeypatch, capsys, width)
    text = "\n".join(lines)
    assert all(len(line) <= width for line in lines)
    for row in ROWS:
        for column, cell in zip(COLUMNS, row, strict=True):
            assert cell in text or column.name in " ".join(lines)
    assert "1,234 ms" in text and "3 d 15 h" in text


SPREAD = {"median": 1.2345678, "min": 1.1234567, "max": 12345.678}
LONG = {
    "dtype": "bfloat16",
    "q_heads": 128,
    "kv_heads": 8,
    "heads": 128,
    "head_dim": 128,
    "partials": 128,
    "tokens": 1_048_576,
    "cached": 1_048_575,
    "context": 1_048_576,
    "seconds": SPREAD,
    "ttft_seconds": SPREAD,
    "ttit_seconds": SPREAD,
    "exposed_seconds": SPREAD,
    "flops": 123.456e12,
    "kv_bytes": 123.456e9,
    "bytes": 123.456e9,
    "rate": 123.456e9,
    "of_ceiling": 0.9876,
    "bound": "memory",
    "torch_over_ours": 12.3456,
    "error": 1.2e-07,
    "torch_error": 1.2e-07,
    "pattern": "send-receive",
    "size": 16_777_216,
    "steals": 33.62,
    "ranks": 128,
    "active": 64,
    "batch": 64,
    "asked": "auto",
    "variant": "gather-kv",
    "predicted_s": 12345.678,
    "predicted_over_measured": 12.3456,
    "tokens_per_s": 123456.7,
    "regret": 0.1234,
    "sent_bytes": 123.456e9,
    "miss_rate": 0.123456,
}
BENCHES = {
    "attention": ["dtype", "heads", "D", "tokens", "cached", "time", "of ceiling"],
    "merge": ["dtype", "heads", "D", "partials", "tokens", "time", "of ceiling", "rate"],
    "link": ["pattern", "size", "time", "rate per rank", "of TCP", "delay of compute"],
    "prefill": ["N", "context", "new", "variant", "time", "predicted", "ratio"],
    "decode": ["N", "batch", "cached", "variant", "per step", "tokens/s", "predicted"],
}


@pytest.mark.parametrize("name", BENCHES)
def test_no_table_of_the_benchmarks_cuts_a_number_at_80_columns(monkeypatch, capsys, name):
    bench = importlib.import_module(f"cptool.cli.bench.{name}")
    cells = bench._row(LONG)
    monkeypatch.setattr(tables, "room", lambda to_stderr: 80)
    emit({"results": [LONG]}, as_json=False, columns=bench._COLUMNS, row=bench._row, caption="")
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    (row,) = (line for line in lines if cells[0] in line)
    assert "…" not in row and "..." not in row
    shown = [cell for cell in cells if f" {cell.strip()} " in f" {row} "]
    left_out = " ".join(lines[lines.index(row) + 1 :])
    for column, cell in zip(bench._COLUMNS, cells, strict=True):
        assert cell in shown or column.name in left_out
        assert column.name not in BENCHES[name] or cell in shown
    monkeypatch.setattr(tables, "room", lambda to_stderr: None)
    emit({"results": [LONG]}, as_json=False, columns=bench._COLUMNS, row=bench._row, caption="")
    (_, row) = capsys.readouterr().out.splitlines()
    assert all(cell in row for cell in cells)


@pytest.mark.parametrize("more", [(), ("--sweep", "ranks"), ("--sweep", "contexts")])
def test_a_plan_is_whole_at_80_columns(monkeypatch, more):
    command = ["plan", "llama3-405b", "--hardware", "gtt-h100", "--context", "1M", *more]
    command += ["--max-gpus", "128", "--decode", "1000"]
    full = CliRunner().invoke(main, command).stdout
    monkeypatch.setattr(tables, "room", lambda to_stderr=False: 80)
    shown = CliRunner().invoke(main, command).stdout
    table, _, command = shown.partition("\nrun it:")
    assert all(len(line.rstrip()) <= 80 for line in table.splitlines()) and "…" not in shown
    if "contexts" not in more:
        numbers = {word for word in full.split() if word[:1].isdigit()}
        assert numbers <= set(shown.split())


def test_a_line_is_broken_between_words(monkeypatch, capsys):
    monkeypatch.setattr(tables, "room", lambda to_stderr=False: 40)
    draw.say(f"{'word ' * 9}{'x' * 50}\n\nshort  as it is")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "word word word word word word word word",
        "word",
        "x" * 50,
        "",
        "short  as it is",
    ]
