"""What a turn is predicted to take, and which turns the cost model does not cover."""

import dataclasses

import pytest

from cptool.model.shapes import SHAPES
from cptool.planning.cost.forward import Forward
from cptool.planning.cost.layer import predict
from cptool.planning.cost.rates import Rates
from cptool.planning.hardware import Measurement
from cptool.planning.linear_rates import StoredRates
from cptool.planning.planner import Workload, plan
from cptool.planning.prediction import Work, predict_turn
from cptool.planning.profiles import default_profile

CPU = default_profile("cpu")


def work(**fields):
    shown = {"dtype": "float32", "new": [4096], "cached": [0], "answer": 16, "ranks": 2, "tp": 1}
    return Work(config=SHAPES["llama3-1b"], **{**shown, **fields})


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_turn_is_predicted_as_the_planner_does(device):
    profile = dataclasses.replace(default_profile(device), threads=0)
    found = predict_turn(work(dtype="bfloat16"), "auto", profile)
    planned = plan(
        Workload(config=SHAPES["llama3-1b"], context=4096, answer=16), 2, 1, "auto", profile
    )
    assert found.ttft_s == pytest.approx(planned.ttft.seconds)
    assert found.ttit_s == pytest.approx(planned.ttit.seconds, rel=1e-3)


def test_what_the_model_does_not_cover_is_not_predicted():
    for fields in ({"new": [10, 20], "cached": [0, 0]}, {"dtype": "float8"}):
        found = predict_turn(work(**fields), "auto", CPU)
        assert (found.ttft_s, found.ttit_s) == (None, None)
    assert predict_turn(work(new=[0], cached=[100]), "auto", CPU).ttft_s is None
    assert predict_turn(work(answer=1), "auto", CPU).ttit_s is None


def test_where_the_figures_come_from_is_said():
    found = predict_turn(work(), "auto", CPU)
    assert (found.source, found.calibrated) == ("defaults, not calibrated here", None)
    measured = dataclasses.replace(CPU, measurement=Measurement(date="2026-11-29"))
    found = predict_turn(work(), "auto", measured)
    assert (found.source, found.calibrated) == ("calibrated 2026-11-29", "2026-11-29")
    assert found.fields(decoding=True)["predicted_ttit_ms"] == pytest.approx(1e3 * found.ttit_s)
    assert "predicted_ttit_ms" not in found.fields(decoding=False)


def test_weights_that_stay_as_stored_are_read_in_their_bytes():
    """A decode step is bound by them, or by widening them; many rows hardly notice."""
    plain, read = (
        predict_turn(work(ranks=1, **fields), "auto", dataclasses.replace(CPU, stored=None))
        for fields in ({}, {"weight_size": 0.5})
    )
    assert read.ttit_s < 0.4 * plain.ttit_s
    assert 0.9 * plain.ttft_s < read.ttft_s < plain.ttft_s
    widened = predict_turn(work(ranks=1, weight_size=0.5), "auto", CPU)
    assert read.ttit_s < widened.ttit_s < plain.ttit_s
    assert read.ttft_s < widened.ttft_s < 1.1 * plain.ttft_s


def test_many_rows_widen_stored_weights_again_for_each_piece():
    forward = Forward(
        config=work().config,
        dtype="float32",
        new=4096,
        cached=0,
        ranks=1,
        active=1,
        weight_size=0.5,
    )
    slow = dataclasses.replace(CPU.stored, widened=1e6)
    profile = dataclasses.replace(CPU, stored=slow)
    difference = (
        predict("pass-kv", forward, profile).linear_s - predict("pass-kv", forward, CPU).linear_s
    )
    (attention, _), (feed_forward, _) = forward.linear_layers()
    widened = attention + 4 * feed_forward  # pieces of 1024 rows
    assert difference == pytest.approx(widened / 1e6 - widened / CPU.stored.widened)


def test_few_rows_of_stored_weights_take_their_own_kernel_each_row_a_part_more():
    stored = StoredRates(rows=16, direct=1e9, more=0.4, widened=1e9, layer_s=0.0, panels=False)
    profile = dataclasses.replace(CPU, stored=stored, memory_bandwidth=1e15)
    forward = work(ranks=1, new=[1], weight_size=0.56).forward
    rates = Rates(forward, profile)
    seconds = [rates.product(1e6, "float32", rows, 1) for rows in (1, 2, 16)]
    assert seconds == pytest.approx([1e-3, 1.4e-3, 7e-3])
    assert rates.product(1e6, "float32", 17, 1) != pytest.approx(7.4e-3)
    assert rates.in_panels(16) == rates.in_panels(1024) == 0  # widened once, copied never
    _, (feed_forward, _) = forward.linear_layers()
    assert rates.in_panels(4096) == pytest.approx(3 * feed_forward / 1e9)
    panels = dataclasses.replace(profile, stored=dataclasses.replace(stored, panels=True))
    assert Rates(forward, panels).in_panels(1024) > 0


def test_products_in_fp8_are_those_of_the_profile():
    """Not those of weights that a CPU reads in blocks: matrices in FP8 have fewer bytes, too."""
    plain = work(dtype="bfloat16", feed_forward="float8")
    counted = dataclasses.replace(plain, weight_size=1.2)
    cluster = default_profile("cuda")
    assert "float8" in cluster.linear_flops
    found = [predict_turn(each, "pass-kv", cluster).ttft_s for each in (plain, counted)]
    assert found[0] == found[1]
