"""The choice: against the paper's inequalities and measurements, and where the answer is plain."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cptool.model.shapes import SHAPES
from cptool.planning import strategy
from cptool.planning.cost.forward import Forward
from cptool.planning.cost.layer import predict
from cptool.planning.profiles import default_profile, find_profile
from cptool.planning.strategy import choose
from cptool.variants import names

LLAMA3_8B, LLAMA3_405B = SHAPES["llama3-8b"], SHAPES["llama3-405b"]
GRAND_TETON = find_profile("gtt-h100")


def ask(asked="auto", *, ranks=4, cached=0, device="cuda", rule="predicted", **more):
    profile = more.pop("profile", default_profile(device))
    fields = {"config": LLAMA3_8B, "dtype": "bfloat16", "cached": cached, **more}
    return choose(asked, Forward(ranks=ranks, active=ranks, **fields), profile, rule)


def test_what_is_asked_for_is_taken_on_all_ranks():
    for variant in names():
        choice = ask(variant, new=3, ranks=4)
        assert (choice.variant, choice.active, choice.reason) == (variant, 4, "as asked")


def test_partials_in_two_bytes_cost_less():
    wide, narrow = (
        ask("gather-q", new=64, cached=65536, partial_bytes=n).predicted_s for n in (4, 2)
    )
    assert narrow < wide
    same = [ask("pass-kv", new=64, cached=65536, partial_bytes=n).predicted_s for n in (4, 2)]
    assert same[0] == same[1]


def test_one_rank_has_nothing_to_choose():
    choice = ask(new=5, ranks=1)
    assert (choice.variant, choice.reason) == ("pass-kv", "one rank, nothing travels")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_long_prefill_moves_keys_on_all_ranks(device):
    choice = ask(new=131072, device=device)
    assert choice.variant in ("pass-kv", "gather-kv") and choice.active == 4


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_decode_over_a_long_context_gathers_queries(device, ranks):
    choice = ask(new=1, cached=100_000, ranks=ranks, device=device)
    # Two ranks send the same messages in either variant of queries.
    assert choice.variant in (("pass-q", "gather-q") if ranks == 2 else ("gather-q",))


def test_the_reason_says_the_two_best():
    choice = ask(new=131072)
    assert choice.reason.endswith(" per layer, pass-kv equal within 1%")
    assert choice.variant not in choice.reason  # it is printed beside it


def test_variants_that_differ_by_less_than_one_percent_are_called_equal():
    times = [(1.0, 0, "pass-kv", 2), (1.009, 1, "gather-kv", 2), (1.02, 2, "pass-q", 2)]
    said = strategy._comparison(times[0], times, 2)
    assert said == "1 s per layer, gather-kv equal within 1%"
    assert strategy._comparison(times[0], [times[0], times[2]], 2) == (
        "1 s per layer, next pass-q 1.02 s"
    )


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 200_000), st.integers(0, 200_000), st.integers(2, 8))
def test_auto_is_the_fastest_of_what_is_predicted(new, cached, ranks):
    new, cached = strategy._rounded(new), strategy._rounded(cached)
    choice = ask(new=new, cached=cached, ranks=ranks)
    profile = default_profile("cuda")
    for variant in names():
        forward = Forward(
            config=LLAMA3_8B, dtype="bfloat16", new=new, cached=cached, ranks=ranks, active=ranks
        )
        assert choice.predicted_s <= predict(variant, forward, profile).seconds


def test_a_short_prompt_may_use_fewer_ranks():
    profile = default_profile("cuda")
    slow = dataclasses.replace(
        profile, host_link=dataclasses.replace(profile.host_link, latency_s=0.1)
    )
    choice = ask(new=64, profile=slow)
    assert 1 <= choice.active <= 4
    crowded = dataclasses.replace(default_profile("cpu"), ranks_at_once=1)
    assert ask(new=256, profile=crowded).active == 1


sizes = dict(
    new=st.integers(1, 10**6),
    cached=st.integers(0, 10**6),
    ranks=st.integers(2, 16),
    kv_heads=st.sampled_from([1, 2, 8]),
    group=st.integers(1, 16),
    flops=st.floats(1e11, 1e15),
    bandwidth=st.floats(1e8, 1e12),
)


@settings(deadline=None)
@given(**sizes)
def test_algorithm_1_follows_equations_1_2(new, cached, ranks, kv_heads, group, flops, bandwidth):
    heads, width, e = kv_heads * group, kv_heads * group * 128, 2
    compute = 4 * new * width * (new + cached) / (ranks * flops)
    kv_transfer = 2 * (new + cached) * width * e * kv_heads / heads / bandwidth
    q_bytes, kv_bytes = new * width * e, 2 * (new + cached) * width * kv_heads / heads * e
    sizes_of = {"ranks": ranks, "heads": heads, "kv_heads": kv_heads, "element_bytes": e}
    sizes_of |= {"flops": flops, "bandwidth": bandwidth}
    chosen = strategy.algorithm1(new, cached, **sizes_of)
    margin = 1e-9
    if compute > kv_transfer * (1 + margin) or q_bytes > kv_bytes * (1 + margin):
        assert chosen
    elif compute < kv_transfer * (1 - margin) and q_bytes < kv_bytes * (1 - margin):
        assert not chosen


@settings(deadline=None)
@given(**sizes)
def test_algorithm_5_follows_the_all_to_all(new, cached, ranks, kv_heads, group, flops, bandwidth):
    """Queries travel only if what pass-KV exposes in N - 1 steps exceeds t_a2a, with D + 1 ~ D."""
    heads, width, e = kv_heads * group, kv_heads * group * 128, 2
    compute = 4 * new * width * (new + cached) / (ranks * flops)
    kv_transfer = 2 * (new + cached) * width * e * kv_heads / heads / bandwidth
    exposed = (ranks - 1) * (kv_transfer - compute)
    all_to_all = (ranks - 1) * width * new * e / bandwidth
    sizes_of = {"ranks": ranks, "heads": heads, "kv_heads": kv_heads, "element_bytes": e}
    sizes_of |= {"flops": flops, "bandwidth": bandwidth}
    chosen = strategy.algorithm5(new, cached, **sizes_of)
    slack = 1e-9 * (kv_transfer + compute + all_to_all) * ranks
    if exposed > all_to_all + slack:
        assert not chosen
    elif exposed < all_to_all - slack:
        assert chosen


def test_rules_choose_between_the_rings():
    for rule in ("algorithm1", "algorithm5"):
        assert ask(new=131072, rule=rule).variant == "pass-kv"
        assert ask(new=1, cached=131072, rule=rule).variant == "pass-q"
    with pytest.raises(ValueError, match="no coefficients"):
        ask(new=1, rule="fitted")
    with pytest.raises(ValueError, match="rule is 'best'"):
        ask(new=1, rule="best")


def test_the_fitted_rule_agrees_with_what_it_was_fitted_to():
    rule = strategy.fit_rule(LLAMA3_405B, "bfloat16", 4, GRAND_TETON)
    profile = dataclasses.replace(GRAND_TETON, rule=rule)
    same = total = 0
    for new in (64, 512, 4096, 32768):
        for miss in (0.003, 0.01, 0.1, 0.3, 1.0):
            cached = round(new / miss) - new
            forward = Forward(
                config=LLAMA3_405B, dtype="bfloat16", new=new, cached=cached, ranks=4, active=4
            )
            q, kv = (predict(v, forward, profile).seconds for v in ("pass-q", "pass-kv"))
            total += 1
            same += (strategy.fitted(new, cached, rule) > 0) == (kv < q)
    assert same >= 0.8 * total


def test_choices_are_few_over_a_decode():
    """Decode asks at every step; what it asks is one of few questions."""
    strategy._choose.cache_clear()
    profile = default_profile("cpu")
    for step in range(4096, 8192):
        ask(new=1, cached=step, profile=profile)
    assert strategy._choose.cache_info().misses <= 17
