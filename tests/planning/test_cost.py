"""The cost model: its limits, its monotonicity, and counts that can be done by hand."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cptool.model.shapes import llama_config
from cptool.planning.cost import counts, estimate
from cptool.planning.cost.forward import Forward
from cptool.planning.cost.layer import predict
from cptool.planning.cost.memory import memory_per_rank
from cptool.planning.cost.rates import IN_CACHES, Rates
from cptool.planning.hardware import Link
from cptool.planning.profiles import default_profile
from cptool.planning.strategy import choose
from cptool.variants import find, names

CONFIG = llama_config(
    hidden=1024,
    layers=4,
    heads=8,
    kv_heads=2,
    ffn=4096,
    vocab_size=1000,
    max_position_embeddings=131072,
    tie_word_embeddings=True,
)


def with_link(profile, link):
    """Between all ranks, on one host or several."""
    return dataclasses.replace(profile, host_link=link, network=link)


# All ranks on one host.
PROFILES = {
    device: with_link(default_profile(device), default_profile(device).host_link)
    for device in ("cpu", "cuda")
}
free = settings(deadline=None, max_examples=60)
variants, profiles = st.sampled_from(names()), st.sampled_from(list(PROFILES.values()))
tokens, cached, ranks = st.integers(1, 10**6), st.integers(0, 10**6), st.integers(1, 16)


def on(ranks: int, new: int, cached: int = 0, active: int | None = None, **more) -> Forward:
    return Forward(
        config=CONFIG,
        dtype="bfloat16",
        new=new,
        cached=cached,
        ranks=ranks,
        active=active or ranks,
        **more,
    )


def test_kv_of_16_bits_is_half_the_memory_and_half_of_what_keys_travel():
    wide, narrow = (
        dataclasses.replace(on(4, 4096, 4096), dtype="float32", kv_dtype=kv_dtype)
        for kv_dtype in (None, "bfloat16")
    )
    held = [memory_per_rank("pass-kv", forward, PROFILES["cpu"]) for forward in (wide, narrow)]
    positions = 4 * 2048
    assert held[0]["kv"] - positions == 2 * (held[1]["kv"] - positions)
    assert held[0]["weights"] == held[1]["weights"]
    for variant in names():
        sent = [predict(variant, forward, PROFILES["cpu"]).bytes for forward in (wide, narrow)]
        assert sent[0] == sent[1] * (2 if find(variant).keys_travel else 1)


@pytest.mark.parametrize("window", [None, 1, 2, 7, 30, 100])
def test_pairs_in_windows_by_hand(window):
    for new in (1, 2, 5, 29, 30, 31, 64):
        for old in (0, 1, 6, 7, 40, 200):
            queries, most = range(old, old + new), window or 1000
            assert counts.cached_pairs(new, old, window) == sum(
                max(0, old - max(0, q - most + 1)) for q in queries
            )
            assert counts.new_pairs(new, window) == sum(
                q - max(old, q - most + 1) + 1 for q in queries
            )
    config = dataclasses.replace(CONFIG, windows=(window, None, window, 3))
    pairs = sum(
        counts.cached_pairs(9, 50, w) + counts.new_pairs(9, w) for w in (window, None, window, 3)
    )
    assert counts.attention_flops(config, 9, 50) == 4 * 8 * 128 * pairs


def in_windows(forward: Forward, *windows: int | None) -> Forward:
    return dataclasses.replace(forward, config=dataclasses.replace(CONFIG, windows=windows))


@free
@given(variants, profiles, st.integers(1, 10**5), cached, ranks, st.integers(1, 10**6))
def test_a_window_saves_time_and_bytes(variant, profile, new, old, n, window):
    full = predict(variant, on(n, new, old), profile)
    windowed = predict(variant, in_windows(on(n, new, old), *[window] * 4), profile)
    assert windowed.attention_s <= full.attention_s * 1.0001 and windowed.bytes <= full.bytes
    wide = predict(variant, in_windows(on(n, new, old), *[10**8] * 4), profile)
    for name, seconds in full.parts.items():
        assert math.isclose(wide.parts[name], seconds, rel_tol=0.01, abs_tol=1e-6), name


def test_layers_with_and_without_windows_take_their_mean():
    forward = on(4, 4096, 100000)
    full, windowed, mixed = (
        predict("pass-kv", in_windows(forward, *windows), PROFILES["cpu"])
        for windows in ([None] * 4, [512] * 4, [512, None, 512, None])
    )
    assert math.isclose(mixed.seconds, (full.seconds + windowed.seconds) / 2)
    assert windowed.bytes < full.bytes / 10


@pytest.mark.parametrize("variant", names())
def test_time_per_token_is_flat_beyond_the_window(variant):
    """Decode over 8K tokens or over 64K, in windows of 4K."""
    steps = [
        predict(variant, in_windows(on(2, 1, held), *[4096] * 4), PROFILES["cpu"]).seconds
        for held in (8192, 65536)
    ]
    assert steps[0] == steps[1]


def test_attention_flops_count_visible_pairs():
    width = 8 * 128
    assert counts.attention_flops(CONFIG, 3) == 4 * 4 * width * (1 + 2 + 3)
    assert counts.attention_flops(CONFIG, 2, 10) == 4 * 4 * width * (11 + 12)


@free
@given(variants, profiles, tokens, cached)
def test_one_rank_exposes_and_sends_nothing(variant, profile, new, cached):
    result = predict(variant, on(1, new, cached), profile)
    assert (result.exposed_s, result.bytes) == (0.0, 0.0)
    assert result.seconds == result.compute_s > 0


@free
@given(variants, profiles, tokens, cached, ranks)
def test_seconds_are_compute_and_what_is_exposed(variant, profile, new, cached, ranks):
    result = predict(variant, on(ranks, new, cached), profile)
    assert result.seconds == pytest.approx(result.compute_s + result.exposed_s)
    assert result.exposed_s >= 0 and result.compute_s > 0


@free
@given(variants, profiles, tokens, cached, st.integers(2, 16))
def test_a_perfect_link_exposes_nothing(variant, profile, new, cached, ranks):
    perfect = with_link(
        profile,
        Link(
            bandwidth=float("inf"),
            fan_out=float("inf"),
            latency_s=0.0,
            message_overhead_s=0.0,
            collective_latency_s=0.0,
        ),
    )
    perfect = dataclasses.replace(perfect, skew_s=0.0)
    exposed = predict(variant, on(ranks, new, cached), perfect).exposed_s
    assert exposed == pytest.approx(0, abs=1e-12)


@free
@given(variants, profiles, tokens, cached, st.integers(2, 16))
def test_a_slower_link_never_helps(variant, profile, new, cached, ranks):
    link = profile.host_link
    slow = dataclasses.replace(link, bandwidth=link.bandwidth / 3, fan_out=link.fan_out / 3)
    slower = with_link(profile, slow)
    forward = on(ranks, new, cached)
    seconds = predict(variant, forward, profile).seconds
    assert predict(variant, forward, slower).seconds >= seconds * (1 - 1e-9)


@free
@given(variants, profiles, st.integers(64, 10**6), cached, st.integers(1, 8))
def test_more_tokens_never_take_less_time(variant, profile, new, cached, ranks):
    seconds = predict(variant, on(ranks, new, cached), profile).seconds
    assert predict(variant, on(ranks, 2 * new, cached), profile).seconds >= seconds
    assert predict(variant, on(ranks, new, cached + 1000), profile).seconds >= seconds


def test_compute_of_a_long_prefill_is_shared():
    profile = PROFILES["cuda"]
    one = predict("pass-kv", on(1, 10**6), profile).compute_s
    eight = predict("pass-kv", on(8, 10**6), profile).compute_s
    assert one / 8 < eight < 1.02 * one / 8


def test_bytes_are_those_of_table_3():
    """KV: 2 (T + P) N_KV D_H e over N ranks, N - 1 times; Q: T D e likewise."""
    new, cached, ranks = 4096, 8192, 4
    forward, profile = on(ranks, new, cached), PROFILES["cuda"]
    keys = 2 * (new + cached) * 2 * 128 * 2 * (ranks - 1) / ranks
    assert predict("pass-kv", forward, profile).bytes == keys
    assert predict("gather-kv", forward, profile).bytes == keys
    share = new / ranks * (ranks - 1)
    queries, partials = share * 1024 * 2, share * (1024 + 8) * 4
    assert predict("pass-q", forward, profile).bytes == queries + partials
    assert predict("gather-q", forward, profile).bytes == queries + partials


def test_keys_are_gathered_by_ranks_with_queries_alone():
    cached, ranks, token = 8192, 4, 2 * 2 * 128 * 2
    sent = predict("gather-kv", on(ranks, 1, cached), PROFILES["cuda"]).bytes
    assert sent == cached / ranks * token
    alone = predict("gather-kv", on(ranks, 64, active=1), PROFILES["cuda"])
    assert alone.bytes == alone.exposed_s == 0


def test_a_lone_query_waits_for_the_last_rank_that_answers_it():
    bare = dataclasses.replace(PROFILES["cpu"], ranks_at_once=None)
    one, four = (predict("pass-q", on(4, new, 65536), bare).attention_s for new in (1, 4))
    alone = Rates(on(4, 1, 65536), bare).attention(16384, 16385, 1)
    assert one == pytest.approx(2 * alone, rel=1e-3)  # on its own rank, then on the last one
    assert four == pytest.approx(4 * alone, rel=1e-3)


def test_ranks_beyond_the_processors_take_turns():
    profile = dataclasses.replace(PROFILES["cpu"], ranks_at_once=2)
    two = predict("gather-kv", on(4, 4096, active=2), profile).compute_s
    four = predict("gather-kv", on(4, 4096), profile).compute_s
    assert four == pytest.approx(two, rel=0.1)


def test_what_a_layer_costs_beyond_is_that_of_the_nearest_ranks_measured():
    profile = dataclasses.replace(
        PROFILES["cpu"],
        residual_s={"2": {"pass-kv": (1e-3, 2e-3)}, "4": {"pass-kv": (3e-3, 6e-3)}},
    )
    bare = PROFILES["cpu"]
    for ranks, new, beyond in ((2, 1, 1e-3), (2, 64, 2e-3), (4, 64, 6e-3), (7, 64, 12e-3)):
        forward = on(ranks, new, 512)
        more = predict("pass-kv", forward, profile).seconds
        assert more - predict("pass-kv", forward, bare).seconds == pytest.approx(beyond)
    assert predict("pass-q", on(2, 64), profile) == predict("pass-q", on(2, 64), bare)
    half = on(4, 64, active=2)  # a third of the way from one source to four
    more = predict("pass-kv", half, profile).seconds - predict("pass-kv", half, bare).seconds
    assert more == pytest.approx(4e-3)


def test_what_a_forward_costs_once_is_shared_by_its_layers():
    slow = {"4": {variant: (0.4, 0.4) for variant in names() if variant != "pass-q"}}
    profile, forward = dataclasses.replace(PROFILES["cpu"], start_s=slow), on(4, 8, 65536)
    bare = estimate.prefill("pass-kv", forward, PROFILES["cpu"]).seconds
    assert estimate.prefill("pass-kv", forward, profile).seconds == pytest.approx(bare + 0.4)
    choice = choose("auto", forward, profile)
    assert choice.variant == "pass-q"  # the rest costs 0.1 s more in each of four layers
    asked = [choose("pass-kv", forward, p).predicted_s for p in (PROFILES["cpu"], profile)]
    assert asked[1] - asked[0] == pytest.approx(0.1)


def test_transfers_that_vary_are_exposed_at_times_though_they_fit():
    def waited(spread, cover):
        link = dataclasses.replace(PROFILES["cuda"].host_link, spread=spread)
        rates = Rates(on(4, 4096), with_link(dataclasses.replace(PROFILES["cuda"]), link))
        rates = dataclasses.replace(
            rates, profile=dataclasses.replace(rates.profile, transfer_steals=0)
        )
        return rates.exposed(cover, 0.0, 1.0)

    assert [waited(0, c) for c in (0.0, 0.6, 1.0, 2.0)] == [1, 0.4, 0, 0]
    assert waited(1, 2.0) == pytest.approx(math.exp(-2))
    for spread in (0.3, 1.0):  # all of it where nothing covers it, and less the more does
        times = [waited(spread, c / 10) for c in range(40)]
        assert times[0] == pytest.approx(1) and times == sorted(times, reverse=True)
        assert all(t >= waited(0, c / 10) - 1e-12 for c, t in enumerate(times))


def test_cached_keys_cost_a_prefill_and_no_step_of_decode():
    idle = dataclasses.replace(PROFILES["cuda"], layer_overhead_s=0.0)
    bare, costly = (dataclasses.replace(idle, cached_key_s=each) for each in (0.0, 1e-7))
    for ranks, new in ((1, 64), (4, 64), (4, 1)):
        forward = on(ranks, new, 8000)
        more, less = (predict("pass-kv", forward, p).overhead_s for p in (costly, bare))
        assert more - less == pytest.approx(8000 / ranks * 1e-7 if new > 1 else 0)


def test_steps_of_all_queries_send_partials_alone():
    forward = on(4, 3, 3000, batch=3)
    step = predict("all-q", forward, PROFILES["cuda"])
    assert step.bytes == 3 * 3 * (1024 + 8) * 4
    assert step.hidden_s == 0


def test_float8_products_are_faster_and_read_half():
    profile = PROFILES["cuda"]
    plain, fast = (
        [predict("pass-kv", on(1, new, feed_forward=dtype), profile).linear_s for new in (1, 65536)]
        for dtype in (None, "float8")
    )
    assert fast[0] < plain[0] and fast[1] < plain[1]


def test_a_block_of_queries_pays_for_packing_the_keys_and_one_query_does_not():
    plain = dataclasses.replace(PROFILES["cpu"], cache_bandwidth=8e9, block_bandwidth=None)
    packs = dataclasses.replace(plain, block_bandwidth=2e9)
    bare, packed = (
        [predict("pass-kv", on(1, new, 4096), p).attention_s for new in (1, 16)]
        for p in (plain, packs)
    )
    assert packed[0] == bare[0]
    read = (4096 + 16) * 2 * 2 * 128 * 2  # bytes of K and V of two heads
    assert packed[1] - bare[1] == pytest.approx(read / 2e9 - read / 8e9)


def test_few_rows_read_in_place_and_many_pack_first():
    profile = dataclasses.replace(
        default_profile("cpu"),
        few_query_rows=32,
        few_query_rate=0.5,
        cache_bandwidth=1e10,
        block_bandwidth=1e9,
        attention_flops={"bfloat16": 1e11},
        attention_ramp=0.0,
        call_overhead_s=0.0,
    )
    forward = Forward(
        config=llama_config(hidden=1024, layers=8, heads=8, kv_heads=2, ffn=3072),
        dtype="bfloat16",
        new=1,
        cached=8192,
        ranks=1,
        active=1,
    )
    rates = Rates(forward, profile)
    flops, read = 4 * 1024 * 8192, 8192 * 2 * 2 * 128 * 2
    assert rates.attention(8192, 8192, 1) == pytest.approx(flops / 0.5e11 + read / 1e10)
    assert rates.attention(8 * 8192, 8192, 8) == pytest.approx(8 * flops / 0.5e11 + read / 1e10)
    assert rates.attention(9 * 8192, 8192, 9) == pytest.approx(9 * flops / 1e11 + read / 1e9)


def test_what_no_cache_keeps_is_moved_at_the_rate_of_memory():
    profile = dataclasses.replace(
        default_profile("cpu"), touch_bandwidth=2e10, moving_bandwidth=1e10, op_overhead_s=0.0
    )
    config = llama_config(hidden=1024, layers=8, heads=8, kv_heads=2, ffn=3072)
    forward = Forward(config=config, dtype="float32", new=1, cached=0, ranks=1, active=1)
    rates = Rates(forward, profile)
    assert rates.touch(IN_CACHES) == pytest.approx(IN_CACHES / 2e10)
    assert rates.touch(3 * IN_CACHES) == pytest.approx(IN_CACHES / 2e10 + 2 * IN_CACHES / 1e10)
