"""Rates of linear layers by rows: what was measured comes back, and lies between in between."""

import dataclasses
import json

import pytest

from cptool.errors import UserError
from cptool.model.shapes import llama_config
from cptool.planning.cost.forward import Forward
from cptool.planning.cost.layer import predict
from cptool.planning.linear_rates import RowRates, fitted, nearest
from cptool.planning.profiles import default_profile, find_profile, load_profile, save_profile

ROWS = 1, 16, 17, 128, 512
PACKING = {1: 70e-12, 16: 240e-12, 17: 330e-12, 128: 1320e-12, 512: 4900e-12}
OVERHEAD = {1: 50e-6, 16: 80e-6, 17: 200e-6, 128: 500e-6, 512: 900e-6}
SMALL, LARGE = 3e6, 12e6


def layer(parameters: float) -> list[float]:
    return [OVERHEAD[rows] + parameters * PACKING[rows] for rows in ROWS]


RATES = fitted(2, ROWS, (SMALL, layer(SMALL)), (LARGE, layer(LARGE)))


@pytest.mark.parametrize("rows", ROWS)
def test_what_was_measured_comes_back(rows):
    assert RATES.layer(rows) == pytest.approx(OVERHEAD[rows])
    assert RATES.product(7e6, rows) == pytest.approx(7e6 * PACKING[rows])


def test_between_and_beyond_lies_a_line_of_whole_rows():
    between = (PACKING[16] - PACKING[1]) / 15
    assert RATES.product(1, 4) == pytest.approx(PACKING[1] + 3 * between)
    assert RATES.product(1, 16.2) == RATES.product(1, 17)  # a rank has 17 of them
    each = (PACKING[512] - PACKING[17]) / (512 - 17)
    assert RATES.product(1, 1024) == pytest.approx(PACKING[512] + 512 * each)
    assert RATES.flops_of_many == pytest.approx(2 / each)
    assert RATES.scaled(2).product(1, 16) == pytest.approx(PACKING[16] / 2)


def test_of_the_ranks_that_compute_the_nearest_count():
    alone = dataclasses.replace(RATES, ranks=1)
    assert nearest((), 1) is None
    assert [nearest((alone, RATES), ranks).ranks for ranks in (1, 2, 64)] == [1, 2, 2]


def profile_of(*measured):
    return dataclasses.replace(
        default_profile("cpu"), threads=1, ranks_at_once=2, row_rates={"bfloat16": measured}
    )


def test_a_lone_rank_reads_faster_than_one_beside_another():
    alone = dataclasses.replace(RATES.scaled(2), ranks=1)
    config = llama_config(hidden=1024, layers=4, heads=8, kv_heads=2, ffn=4096)
    parts = [
        predict(
            "gather-kv",
            Forward(config=config, dtype="bfloat16", new=8, cached=512, ranks=2, active=active),
            profile,
        )
        for profile in (profile_of(alone, RATES), profile_of(RATES))
        for active in (1, 2)
    ]
    seconds = [part.linear_s for part in parts]
    assert seconds[0] == pytest.approx(seconds[2] / 2) and seconds[1] == seconds[3]
    # A rank of two threads has the rates of two ranks.
    two_threads = profile_of(alone, RATES).for_ranks(threads=2, processors=2)
    together = predict(
        "pass-kv",
        Forward(config=config, dtype="bfloat16", new=8, cached=512, ranks=1, active=1),
        two_threads,
    )
    rows = RATES.product(1, 8) / RATES.product(1, 4)  # all of them on one rank
    assert together.linear_s == pytest.approx(rows * seconds[1] / 2)


def test_dtypes_that_were_not_measured_keep_the_roofline():
    bare, config = (
        default_profile("cpu"),
        llama_config(hidden=1024, layers=4, heads=8, kv_heads=2, ffn=4096),
    )
    forward = Forward(config=config, dtype="float32", new=8, cached=512, ranks=2, active=2)
    profile = dataclasses.replace(bare, row_rates={"bfloat16": (RATES,)})
    assert predict("pass-kv", forward, profile) == predict("pass-kv", forward, bare)


def test_they_are_kept_with_the_profile_and_refused_when_damaged(tmp_path, monkeypatch):
    monkeypatch.setenv("CPTOOL_CACHE", str(tmp_path))
    profile = profile_of(RATES)
    path = save_profile(profile)
    assert load_profile("cpu") == profile
    kept = json.loads(path.read_text())
    for field, value in (("rows", [1, 4]), ("flops", [0] * 5), ("rows", [2, 3, 4, 5, 6])):
        damaged = json.loads(json.dumps(kept))
        damaged["devices"]["cpu"]["row_rates"]["bfloat16"][0][field] = value
        path.write_text(json.dumps(damaged))
        with pytest.raises(UserError, match=r"row_rates.*cptool bench calibrate"):
            load_profile("cpu")


def test_a_profile_without_them_is_one():
    assert find_profile("gtt-h100").row_rates == {}


def test_columns_belong_together():
    with pytest.raises(ValueError, match="different lengths"):
        RowRates(1, (1, 2, 3), (0.0,), (1e9, 1e9, 1e9))
