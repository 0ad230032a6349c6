"""The rows that say what a turn did, at 80 columns."""

import pytest

from cptool.cli import draw, turn_report
from cptool.cli.figures import tables
from cptool.engine.answers.records import Drafted
from cptool.engine.setup.memory import Used
from cptool.engine.turn import Report
from cptool.planning.prediction import Prediction

REPORT = dict(
    tokens=1_048_575,
    cached=1_048_576,
    cp=128,
    tp=8,
    device="cuda:0",
    dtype="bfloat16",
    kv_dtype="bfloat16",
    weights="file",
    widened=None,
    variant="gather-kv",
    reason="195 ms per layer on 64 of 128 ranks, pass-kv and pass-q equal within 1%",
    load_s=123.456,
    ttft_s=313_200.0,
    processor_wait_s=313.0,
    ttit_ms=87.654,
    decode_variant="gather-q",
    decode_reason="1.82 ms per layer, next pass-q 2.28 ms",
    first_token=(1,),
    token_ids=((1,) * 10,),
    stopped=("length",),
    drafts=Drafted(steps=9),
    exposed_s=0.424,
    wire_bytes=111_000_000_000,
    flops=10**20,
    decode_bytes=648_000_000,
    kv_in_file=0,
    memory=Used(parts={"weights": 67.6e9, "kv": 4e9, "messages": 0.0}, peak=72.8e9),
    chunk=1_000_000,
    chunks=1,
    resumed=0,
    variants={"gather-kv": 1},
    ceiling_flops=None,
    predicted=Prediction(307_000.0, 0.0802, "defaults, not calibrated here", None),
)


def rows(**fields):
    report = Report(**{**REPORT, **fields})
    parts = turn_report.prefill_rows, turn_report.decode_rows, turn_report.source_rows
    return [row for part in parts for row in part(report)]


def test_predicted_and_measured_stand_side_by_side():
    shown = dict(rows())
    assert shown["first token"].startswith(
        "3 d 15 h (predicted 3 d 13 h), 3.35 tokens/s, 319 TFLOP"
    )
    assert shown["decode"] == (
        "10 tokens, 87.7 ms each (predicted 80.2 ms), 11.4 tokens/s, 7.39 GB/s of weights and KV "
        "per rank"
    )
    assert "cptool bench calibrate" in shown["predictions"]
    assert shown["memory"] == (
        "72.8 GB per rank at most (planned 71.6 GB: weights 67.6 GB, kv 4 GB)"
    )


def test_a_busy_machine_is_named():
    assert "processors" not in dict(rows())  # 0.1% of the time
    shown = dict(rows(processor_wait_s=107_000.0))["processors"]
    assert shown.startswith("shared: for 34% of that time")


def test_a_step_of_a_batch_gives_a_token_to_each_sequence():
    shown = dict(rows(token_ids=((1,) * 10, (1,) * 10)))
    assert "20 tokens, 87.7 ms per step of 2 sequences (predicted 80.2 ms)" in shown["decode"]
    assert "43.8 ms per token, 22.8 tokens/s" in shown["decode"]
    report = Report(**{**REPORT, "token_ids": ((1,) * 10, (1,))})  # the second ended at once
    assert report.tokens_per_s == pytest.approx(1e3 / 87.654)


def test_what_became_of_drafts():
    assert "drafts" not in dict(rows())
    drafts = Drafted(asked="lookup", steps=4, proposed=8, accepted=5)
    shown = dict(rows(drafts=drafts))
    assert shown["drafts"] == "5 of 8 tokens came true, 2.25 tokens per step of 4 steps"
    assert "3.29 GB/s of weights and KV" in shown["decode"]  # weights are read once a step
    off = Drafted(asked="lookup", off="16 sequences leave no row", steps=9)
    assert dict(rows(drafts=off))["drafts"] == "none: 16 sequences leave no row"


def test_kv_in_a_file_is_named():
    assert "KV" not in dict(rows())
    shown = dict(rows(kv_in_file=83_300_000))["KV"]
    assert shown == "83.3 MB per rank in a file, which each further token reads"


def test_without_a_prediction_nothing_is_said_of_it():
    assert "predict" not in str(rows(predicted=Prediction(None, None, "defaults", None)))


@pytest.mark.parametrize("width", [40, 80])
def test_no_number_is_cut(monkeypatch, capsys, width):
    monkeypatch.setattr(tables, "room", lambda to_stderr=False: width)
    draw.table(rows())
    text = capsys.readouterr().out
    assert "…" not in text and all(len(line.rstrip()) <= width for line in text.splitlines())
    words = " ".join(text.split())
    for row in rows():
        for word in row[1].split():
            assert word in words
