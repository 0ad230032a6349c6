"""Any split of the keys into shards, merged in any order, is the whole."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import BFLOAT16_ISAS, check, make_case, tolerance

from cptool.ops.attention import attention_partial, merge_partials
from cptool.ops.kernels import cpu_isa

positions = st.lists(st.integers(0, 400), max_size=90).map(sorted)


@st.composite
def split_cases(draw):
    kv_heads = draw(st.integers(1, 3))
    case = make_case(
        draw(st.lists(st.tuples(positions, positions), max_size=4)),
        heads=(kv_heads * draw(st.integers(1, 5)), kv_heads),
        head_dim=draw(st.sampled_from([6, 8, 64, 80, 100])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        slack=draw(st.integers(0, 2)),
        spread=draw(st.sampled_from([0.0, 1.0, 10.0])),
        seed=draw(st.integers(0, 2**16)),
    )
    shards = draw(st.integers(1, 5))
    owner = torch.randint(
        shards,
        (len(case.k_pos),),
        generator=torch.Generator().manual_seed(draw(st.integers(0, 99))),
    )
    order = draw(st.permutations(range(shards)))
    return case, [case.only_keys(owner == shard) for shard in order]


def allowed(case):
    kernel = cpu_isa(case.q.dtype, case.q.shape[2])
    narrow = case.q.dtype == torch.bfloat16 and kernel in BFLOAT16_ISAS
    return tolerance(case, torch.bfloat16 if narrow else torch.float32, merged=True)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(split_cases())
def test_merged_shards_are_the_whole(split):
    case, shards = split
    partials = [attention_partial(*shard.arguments) for shard in shards]
    check(
        case,
        merge_partials([out for out, _ in partials], [lse for _, lse in partials]),
        allowed(case),
    )


@settings(deadline=None, derandomize=True, max_examples=150)
@given(split_cases())
def test_running_merge_of_shards_is_the_whole(split):
    case, shards = split
    running = torch.zeros(case.q.shape), torch.full(case.q.shape[:2], -torch.inf)
    for shard in shards:
        attention_partial(*shard.arguments, into=running)
    check(case, running, allowed(case))


@settings(deadline=None, derandomize=True, max_examples=30)
@given(split_cases(), st.data())
def test_queries_are_independent(split, data):
    """A query's result doesn't depend on which other queries are in the call."""
    case, _ = split
    start = data.draw(st.integers(0, len(case.q_pos)))
    stop = data.draw(st.integers(start, len(case.q_pos)))
    cu_q = case.cu_q.clamp(start, stop) - start
    out, lse = attention_partial(
        case.q[start:stop],
        case.k,
        case.v,
        case.q_pos[start:stop],
        case.k_pos,
        cu_q,
        case.cu_k,
        case.scale,
    )
    whole_out, whole_lse = attention_partial(*case.arguments)
    limit = allowed(case)
    assert torch.equal(lse.isfinite(), whole_lse[start:stop].isfinite())
    assert torch.all((out - whole_out[start:stop]).abs() <= 2 * limit.out)
    seen = lse.isfinite()
    assert torch.all((lse - whole_lse[start:stop])[seen].abs() <= 2 * limit.lse)
