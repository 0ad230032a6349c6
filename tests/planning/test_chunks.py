"""A prompt in chunks: what the parts add up to, and the chunk that fits."""

import dataclasses

import pytest

from cptool.model.shapes import SHAPES, llama_config
from cptool.planning.chunks import (
    SLOWER,
    SPARE,
    UNIT,
    auto_chunk,
    efficient_chunk,
    largest_chunk,
    plan_chunk,
    plan_chunks,
)
from cptool.planning.cost.estimate import prefill
from cptool.planning.cost.forward import Forward
from cptool.planning.cost.memory import memory_per_rank
from cptool.planning.profiles import find_profile

SMALL = llama_config(hidden=1024, layers=4, heads=8, kv_heads=2, ffn=4096)
CPU, GTT = find_profile("cpu-avx2"), find_profile("gtt-h100")
ON_CPU = Forward(config=SMALL, dtype="float32", new=100_000, cached=0, ranks=2, active=2)
MILLION = Forward(
    config=SHAPES["llama3-405b"],
    dtype="bfloat16",
    new=1_000_000,
    cached=0,
    ranks=8,
    active=8,
    tp=8,
    feed_forward="float8",
)


def test_a_chunk_is_a_forward_over_what_came_before():
    planned = plan_chunks(ON_CPU, CPU, 30_000, variant="pass-kv")
    assert [(c.cached, c.new) for c in planned.chunks] == [
        (0, 30_000),
        (30_000, 30_000),
        (60_000, 30_000),
        (90_000, 10_000),
    ]
    for chunk in planned.chunks:
        alone = dataclasses.replace(ON_CPU, cached=chunk.cached, new=chunk.new)
        assert chunk.seconds == prefill("pass-kv", alone, CPU).seconds
        assert chunk.memory == memory_per_rank("pass-kv", alone, CPU, 100_000)
    assert planned.seconds == pytest.approx(sum(c.seconds for c in planned.chunks))
    assert planned.fullest is planned.chunks[2]  # the most keys for a whole chunk


def test_room_for_the_answer_is_part_of_every_chunk():
    plain, roomy = (plan_chunk(ON_CPU, CPU, room=room).memory for room in (None, 110_000))
    assert roomy["kv"] == pytest.approx(1.1 * plain["kv"])
    others = ("weights", "workspace", "messages")
    assert [plain[name] for name in others] == [roomy[name] for name in others]


def test_the_variant_changes_on_the_way():
    """Keys travel while most tokens are new, queries once most are cached (paper, equation 1)."""
    planned = plan_chunks(MILLION, find_profile("gti-h100"), 16384)
    switches = planned.switches
    assert switches[0][0] == 0 and switches[0][1] in ("pass-kv", "gather-kv")
    assert switches[-1][1] in ("pass-q", "gather-q")
    assert planned.chunks[-1].choice.variant == switches[-1][1]


@pytest.mark.parametrize("whole, profile", [(ON_CPU, CPU), (MILLION, GTT)])
def test_the_largest_chunk_fits_and_a_larger_one_does_not(whole, profile):
    last = dataclasses.replace(whole, cached=whole.new - UNIT, new=UNIT)
    least, one = (plan_chunk(f, profile, variant="pass-kv").memory_bytes for f in (last, whole))
    for part in (0.1, 0.5):
        limit = least + part * (one - least)
        chunk = largest_chunk(whole, profile, limit, variant="pass-kv")
        assert 0 < chunk < whole.new and chunk % UNIT == 0
        planned = plan_chunks(whole, profile, chunk, variant="pass-kv")
        assert planned.fullest.memory_bytes <= limit
        more = dataclasses.replace(whole, cached=whole.new - chunk - UNIT, new=chunk + UNIT)
        assert plan_chunk(more, profile, variant="pass-kv").memory_bytes > limit
    assert largest_chunk(whole, profile, one, variant="pass-kv") == whole.new
    assert largest_chunk(whole, profile, 0.999 * least, variant="pass-kv") == 0


@pytest.mark.parametrize("whole, profile", [(ON_CPU, CPU), (MILLION, GTT)])
def test_auto_keeps_the_rate_and_takes_no_memory_for_nothing(whole, profile):
    one = plan_chunks(whole, profile, whole.new)
    efficient = efficient_chunk(whole, profile)
    assert plan_chunks(whole, profile, efficient).seconds <= 1.01 * SLOWER * one.seconds
    free = auto_chunk(whole, profile, float("inf"))
    assert free >= efficient
    planned = plan_chunks(whole, profile, free)
    memory = planned.fullest.memory
    beside = memory["workspace"] + memory["messages"]
    assert free == efficient or beside <= SPARE * (memory["weights"] + memory["kv"])
    limit = plan_chunks(whole, profile, free // 2).fullest.memory_bytes
    tight = auto_chunk(whole, profile, limit)
    assert 0.3 * free < tight <= free
    assert plan_chunks(whole, profile, tight).fullest.memory_bytes <= limit
    assert auto_chunk(whole, profile, memory["weights"]) == 0
